//! One event of one feed, encoded.

use std::sync::Arc;

use protocol::{event::EnvelopeRef, ids::UserId, position::Position};
use service_kit::traces::{TraceContext, Tracer};

use crate::{
    frame::{self, Chunk, InvalidEnvelope},
    metrics::DeliveryPath,
    trace::DeliveryTrace,
};

#[derive(Debug, Clone)]
pub struct EncodedEvent {
    pub position: Position,
    /// Milliseconds since 1970, by the database's clock.
    pub created_at: i64,
    pub frame: Chunk,
    /// Delivery path.
    pub path: DeliveryPath,
    /// Only if the event is traced.
    pub trace: Option<Arc<DeliveryTrace>>,
}

impl EncodedEvent {
    /// Encodes an envelope that reached this gateway and begins its trace.
    pub fn receive(
        tracer: &Tracer,
        user: UserId,
        envelope: &EnvelopeRef<'_>,
        path: DeliveryPath,
    ) -> Result<Self, InvalidEnvelope> {
        let frame = frame::encode(envelope)?;
        let trace = DeliveryTrace::begin(tracer, user, envelope, path);
        tracing::debug!(
            user.id = %user,
            event.seq = envelope.seq,
            request.id = envelope.request_id.as_ref().map(|id| &*id.0),
            trace.id = trace.as_ref().and_then(|trace| trace.context()).map(TraceContext::trace_id),
            path = path.as_str(),
            "event received"
        );
        let created_at = envelope.created_at.timestamp_millis();
        Ok(Self { position: envelope.cursor(), created_at, frame, path, trace })
    }
}
