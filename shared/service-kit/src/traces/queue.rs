//! The span processor: it puts each ended span into a bounded queue, or drops and counts it if the queue is full.

use std::{fmt, time::Duration};

use opentelemetry::Context;
use opentelemetry_sdk::{
    error::OTelSdkResult,
    trace::{Span, SpanData, SpanProcessor},
};
use tokio::sync::mpsc::{self, error::TrySendError};

use super::TraceMetrics;

pub(super) struct QueueProcessor {
    pub(super) queue: mpsc::Sender<SpanData>,
    pub(super) metrics: TraceMetrics,
}

impl fmt::Debug for QueueProcessor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("QueueProcessor")
    }
}

impl SpanProcessor for QueueProcessor {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, mut span: SpanData) {
        // The clock may have been set back.
        span.end_time = span.end_time.max(span.start_time);
        match self.queue.try_send(span) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => self.metrics.drop(1, "queue_full"),
            Err(TrySendError::Closed(_)) => self.metrics.drop(1, "stopping"),
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}
