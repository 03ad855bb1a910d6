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

/// An envelope that came here, encoded, and traced where its request is.
pub fn receive(
    tracer: &Tracer,
    user: UserId,
    envelope: &Envelope,
    way: DeliveryPath,
) -> Result<Event, BadEnvelope> {
    let event = Event::encode(envelope)?;
    let traced = Traced::begin(tracer, user, envelope, way);
    tracing::debug!(
        user.id = %user,
        event.seq = envelope.seq,
        request.id = envelope.request_id,
        trace.id = traced.as_ref().and_then(|traced| traced.span.context()).map(TraceContext::trace_id),
        path = way.as_str(),
        "an event came"
    );
    Ok(Event { traced, ..event })
}

#[derive(Debug)]
pub struct Traced {
    span: Span,
    way: DeliveryPath,
    /// Which flush of a group is the one that is recorded: drawn per event, so that each has the same chance.
    drawn: u64,
    flushes: AtomicU64,
}

/// A flush that has begun. It ends when it is dropped; by then the event is not done with.
#[derive(Debug)]
pub struct Flush {
    span: Span,
    _event: Arc<Traced>,
}

impl Traced {
    /// `None`, mostly: the event belongs to no trace that is recorded.
    fn begin(tracer: &Tracer, user: UserId, envelope: &Envelope, way: DeliveryPath) -> Option<Arc<Self>> {
        let given: TraceContext = envelope.traceparent.as_deref()?.parse().ok()?;
        let mut span = tracer.begin(Some(given), "deliver", SpanKind::Consumer);
        span.context()?;
        span.text("messaging.system", if way == DeliveryPath::Redis { "redis" } else { "feed" });
        span.text("path", way.as_str());
        span.text("user.id", user);
        span.number("event.seq", envelope.seq);
        span.text("event.name", &envelope.event);
        Some(Arc::new(Self { span, way, drawn: given.span, flushes: AtomicU64::new(0) }))
    }

    /// The event is about to be written to one of the user's `streams`.
    pub fn flush(self: &Arc<Self>, streams: usize, connection: u32) -> Option<Flush> {
        let one_in = streams.div_ceil(FLUSHES).max(1) as u64;
        let number = self.flushes.fetch_add(1, Ordering::Relaxed);
        if number % one_in != self.drawn % one_in {
            return None;
        }
        let mut span = self.span.child("flush", SpanKind::Internal);
        span.text("path", self.way.as_str());
        span.number("connection", connection.into());
        span.number("stands_for", one_in);
        Some(Flush { span, _event: self.clone() })
    }
}

impl Drop for Traced {
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
