//! What this gateway did with one event of one user, for an operator: by which streams it was written, and what the others wait
//! for. It knows its open streams, and the last ones that ended.

use chrono::{DateTime, Utc};
use http::StatusCode;
use protocol::{
    ids::{SessionId, UserId},
    position::{Position, Seq},
};
use serde::Serialize;
use service_kit::explain::{Event, ExplainError, ExplainRequest};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Duration, timeout},
};

use crate::engine::EngineCommand;

/// For the delivery thread, which looks when it has a moment.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    pub user: UserId,
    pub seq: Seq,
    /// In sentences, the most important one first.
    pub says: Vec<String>,
    /// Up to where this user's events were delivered here; absent without a stream, or before Postgres first answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<Position>,
    /// Whether Redis brings what is published for this user.
    pub subscribed: bool,
    /// Oldest first.
    pub streams: Vec<OpenStream>,
    /// Of this user's, the newest first; bounded by what is remembered of everybody's.
    pub ended: Vec<EndedStream>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OpenStream {
    /// As in the log.
    pub connection: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<SessionId>,
    /// It was told what follows this event.
    pub after: Seq,
    /// Up to this one, the last that was written to its socket.
    pub upto: Seq,
    pub says: &'static str,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndedStream {
    pub connection: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<SessionId>,
    pub after: Seq,
    pub upto: Seq,
    pub reason: &'static str,
    pub ended_at: DateTime<Utc>,
    pub says: &'static str,
}

pub async fn explain(
    engine: &mpsc::Sender<EngineCommand>,
    question: ExplainRequest,
) -> Result<Explanation, ExplainError> {
    let ExplainRequest { user, event } = question;
    let Event::Seq(seq) = event else {
        let sentence = "A gateway knows events by seq; api tells the seq of a message's event";
        return Err(ExplainError(StatusCode::BAD_REQUEST, sentence.into()));
    };
    let (answer, answered) = oneshot::channel();
    let asked = async {
        engine.send(EngineCommand::Explain { user, seq, answer }).await.ok()?;
        answered.await.ok()
    };
    let busy =
        || ExplainError(StatusCode::SERVICE_UNAVAILABLE, "The delivery thread does not answer now".into());
    timeout(PATIENCE, asked).await.ok().flatten().ok_or_else(busy)
}
