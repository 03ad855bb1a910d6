//! Spans to the collector: OTLP over HTTP, protobuf, a batch a second. Best effort: what a collector does not take at once is
//! dropped and counted, and a log line says so once in a while.

use std::time::Duration;

use http::{HeaderMap, HeaderValue, Request, Uri, header};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::{InstrumentationScope, any_value::Value},
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans, Span},
};
use prost::Message;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{Metrics, Settings, attribute};
use crate::outbound::Outbound;

/// For one batch to be taken, from connecting to the answer's end.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);
/// Spans in one batch.
const BATCH: usize = 512;
/// How long the first span of a batch waits for others.
const GATHER: Duration = Duration::from_secs(1);
/// A collector that is away stays away for a while; its log line does not say so every second.
const TOLD_EVERY: Duration = Duration::from_secs(60);

/// The task that sends spans; without a collector it has nothing to do.
pub struct Exporter(Option<Sending>);

struct Sending {
    queue: mpsc::Receiver<Span>,
    outbound: Outbound,
    endpoint: Uri,
    headers: HeaderMap,
    resource: Resource,
    scope: InstrumentationScope,
    metrics: Metrics,
    told: Option<Instant>,
    untold: u64,
}

impl Exporter {
    pub(super) fn idle() -> Self {
        Self(None)
    }

    pub(super) fn new(
        queue: mpsc::Receiver<Span>,
        outbound: Outbound,
        settings: Settings,
        name: &'static str,
        version: &'static str,
        metrics: Metrics,
    ) -> Self {
        let Settings { endpoint, mut headers, .. } = settings;
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
        let text = |key, value: &str| attribute(key, Value::StringValue(value.into()));
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let resource = Resource {
            attributes: vec![
                text("service.namespace", "messenger"),
                text("service.name", name),
                text("service.version", version),
                text("service.instance.id", &uuid::Uuid::new_v4().to_string()),
                text("host.name", host.trim()),
            ],
            ..Resource::default()
        };
        let scope = InstrumentationScope {
            name: name.into(),
            version: version.into(),
            ..InstrumentationScope::default()
        };
        let collector = endpoint.authority().map_or("", |authority| authority.as_str());
        tracing::info!(collector, ratio = settings.ratio, most_per_second = settings.per_second, "tracing");
        let (told, untold) = (None, 0);
        Self(Some(Sending { queue, outbound, endpoint, headers, resource, scope, metrics, told, untold }))
    }

    /// Runs until `stop`, then sends what is still queued. How long that may take is the caller's to bound.
    pub async fn run(self, stop: CancellationToken) {
        if let Some(mut sending) = self.0 {
            loop {
                let batch = sending.gather(&stop).await;
                if batch.is_empty() {
                    break;
                }
                sending.export(batch).await;
            }
        }
        stop.cancelled().await;
    }
}

impl Sending {
    /// Waits for spans, and a moment for more. None: stopped, and nothing is left.
    async fn gather(&mut self, stop: &CancellationToken) -> Vec<Span> {
        let mut batch = Vec::new();
        let mut until = None;
        while batch.len() < BATCH {
            let (room, moment) = (BATCH - batch.len(), until.unwrap_or_else(Instant::now));
            tokio::select! {
                taken = self.queue.recv_many(&mut batch, room) => {
                    if taken == 0 {
                        break;
                    }
                    until.get_or_insert_with(|| Instant::now() + GATHER);
                }
                () = sleep_until(moment), if until.is_some() => break,
                () = stop.cancelled(), if !self.queue.is_closed() => self.queue.close(),
            }
        }
        batch
    }

    async fn export(&mut self, spans: Vec<Span>) {
        let count = spans.len() as u64;
        match self.send(spans).await {
            Ok(refused) => {
                // A number from outside.
                let refused = u64::try_from(refused).unwrap_or(0).min(count);
                self.metrics.exported_spans.inc_by(count - refused);
                if refused > 0 {
                    self.tell(refused, "refused", "it refused some of them");
                }
            }
            Err(error) => self.tell(count, "failed", &error),
        }
    }

    /// How many of them the collector says it refused.
    async fn send(&self, spans: Vec<Span>) -> Result<i64, String> {
        let scope_spans = ScopeSpans { scope: Some(self.scope.clone()), spans, schema_url: String::new() };
        let resource_spans = ResourceSpans {
            resource: Some(self.resource.clone()),
            scope_spans: vec![scope_spans],
            schema_url: String::new(),
        };
        let body = ExportTraceServiceRequest { resource_spans: vec![resource_spans] }.encode_to_vec();
        let mut request =
            Request::post(self.endpoint.clone()).body(body).map_err(|error| error.to_string())?;
        *request.headers_mut() = self.headers.clone();
        let answer = self.outbound.send(request).await.map_err(|error| error.to_string())?;
        if !answer.status().is_success() {
            return Err(format!("it answered {}", answer.status()));
        }
        // One that says nothing of the kind took all.
        let answer = ExportTraceServiceResponse::decode(&answer.body()[..]).unwrap_or_default();
        Ok(answer.partial_success.map_or(0, |partial| partial.rejected_spans))
    }

    fn tell(&mut self, spans: u64, reason: &'static str, error: &str) {
        self.metrics.drop(spans, reason);
        self.untold += spans;
        if self.told.is_none_or(|told| told.elapsed() > TOLD_EVERY) {
            tracing::warn!(spans = self.untold, error, "the collector did not take spans; they are dropped");
            (self.told, self.untold) = (Some(Instant::now()), 0);
        }
    }
}
