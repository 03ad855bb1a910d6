//! What the feed says about one event of one user, for an operator: was it written, when, by which request, is it still kept?

use http::StatusCode;
use protocol::{
    ids::UserId,
    position::{Epoch, Position, Seq},
};
use serde::Serialize;
use service_kit::explain::{Event, Question, Refusal};

use crate::{
    metrics::Metrics,
    store::{
        Database,
        feed::{self, LookedUp, Written},
    },
};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    pub user: UserId,
    pub username: String,
    /// In sentences, the most important one first.
    pub says: Vec<String>,
    pub feed: Kept,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub event: Option<Written>,
}

/// What there is of the feed.
#[derive(Serialize)]
pub struct Kept {
    pub epoch: Epoch,
    /// The oldest event that is kept; absent when none is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<Seq>,
    pub head: Seq,
}

pub async fn explain(
    database: &Database,
    metrics: &Metrics,
    question: Question,
) -> Result<Explanation, Refusal> {
    let Question { user, event } = question;
    let found = database.run(async |connection| feed::look_up(connection, user, event).await).await;
    let found = found.map_err(|error| {
        tracing::warn!(%error, "an operator's question could not be answered");
        Refusal(StatusCode::SERVICE_UNAVAILABLE, "Postgres does not answer".into())
    })?;
    let Some(LookedUp { username, head, first, event: written }) = found else {
        return Err(Refusal(StatusCode::NOT_FOUND, format!("There is no user {user}")));
    };
    let mut says = vec![sentence(event, head, first, written.as_ref())];
    if written.is_some() {
        says.push(
            "Whether it has reached a screen is known to the gateways: ask each of them the same, by seq"
                .into(),
        );
        if metrics.redis_connected.get() == 0 {
            says.push("This replica cannot publish now, so gateways hear of new events by asking".into());
        }
    }
    Ok(Explanation {
        user,
        username,
        says,
        feed: Kept { epoch: head.epoch, first, head: head.seq },
        event: written,
    })
}

fn sentence(event: Event, head: Position, first: Option<Seq>, written: Option<&Written>) -> String {
    match (event, written) {
        (_, Some(Written { seq, name, created_at, .. })) => format!(
            "Event {seq} ({name}) was written at {created_at:?} and is kept: whoever asks for what follows {} is told it",
            seq - 1,
        ),
        (Event::Seq(seq), None) if seq > head.seq => format!(
            "Event {seq} was never written: the feed ends at {}. A client that says it has it is from a history that was lost (a \
             restored backup), and is told resync",
            head.seq,
        ),
        (Event::Seq(seq), None) => format!(
            "Event {seq} was written and is not kept any more: {}. Whoever asks for it is told resync, and reads by REST",
            match first {
                Some(first) => format!("the feed begins at {first}"),
                None => "nothing of this feed is".into(),
            },
        ),
        (Event::Message(message), None) => format!(
            "No event of this feed is about message {message}: the user takes no part in its conversation, had blocked its sender, \
             the message does not exist, or the event is not kept any more"
        ),
    }
}
