//! Explains to an operator what the feed knows about one event of one user: whether and when it was written, by which request,
//! whether it is still kept.

use http::StatusCode;
use protocol::{
    ids::UserId,
    position::{Epoch, Position, Seq},
};
use serde::Serialize;
use service_kit::explain::{ExplainError, ExplainRequest, RequestedEvent};

use crate::{
    metrics::Metrics,
    store::{
        Database, StoreError,
        feed::{self, FeedSummary, StoredEvent},
    },
};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FeedExplanation {
    pub user: UserId,
    pub username: String,
    /// Sentences, the most important one first.
    pub says: Vec<String>,
    pub feed: KeptFeed,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub event: Option<StoredEvent>,
}

#[derive(Serialize)]
pub struct KeptFeed {
    pub epoch: Epoch,
    /// The oldest event that is kept; absent when none is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<Seq>,
    pub head: Seq,
}

pub async fn explain(
    database: &Database,
    metrics: &Metrics,
    request: ExplainRequest,
) -> Result<FeedExplanation, ExplainError> {
    let ExplainRequest { user, event } = request;
    let found = database.run(async |connection| feed::look_up(connection, user, event).await).await;
    let found = found.map_err(|error| {
        tracing::warn!(%error, "explain failed");
        match error {
            StoreError::Unavailable(_) | StoreError::Crowded => {
                ExplainError(StatusCode::SERVICE_UNAVAILABLE, "Postgres does not answer".into())
            }
            StoreError::Fault(_) => ExplainError(
                StatusCode::INTERNAL_SERVER_ERROR,
                "The query failed; the log has the error".into(),
            ),
        }
    })?;
    let Some(FeedSummary { username, head, first, event: written }) = found else {
        return Err(ExplainError(StatusCode::NOT_FOUND, format!("There is no user {user}")));
    };
    let mut says = vec![sentence(event, head, first, written.as_ref())];
    if written.is_some() {
        says.push("Gateways know whether it was delivered: query each of them, by seq".into());
        if metrics.redis_connected.get() == 0 {
            says.push(
                "This replica has no connection to Redis, so gateways get new events by reconciliation"
                    .into(),
            );
        }
    }
    Ok(FeedExplanation {
        user,
        username,
        says,
        feed: KeptFeed { epoch: head.epoch, first, head: head.seq },
        event: written,
    })
}

fn sentence(
    event: RequestedEvent,
    head: Position,
    first: Option<Seq>,
    written: Option<&StoredEvent>,
) -> String {
    match (event, written) {
        (_, Some(StoredEvent { seq, name, created_at, .. })) => format!(
            "Event {seq} ({name}) was written at {created_at:?} and is kept: clients with the cursor {} receive it",
            seq - 1,
        ),
        (RequestedEvent::Seq(seq), None) if seq > head.seq => format!(
            "Event {seq} was never written: the feed ends at {}. A client with this cursor has a position in another history (a \
             restored backup), and gets a resync",
            head.seq,
        ),
        (RequestedEvent::Seq(seq), None) => format!(
            "Event {seq} was written and has been pruned: {}. A client that needs it gets a resync and reloads by REST",
            match first {
                Some(first) => format!("the feed begins at {first}"),
                None => "no event of this feed is kept".into(),
            },
        ),
        (RequestedEvent::Message(message), None) => format!(
            "No event of this feed is about message {message}: the user is no participant of its conversation, had blocked its \
             sender, the message does not exist, or the event has been pruned"
        ),
    }
}
