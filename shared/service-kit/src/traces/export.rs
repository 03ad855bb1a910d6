//! Exports spans by OTLP over HTTP with protobuf, a batch per second. Best effort: spans that the collector does not accept are
//! dropped and counted, and a log line says so at most once a minute.

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

/// For one batch, from connecting to the end of the answer.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);
/// Spans in one batch.
const BATCH: usize = 512;
/// How long the first span of a batch waits for others.
const GATHER: Duration = Duration::from_secs(1);
/// Between two log lines about failures.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// The task that exports spans; idle without a collector.
pub struct Exporter(Option<Sending>);

struct Sending {
    queue: mpsc::Receiver<Span>,
    outbound: Outbound,
    endpoint: Uri,
    headers: HeaderMap,
    resource: Resource,
    scope: InstrumentationScope,
    metrics: Metrics,
    logged_at: Option<Instant>,
    unlogged: u64,
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
        tracing::info!(
            collector,
            ratio = settings.ratio,
            most_per_second = settings.per_second,
            "trace export enabled"
        );
        let (logged_at, unlogged) = (None, 0);
        Self(Some(Sending {
            queue,
            outbound,
            endpoint,
            headers,
            resource,
            scope,
            metrics,
            logged_at,
            unlogged,
        }))
    }

    /// Runs until `stop`, then exports the rest of the queue; the caller bounds how long that may take.
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
    /// The next batch. Empty: stopped, and nothing is left.
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
                    self.count_dropped(refused, "refused", "it rejected some of them");
                }
            }
            Err(error) => self.count_dropped(count, "failed", &error),
        }
    }

    /// How many spans the collector rejected.
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
            return Err(format!("status {}", answer.status()));
        }
        // Without a partial success, all were accepted.
        let answer = ExportTraceServiceResponse::decode(&answer.body()[..]).unwrap_or_default();
        Ok(answer.partial_success.map_or(0, |partial| partial.rejected_spans))
    }

    fn count_dropped(&mut self, spans: u64, reason: &'static str, error: &str) {
        self.metrics.drop(spans, reason);
        self.unlogged += spans;
        if self.logged_at.is_none_or(|at| at.elapsed() > LOG_INTERVAL) {
            tracing::warn!(spans = self.unlogged, error, "trace export failed; spans are dropped");
            (self.logged_at, self.unlogged) = (Some(Instant::now()), 0);
        }
    }
}
