//! The trace of one event through this gateway: a span from its arrival until its last flush, and a child span for each flush
//! to a socket.
//!
//! At most [`FLUSHES`] flushes of an event are recorded, spread evenly over the user's streams; each records how many it
//! stands for.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use protocol::{event::EnvelopeRef, ids::UserId};
use service_kit::traces::{Span, SpanKind, TraceContext, Tracer};

use crate::metrics::DeliveryPath;

/// Recorded flushes of one event to one user, at most.
pub const FLUSHES: usize = 8;

#[derive(Debug)]
pub struct DeliveryTrace {
    span: Span,
    path: DeliveryPath,
    /// Selects the recorded flush of each group: random per event, so that each stream has the same chance.
    drawn: u64,
    flushes: AtomicU64,
}

/// A flush in progress. It ends on drop and keeps the span of its event open until then.
#[derive(Debug)]
pub struct Flush {
    span: Span,
    _event: Arc<DeliveryTrace>,
}

impl DeliveryTrace {
    pub fn context(&self) -> Option<TraceContext> {
        self.span.context()
    }

    /// Returns a trace only if the event is traced.
    pub fn begin(
        tracer: &Tracer,
        user: UserId,
        envelope: &EnvelopeRef<'_>,
        path: DeliveryPath,
    ) -> Option<Arc<Self>> {
        let given: TraceContext = envelope.traceparent.as_ref()?.0.parse().ok()?;
        let mut span = tracer.begin(Some(given), "deliver", SpanKind::Consumer);
        span.context()?;
        span.text("messaging.system", if path == DeliveryPath::Redis { "redis" } else { "feed" });
        span.text("path", path.as_str());
        span.text("user.id", user);
        span.number("event.seq", envelope.seq);
        span.text("event.name", &envelope.event);
        Some(Arc::new(Self { span, path, drawn: given.span, flushes: AtomicU64::new(0) }))
    }

    /// The event is about to be written to one of the user's `streams`.
    pub fn flush(self: &Arc<Self>, streams: usize, connection: u32) -> Option<Flush> {
        let one_in = streams.div_ceil(FLUSHES).max(1) as u64;
        let number = self.flushes.fetch_add(1, Ordering::Relaxed);
        if number % one_in != self.drawn % one_in {
            return None;
        }
        let mut span = self.span.child("flush", SpanKind::Internal);
        span.text("path", self.path.as_str());
        span.number("connection", connection.into());
        span.number("stands_for", one_in);
        Some(Flush { span, _event: self.clone() })
    }
}

impl Drop for DeliveryTrace {
    fn drop(&mut self) {
        self.span.number("flushes", *self.flushes.get_mut());
    }
}

impl Flush {
    /// The socket will never take the rest.
    pub fn fail(mut self, why: &str) {
        self.span.fail(why);
    }
}
