//! Traces of requests through both services, exported to an OpenTelemetry collector. Off unless a collector is configured.
//!
//! Nothing waits for the collector: a span that ends goes to a bounded queue, and is dropped and counted if that is full. New
//! traces per second are bounded, whatever clients request. An untraced request costs one decision, its events one branch each.
//!
//! Spans contain ids, numbers and names of routes and events, never tokens or message text.

mod context;
mod export;
mod settings;

use std::{
    fmt,
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, SystemTime},
};

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
pub use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, KeyValue, any_value::Value},
    trace::v1::{self as proto, Status, status::StatusCode},
};
use prometheus_client::metrics::{counter::Counter, family::Family};
use tokio::sync::mpsc::{self, error::TrySendError};

pub use self::{
    context::{InvalidTraceContext, TraceContext},
    export::Exporter,
    settings::{Settings, Texts},
};
use crate::{
    labels, metrics,
    outbound::{Limits, Outbound},
};

/// Spans that wait for export, about half a KB each; more are dropped.
const QUEUE: usize = 4_096;
/// Limit for the export of the last spans at shutdown.
pub const LAST_SPANS: Duration = Duration::from_secs(1);

labels!(Dropped { reason });

metrics! {
    pub struct Metrics {
        exported_spans: Counter = "Spans that the collector accepted";
        dropped_spans: Family<Dropped, Counter> =
            "Spans that the collector did not get: the queue was full, it was unreachable, or it rejected them";
    }
}

impl Metrics {
    fn drop(&self, spans: u64, reason: &'static str) {
        self.dropped_spans.get_or_create(&Dropped { reason }).inc_by(spans);
    }
}

/// Makes spans. Off by default.
#[derive(Clone, Default)]
pub struct Tracer(Option<Arc<Active>>);

struct Active {
    queue: mpsc::Sender<proto::Span>,
    metrics: Metrics,
    /// Traces that begin here are recorded if their id is below this.
    below: u64,
    own: DefaultDirectRateLimiter,
    /// Traces that clients request have a bound of their own, so that they cannot use up ours.
    requested: DefaultDirectRateLimiter,
}

/// The tracer of a service and the task that exports its spans. `name` and `version` are those of the program.
///
/// Fails if the system has no trusted certificates.
pub fn start(
    settings: Option<Settings>,
    name: &'static str,
    version: &'static str,
    metrics: Metrics,
) -> std::io::Result<(Tracer, Exporter)> {
    let Some(settings) = settings else { return Ok((Tracer::default(), Exporter::idle())) };
    let (sender, queue) = mpsc::channel(QUEUE);
    let tracer = Tracer::new(sender, settings.ratio, settings.per_second, metrics.clone());
    let outbound = Outbound::new(Limits::external(export::TIMEOUT))?;
    Ok((tracer, Exporter::new(queue, outbound, settings, name, version, metrics)))
}

impl Tracer {
    fn new(queue: mpsc::Sender<proto::Span>, ratio: f64, per_second: NonZeroU32, metrics: Metrics) -> Self {
        let bound = || RateLimiter::direct(Quota::per_second(per_second));
        // The conversion saturates: with a ratio of 1, all ids but one are below.
        let below = (ratio * 2f64.powi(64)) as u64;
        Self(Some(Arc::new(Active { queue, metrics, below, own: bound(), requested: bound() })))
    }

    /// The first span of a trace in this process. With a sampled parent it records, within the bound; without a parent, a new trace
    /// may begin, as often as configured.
    pub fn begin(&self, given: Option<TraceContext>, name: &'static str, kind: SpanKind) -> Span {
        let Some(active) = &self.0 else { return Span::NONE };
        let (trace, wanted, bound) = match given {
            Some(given) => (given.trace, given.is_sampled(), &active.requested),
            None => {
                let trace = rand::random_range(1..=u128::MAX);
                (trace, (trace as u64) < active.below, &active.own)
            }
        };
        if !wanted || bound.check().is_err() {
            return Span::NONE;
        }
        let mut span = Span::start(active, trace, given.map(|given| given.span), name, kind);
        span.set_parent_is_remote(given.is_some());
        span
    }

