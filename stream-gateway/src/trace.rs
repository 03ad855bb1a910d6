//! An event of a recorded trace on its way through this gateway: the span of its delivery, from when it came until nobody here
//! needs it any more, and below it a span for each flush to a socket.
//!
//! The more streams a user has, the fewer of their flushes are recorded: [`FLUSHES`] at most, spread evenly, each with the
//! number of flushes that it stands for. Most events have none of this, and pay a branch.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use protocol::{event::Envelope, ids::UserId};
use service_kit::traces::{Span, SpanKind, TraceContext, Tracer};

use crate::{
    frame::{BadEnvelope, Event},
    metrics::DeliveryPath,
};

/// Of one event to one user, so many flushes are recorded at most.
pub const FLUSHES: usize = 8;

/// An envelope that came here, encoded, and trace where its request is.
pub fn receive(
    tracer: &Tracer,
    user: UserId,
    envelope: &Envelope,
    path: DeliveryPath,
) -> Result<Event, BadEnvelope> {
    let event = Event::encode(envelope)?;
    let trace = DeliveryTrace::begin(tracer, user, envelope, path);
    tracing::debug!(
        user.id = %user,
        event.seq = envelope.seq,
        request.id = envelope.request_id,
        trace.id = trace.as_ref().and_then(|trace| trace.span.context()).map(TraceContext::trace_id),
        path = path.as_str(),
        "an event came"
    );
    Ok(Event { trace, ..event })
}

#[derive(Debug)]
pub struct DeliveryTrace {
    span: Span,
    path: DeliveryPath,
    /// Which flush of a group is the one that is recorded: drawn per event, so that each has the same chance.
    drawn: u64,
    flushes: AtomicU64,
}

/// A flush that has begun. It ends when it is dropped; by then the event is not done with.
#[derive(Debug)]
pub struct Flush {
    span: Span,
    _event: Arc<DeliveryTrace>,
}

impl DeliveryTrace {
    /// `None`, mostly: the event belongs to no trace that is recorded.
    fn begin(tracer: &Tracer, user: UserId, envelope: &Envelope, path: DeliveryPath) -> Option<Arc<Self>> {
        let given: TraceContext = envelope.traceparent.as_deref()?.parse().ok()?;
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
