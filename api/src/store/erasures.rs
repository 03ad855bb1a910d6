//! Erasing users: begun by one statement, and finished in steps that any replica takes.

use protocol::{
    event::kind,
    ids::{ConversationId, MessageId, SessionId, UserId},
};
use sqlx::PgConnection;

use super::{
    Appended, AppendedTo, envelope, envelopes, position, to_json, unexpected,
    users::{MOST_TOLD, SMALL_GROUP},
};
use crate::{
    domain::{
        conversation::Role,
        event::{Event, MessageDeleted, ParticipantLeft, ParticipantUpdated},
        user::User,
    },
    request_context::RequestContext,
};

#[derive(Debug, PartialEq, Eq)]
pub enum EraseUserOutcome {
    /// These sessions have ended.
    Begun(Vec<SessionId>),
    /// Earlier.
    Erased,
    NoUser,
}

pub async fn begin(
    connection: &mut PgConnection,
    user: UserId,
    request: &RequestContext,
) -> sqlx::Result<(EraseUserOutcome, Vec<Appended>)> {
    let row = sqlx::query!(
        r#"SELECT outcome AS "outcome!", sessions, event_at, receivers, epochs, seqs
           FROM messenger.erase_user($1, $2, $3, $4, $5)"#,
        user.0,
        SMALL_GROUP,
        MOST_TOLD,
        request.request_id,
        request.traceparent(),
    )
    .fetch_one(connection)
    .await?;
    match (row.outcome.as_str(), row.event_at) {
        ("begun", Some(at)) => {
            let appended = AppendedTo { receivers: row.receivers, epochs: row.epochs, seqs: row.seqs };
            let event = Event::UserUpdated(User::stored(user.0, None, None));
            let sessions = row.sessions.unwrap_or_default().into_iter().map(SessionId).collect();
            Ok((EraseUserOutcome::Begun(sessions), envelopes(appended.positions()?, &event, at, request)?))
        }
        ("erased", _) => Ok((EraseUserOutcome::Erased, Vec::new())),
        ("no_user", _) => Ok((EraseUserOutcome::NoUser, Vec::new())),
        _ => Err(unexpected(&row.outcome)),
    }
}

#[derive(Debug)]
pub struct ErasedMessages {
    pub user: UserId,
    pub conversation: ConversationId,
    pub messages: u64,
    pub events: Vec<Appended>,
}

/// SQL `erase_messages()`: the next step in some conversation. `None`: there is none to take.
pub async fn erase_messages(
    connection: &mut PgConnection,
    scan: i64,
    most_events: i64,
) -> sqlx::Result<Option<ErasedMessages>> {
    let rows = sqlx::query!(
        r#"SELECT erased_user AS "erased_user!", conversation_id AS "conversation_id!", deleted, kind, message_id, about, event_at,
                  receiver, unread_count, epoch, seq
           FROM messenger.erase_messages($1, $2)"#,
        scan,
        most_events,
    )
    .fetch_all(connection)
    .await?;
    let Some(last) = rows.last() else { return Ok(None) };
    let (user, conversation_id) = (UserId(last.erased_user), ConversationId(last.conversation_id));
    let messages = last.deleted.unwrap_or(0).cast_unsigned();
    let mut events = Vec::with_capacity(rows.len());
    for row in &rows {
        let Some(name) = row.kind.as_deref() else { continue };
        let incomplete = || unexpected(name);
        let about = || row.about.map(UserId).ok_or_else(incomplete);
        let at = row.event_at.ok_or_else(incomplete)?;
        let event = match name {
            kind::MESSAGE_DELETED => Event::MessageDeleted(MessageDeleted {
                id: row.message_id.map(MessageId).ok_or_else(incomplete)?,
                conversation_id,
                deleted_at: at,
                unread_count: row.unread_count.ok_or_else(incomplete)?,
            }),
            kind::PARTICIPANT_LEFT => {
                Event::ParticipantLeft(ParticipantLeft { conversation_id, user_id: about()? })
            }
            kind::PARTICIPANT_UPDATED => Event::ParticipantUpdated(ParticipantUpdated {
                conversation_id,
                user_id: about()?,
                role: Role::Owner,
            }),
            _ => return Err(incomplete()),
        };
        let (epoch, seq) = row.epoch.zip(row.seq).ok_or_else(incomplete)?;
        let position = position(epoch, seq)?;
        let envelope = envelope(position, event.name(), to_json(&event)?, at, None, None);
        events.push(Appended { receiver: row.receiver.map(UserId).ok_or_else(incomplete)?, envelope });
    }
    Ok(Some(ErasedMessages { user, conversation: conversation_id, messages, events }))
}

/// SQL `finish_erasure()`: the end of one user, in statements of at most `most` rows. `None`: there is nobody to finish. `true`: nothing of
/// them is left.
pub async fn finish(connection: &mut PgConnection, most: i64) -> sqlx::Result<Option<(UserId, bool)>> {
    let row = sqlx::query!("SELECT erased_user, finished FROM messenger.finish_erasure($1)", most)
        .fetch_one(connection)
        .await?;
    Ok(row.erased_user.map(UserId).zip(row.finished))
}