    /// A span below one of this process.
    pub fn child(&self, parent: Option<TraceContext>, name: &'static str, kind: SpanKind) -> Span {
        match (&self.0, parent) {
            (Some(active), Some(parent)) if parent.is_sampled() => {
                Span::start(active, parent.trace, Some(parent.span), name, kind)
            }
            _ => Span::NONE,
        }
    }

    /// The context for downstream services if this trace is not recorded here.
    pub fn pass_on(&self, given: Option<TraceContext>) -> Option<TraceContext> {
        if self.0.is_some() { given.map(TraceContext::unsampled) } else { given }
    }
}

/// A span that ends when it is dropped; empty if its trace is not recorded.
#[derive(Default)]
pub struct Span(Option<Box<Recording>>);

struct Recording {
    context: TraceContext,
    span: proto::Span,
    tracer: Arc<Active>,
}

impl Span {
    pub const NONE: Self = Self(None);

    fn start(
        tracer: &Arc<Active>,
        trace: u128,
        parent: Option<u64>,
        name: &'static str,
        kind: SpanKind,
    ) -> Self {
        let context = TraceContext::sampled(trace);
        let span = proto::Span {
            trace_id: context.trace.to_be_bytes().into(),
            span_id: context.span.to_be_bytes().into(),
            parent_span_id: parent.map_or_else(Vec::new, |parent| parent.to_be_bytes().into()),
            name: name.into(),
            kind: kind.into(),
            start_time_unix_nano: now(),
            ..proto::Span::default()
        };
        Self(Some(Box::new(Recording { context, span, tracer: tracer.clone() })))
    }

    fn set_parent_is_remote(&mut self, remote: bool) {
        if let Some(recording) = &mut self.0 {
            let known = proto::SpanFlags::ContextHasIsRemoteMask as u32;
            let remote = if remote { proto::SpanFlags::ContextIsRemoteMask as u32 } else { 0 };
            recording.span.flags = 1 | known | remote;
        }
    }

    /// The context for child spans. `None`: it does not record.
    pub fn context(&self) -> Option<TraceContext> {
        self.0.as_ref().map(|recording| recording.context)
    }

    /// A span below this one.
    pub fn child(&self, name: &'static str, kind: SpanKind) -> Self {
        let Some(recording) = &self.0 else { return Self::NONE };
        let TraceContext { trace, span, .. } = recording.context;
        Self::start(&recording.tracer, trace, Some(span), name, kind)
    }

    pub fn rename(&mut self, name: impl fmt::Display) {
        if let Some(recording) = &mut self.0 {
            recording.span.name = name.to_string();
        }
    }

    pub fn text(&mut self, key: &'static str, value: impl fmt::Display) {
        if self.0.is_some() {
            self.attribute(key, Value::StringValue(value.to_string()));
        }
    }

    pub fn number(&mut self, key: &'static str, value: u64) {
        self.attribute(key, Value::IntValue(i64::try_from(value).unwrap_or(i64::MAX)));
    }

    fn attribute(&mut self, key: &'static str, value: Value) {
        if let Some(recording) = &mut self.0 {
            recording.span.attributes.push(attribute(key, value));
        }
    }

