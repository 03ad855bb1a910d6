//! Traces of requests through both services, exported to an OpenTelemetry collector. Off unless a collector is configured.
//!
//! Requests never wait for the collector: an ended span goes to a bounded queue, or is dropped and counted if that is full.
//! New traces per second are bounded, even if clients request more. An untraced request costs one decision, its events one
//! branch each.
//!
//! Spans contain ids, numbers and names of routes and events, never tokens or message text.

mod context;
mod export;
mod queue;
pub mod settings;

use std::{fmt, num::NonZeroU32, sync::Arc, time::Duration};

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
pub use opentelemetry::trace::SpanKind;
use opentelemetry::{
    Context, InstrumentationScope, KeyValue,
    trace::{Span as _, Status, TraceContextExt as _, Tracer as _, TracerProvider as _},
};
use opentelemetry_sdk::trace::{
    Sampler, SdkTracer, SdkTracerProvider, Span as SdkSpan, SpanLimits, SpanProcessor,
};
use prometheus_client::metrics::{counter::Counter, family::Family};
use tokio::sync::mpsc;

use self::queue::QueueProcessor;
pub use self::{
    context::{InvalidTraceContext, TraceContext},
    export::Exporter,
    settings::TraceSettings,
};
use crate::{
    labels, metrics,
    outbound::{Outbound, OutboundLimits},
};

/// Spans that wait for export, about half a KB each; more are dropped.
const QUEUE: usize = 4_096;
pub const LAST_SPANS: Duration = Duration::from_secs(1);

labels!(DroppedSpans { reason });

metrics! {
    pub struct TraceMetrics {
        exported_spans: Counter = "Spans that the collector accepted";
        dropped_spans: Family<DroppedSpans, Counter> =
            "Spans that the collector did not get: the queue was full, it was unreachable, or it rejected them";
    }
}

impl TraceMetrics {
    fn drop(&self, spans: u64, reason: &'static str) {
        self.dropped_spans.get_or_create(&DroppedSpans { reason }).inc_by(spans);
    }
}

#[derive(Clone, Default)]
pub struct Tracer(Option<Arc<ActiveTracer>>);

struct ActiveTracer {
    tracer: SdkTracer,
    ratio: f64,
    own: DefaultDirectRateLimiter,
    /// Traces that clients request have a bound of their own, so that they cannot use up ours.
    requested: DefaultDirectRateLimiter,
}

/// The tracer of a service and the task that exports its spans. `name` and `version` are those of the program.
///
/// Fails if the system has no trusted certificates.
pub fn start(
    settings: Option<TraceSettings>,
    name: &'static str,
    version: &'static str,
    metrics: TraceMetrics,
) -> std::io::Result<(Tracer, Exporter)> {
    let Some(settings) = settings else { return Ok((Tracer::default(), Exporter::idle())) };
    let (queue, ended) = mpsc::channel(QUEUE);
    let scope = InstrumentationScope::builder(name).with_version(version).build();
    let processor = QueueProcessor { queue, metrics: metrics.clone() };
    let tracer = Tracer::new(processor, scope, settings.ratio, settings.per_second);
    let outbound = Outbound::new(OutboundLimits::external(export::TIMEOUT))?;
    Ok((tracer, Exporter::new(ended, outbound, settings, name, version, metrics)?))
}

impl Tracer {
    fn new(
        processor: impl SpanProcessor + 'static,
        scope: InstrumentationScope,
        ratio: f64,
        per_second: NonZeroU32,
    ) -> Self {
        // Explicit, because the SDK would read the environment: whether to record is decided in `begin`.
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_sampler(Sampler::AlwaysOn)
            .with_span_limits(SpanLimits::default())
            .build();
        let bound = || RateLimiter::direct(Quota::per_second(per_second));
        let tracer = provider.tracer_with_scope(scope);
        Self(Some(Arc::new(ActiveTracer { tracer, ratio, own: bound(), requested: bound() })))
    }

    /// The first span of a trace in this process. With a sampled parent it records, within the bound; without a parent, a new trace
    /// may begin, as often as configured.
    pub fn begin(&self, given: Option<TraceContext>, name: &'static str, kind: SpanKind) -> Span {
        let Some(active) = &self.0 else { return Span::NONE };
        let (wanted, bound) = match given {
            Some(given) => (given.is_sampled(), &active.requested),
            None => (rand::random_bool(active.ratio), &active.own),
        };
        if !wanted || bound.check().is_err() {
            return Span::NONE;
        }
        Span::start(active, given, true, name, kind)
    }

