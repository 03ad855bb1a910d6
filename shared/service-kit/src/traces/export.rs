//! Exports spans by OTLP over HTTP with protobuf, a batch per second. Best effort: spans that the collector does not accept are
//! dropped and counted, and a log line says so at most once a minute.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, Request, Response, header};
use opentelemetry::KeyValue;
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, RetryPolicy, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanExporter as _},
};
use prost::Message;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{TraceMetrics, TraceSettings};
use crate::outbound::Outbound;

/// Limits one batch, from connecting to the end of the answer.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);
const BATCH: usize = 512;
/// The first span of a batch waits this long for others.
const GATHER: Duration = Duration::from_secs(1);
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// The task that exports spans; idle without a collector.
pub struct Exporter(Option<Sending>);

struct Sending {
    queue: mpsc::Receiver<SpanData>,
    exporter: SpanExporter,
    rejected: Arc<AtomicI64>,
    metrics: TraceMetrics,
    logged_at: Option<Instant>,
    unlogged: u64,
}

/// Sends the requests of the SDK, and reads from the answers how many spans were rejected, which the SDK only logs.
#[derive(Debug)]
struct CollectorClient {
    outbound: Outbound,
    headers: HeaderMap,
    rejected: Arc<AtomicI64>,
}

#[async_trait]
impl HttpClient for CollectorClient {
    async fn send_bytes(&self, mut request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        request.headers_mut().extend(self.headers.clone());
        let answer = self.outbound.send(request).await?;
        // Without a partial success, all were accepted.
        let body = ExportTraceServiceResponse::decode(answer.body().clone()).unwrap_or_default();
        let rejected = body.partial_success.map_or(0, |partial| partial.rejected_spans);
        self.rejected.store(rejected, Ordering::Relaxed);
        Ok(answer)
    }
}

impl Exporter {
    pub(super) fn idle() -> Self {
        Self(None)
    }

    pub(super) fn new(
        queue: mpsc::Receiver<SpanData>,
        outbound: Outbound,
        settings: TraceSettings,
        name: &'static str,
        version: &'static str,
        metrics: TraceMetrics,
    ) -> io::Result<Self> {
        let TraceSettings { endpoint, mut headers, ratio, per_second } = settings;
        headers.remove(header::CONTENT_TYPE);
        let rejected = Arc::new(AtomicI64::new(0));
        let mut exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(CollectorClient { outbound, headers, rejected: rejected.clone() })
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(endpoint.to_string())
            .with_timeout(TIMEOUT)
            .with_retry_policy(RetryPolicy::default().with_max_retries(0))
            .build()
            .map_err(io::Error::other)?;
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let resource = Resource::builder_empty().with_attributes([
            KeyValue::new("service.namespace", "messenger"),
            KeyValue::new("service.name", name),
            KeyValue::new("service.version", version),
            KeyValue::new("service.instance.id", uuid::Uuid::new_v4().to_string()),
            KeyValue::new("host.name", host.trim().to_owned()),
        ]);
        exporter.set_resource(&resource.build());
        let collector = endpoint.authority().map_or("", |authority| authority.as_str());
        tracing::info!(collector, ratio, most_per_second = per_second, "trace export enabled");
        let (logged_at, unlogged) = (None, 0);
        Ok(Self(Some(Sending { queue, exporter, rejected, metrics, logged_at, unlogged })))
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
    async fn gather(&mut self, stop: &CancellationToken) -> Vec<SpanData> {
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

    async fn export(&mut self, spans: Vec<SpanData>) {
        let count = spans.len() as u64;
        if let Err(error) = self.exporter.export(spans).await {
            return self.count_dropped(count, "failed", &error.to_string());
        }
        // Untrusted, so it is bounded.
        let rejected = u64::try_from(self.rejected.swap(0, Ordering::Relaxed)).unwrap_or(0).min(count);
        self.metrics.exported_spans.inc_by(count - rejected);
        if rejected > 0 {
            self.count_dropped(rejected, "refused", "the collector rejected some of them");
        }
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