    /// Marks the span as failed.
    pub fn fail(&mut self, why: impl fmt::Display) {
        if let Some(recording) = &mut self.0 {
            recording.span.status = Some(Status { code: StatusCode::Error.into(), message: why.to_string() });
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let mut span = std::mem::take(&mut self.span);
        // The clock may have been set back.
        span.end_time_unix_nano = now().max(span.start_time_unix_nano);
        let reason = match self.tracer.queue.try_send(span) {
            Ok(()) => return,
            Err(TrySendError::Full(_)) => "queue_full",
            Err(TrySendError::Closed(_)) => "stopping",
        };
        self.tracer.metrics.drop(1, reason);
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Span").field(&self.context()).finish()
    }
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue { key: key.into(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

/// Nanoseconds since 1970.
fn now() -> u64 {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIVEN: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn metrics() -> Metrics {
        Metrics::default()
    }

    fn tracer(ratio: f64, per_second: u32, queue: usize) -> (Tracer, mpsc::Receiver<proto::Span>, Metrics) {
        let (sender, ended) = mpsc::channel(queue);
        let metrics = metrics();
        let per_second = NonZeroU32::new(per_second).unwrap();
        (Tracer::new(sender, ratio, per_second, metrics.clone()), ended, metrics)
    }

    fn given() -> Option<TraceContext> {
        GIVEN.parse().ok()
    }

    #[test]
    fn without_a_collector_contexts_pass_unchanged() {
        let tracer = Tracer::default();
        let span = tracer.begin(given(), "request", SpanKind::Server);
        assert_eq!(span.context(), None);
        assert_eq!(tracer.child(given(), "commit", SpanKind::Client).context(), None);
        assert_eq!(tracer.pass_on(given()), given());
    }

    #[test]
    fn a_span_ends_when_dropped_and_has_its_parent() {
        let (tracer, mut ended, _) = tracer(0.0, 10, 10);
        let mut request = tracer.begin(given(), "request", SpanKind::Server);
        let mut commit = tracer.child(request.context(), "commit", SpanKind::Client);
        let publish = commit.child("publish", SpanKind::Producer);
        commit.fail("the database does not answer");
        request.rename("POST /api");
        request.text("user.id", 7);
        request.number("http.response.status_code", 201);
        drop((publish, commit, request));
        let spans: Vec<_> = std::iter::from_fn(|| ended.try_recv().ok()).collect();
        let names: Vec<_> = spans.iter().map(|span| span.name.as_str()).collect();
        assert_eq!(names, ["publish", "commit", "POST /api"]);
        for (span, parent) in spans.iter().zip(&spans[1..]) {
            assert_eq!(span.parent_span_id, parent.span_id);
            assert!(parent.start_time_unix_nano <= span.start_time_unix_nano);
            assert!(span.end_time_unix_nano <= parent.end_time_unix_nano);
        }
        let root = &spans[2];
        assert_eq!(root.parent_span_id, given().unwrap().span.to_be_bytes());
        assert!(spans.iter().all(|span| span.trace_id == given().unwrap().trace.to_be_bytes()));
        let keys: Vec<_> = root.attributes.iter().map(|attribute| attribute.key.as_str()).collect();
        assert_eq!(keys, ["user.id", "http.response.status_code"]);
        assert_eq!(spans[1].status.as_ref().unwrap().code(), StatusCode::Error);
    }

    #[test]
    fn requested_traces_are_bounded_apart_from_our_own() {
        let (tracer, _ended, _) = tracer(1.0, 5, 1_000);
        let recorded = |given: Option<TraceContext>| {
            (0..100).filter(|_| tracer.begin(given, "request", SpanKind::Server).context().is_some()).count()
        };
        // What a slow machine takes for it refills a little.
        assert!((5..50).contains(&recorded(given())));
        assert!((5..50).contains(&recorded(None)));
        assert!(!tracer.pass_on(given()).unwrap().is_sampled());
        assert_eq!(tracer.pass_on(given()).unwrap().trace, given().unwrap().trace);
    }

    #[test]
    fn new_traces_follow_the_ratio() {
        let began = |ratio| {
            let (tracer, _ended, _) = tracer(ratio, 100_000, 1);
            (0..2_000).filter(|_| tracer.begin(None, "request", SpanKind::Server).context().is_some()).count()
        };
        assert_eq!(began(0.0), 0);
        assert_eq!(began(1.0), 2_000);
        // Six standard deviations.
        assert!((380..620).contains(&began(0.25)));
        let (tracer, _ended, _) = tracer(1.0, 10, 1);
        let unsampled = given().unwrap().unsampled();
        assert_eq!(tracer.begin(Some(unsampled), "request", SpanKind::Server).context(), None);
    }

    #[test]
    fn a_full_queue_drops_and_counts_spans() {
        let (tracer, mut ended, metrics) = tracer(1.0, 100, 3);
        for _ in 0..10 {
            drop(tracer.begin(None, "request", SpanKind::Server));
        }
        assert_eq!(std::iter::from_fn(|| ended.try_recv().ok()).count(), 3);
        assert_eq!(metrics.dropped_spans.get_or_create(&Dropped { reason: "queue_full" }).get(), 7);
    }
}