    pub fn child(&self, parent: Option<TraceContext>, name: &'static str, kind: SpanKind) -> Span {
        match (&self.0, parent) {
            (Some(active), Some(parent)) if parent.is_sampled() => {
                Span::start(active, Some(parent), false, name, kind)
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
    span: SdkSpan,
    tracer: Arc<ActiveTracer>,
}

impl Span {
    pub const NONE: Self = Self(None);

    fn start(
        active: &Arc<ActiveTracer>,
        parent: Option<TraceContext>,
        is_remote: bool,
        name: &'static str,
        kind: SpanKind,
    ) -> Self {
        let mut context = Context::new();
        if let Some(parent) = parent {
            context = context.with_remote_span_context(parent.to_span_context(is_remote));
        }
        let builder = active.tracer.span_builder(name).with_kind(kind);
        let span = active.tracer.build_with_context(builder, &context);
        Self(Some(Box::new(Recording { span, tracer: active.clone() })))
    }

    /// The context for child spans. `None`: it does not record.
    pub fn context(&self) -> Option<TraceContext> {
        self.0.as_ref().map(|recording| TraceContext::of(recording.span.span_context()))
    }

    pub fn child(&self, name: &'static str, kind: SpanKind) -> Self {
        match &self.0 {
            Some(recording) => Self::start(&recording.tracer, self.context(), false, name, kind),
            None => Self::NONE,
        }
    }

    pub fn rename(&mut self, name: impl fmt::Display) {
        if let Some(recording) = &mut self.0 {
            recording.span.update_name(name.to_string());
        }
    }

    pub fn text(&mut self, key: &'static str, value: impl fmt::Display) {
        if let Some(recording) = &mut self.0 {
            recording.span.set_attribute(KeyValue::new(key, value.to_string()));
        }
    }

    pub fn number(&mut self, key: &'static str, value: u64) {
        if let Some(recording) = &mut self.0 {
            let value = i64::try_from(value).unwrap_or(i64::MAX);
            recording.span.set_attribute(KeyValue::new(key, value));
        }
    }

    pub fn fail(&mut self, why: impl fmt::Display) {
        if let Some(recording) = &mut self.0 {
            recording.span.set_status(Status::error(why.to_string()));
        }
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Span").field(&self.context()).finish()
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry_sdk::trace::SpanData;

    use super::*;

    const GIVEN: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn metrics() -> TraceMetrics {
        TraceMetrics::default()
    }

    fn tracer(ratio: f64, per_second: u32, queue: usize) -> (Tracer, mpsc::Receiver<SpanData>, TraceMetrics) {
        let (queue, ended) = mpsc::channel(queue);
        let metrics = metrics();
        let per_second = NonZeroU32::new(per_second).unwrap();
        let processor = QueueProcessor { queue, metrics: metrics.clone() };
        (
            Tracer::new(processor, InstrumentationScope::builder("test").build(), ratio, per_second),
            ended,
            metrics,
        )
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
        let names: Vec<_> = spans.iter().map(|span| &*span.name).collect();
        assert_eq!(names, ["publish", "commit", "POST /api"]);
        for (span, parent) in spans.iter().zip(&spans[1..]) {
            assert_eq!(span.parent_span_id, parent.span_context.span_id());
            assert!(parent.start_time <= span.start_time);
            assert!(span.end_time <= parent.end_time);
        }
        let root = &spans[2];
        assert_eq!(root.parent_span_id.to_bytes(), given().unwrap().span.to_be_bytes());
        assert!(root.parent_span_is_remote && !spans[0].parent_span_is_remote);
        assert!(
            spans
                .iter()
                .all(|span| span.span_context.trace_id().to_bytes() == given().unwrap().trace.to_be_bytes())
        );
        let keys: Vec<_> = root.attributes.iter().map(|attribute| attribute.key.as_str()).collect();
        assert_eq!(keys, ["user.id", "http.response.status_code"]);
        assert!(matches!(spans[1].status, Status::Error { .. }));
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
        assert_eq!(metrics.dropped_spans.get_or_create(&DroppedSpans { reason: "queue_full" }).get(), 7);
    }
}
