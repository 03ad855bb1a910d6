//! Messages of a conversation, and how far its users have read.

use chrono::{DateTime, Utc};
use protocol::ids::{ConversationId, MessageId, SessionId, UserId};
use sqlx::PgConnection;

use super::{Appended, CommandOutput, CommandRow};
use crate::{
    domain::message::{Content, IdempotencyKey, Message},
    request_context::RequestContext,
};

#[derive(Debug)]
pub enum PostMessageOutcome {
    Sent(Message),
    /// The same key and content as before: the message that was posted then.
    Replayed(Message),
    KeyConflict,
    NoConversation,
    NoSession,
}

pub async fn post(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    sender: UserId,
    conversation: ConversationId,
    content: &Content,
    key: Option<&IdempotencyKey>,
    request: &RequestContext,
) -> sqlx::Result<(PostMessageOutcome, Vec<Appended>)> {
    let rows = sqlx::query_as!(
        CommandRow,
        r#"SELECT outcome AS "outcome!", message_id AS subject, created_at AS subject_at,
                  receiver, epoch, seq, kind, payload, event_at
           FROM messenger.post_message($1, $2, $3, $4, $5, $6, $7)"#,
        session.map(|session| session.0),
        sender.0,
        conversation.0,
        content.as_str(),
        key.map(IdempotencyKey::as_str),
        request.request_id,
        request.traceparent(),
    )
    .fetch_all(connection)
    .await?;
    let output = CommandOutput::from_rows(rows, request)?;
    let message = |(id, created_at)| Message {
        id: MessageId(id),
        content: content.as_str().to_owned(),
        conversation_id: Some(conversation),
        created_at,
        mine: true,
    };
    let outcome = match (output.outcome.as_str(), output.subject.zip(output.subject_at).map(message)) {
        ("posted", Some(message)) => PostMessageOutcome::Sent(message),
        ("replayed", Some(message)) => PostMessageOutcome::Replayed(message),
        ("key_conflict", _) => PostMessageOutcome::KeyConflict,
        ("no_conversation", _) => PostMessageOutcome::NoConversation,
        ("no_session", _) => PostMessageOutcome::NoSession,
        _ => return Err(output.unexpected()),
    };
    Ok((outcome, output.events))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MarkReadOutcome {
    Moved,
    Unmoved,
    NoConversation,
    NoSession,
}

/// SQL `mark_read()`: up to the message `to`, or the last one.
pub async fn mark_read(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    reader: UserId,
    conversation: ConversationId,
    to: Option<MessageId>,
    request: &RequestContext,
) -> sqlx::Result<(MarkReadOutcome, Vec<Appended>)> {
    let rows = sqlx::query_as!(
        CommandRow,
        r#"SELECT outcome AS "outcome!", NULL::bigint AS subject, NULL::timestamptz AS subject_at,
                  receiver, epoch, seq, kind, payload, event_at
           FROM messenger.mark_read($1, $2, $3, $4, $5, $6)"#,
        session.map(|session| session.0),
        reader.0,
        conversation.0,
        to.map(|id| id.0),
        request.request_id,
        request.traceparent(),
    )
    .fetch_all(connection)
    .await?;
    let output = CommandOutput::from_rows(rows, request)?;
    let outcome = match output.outcome.as_str() {
        "moved" => MarkReadOutcome::Moved,
        "unmoved" => MarkReadOutcome::Unmoved,
        "no_conversation" => MarkReadOutcome::NoConversation,
        "no_session" => MarkReadOutcome::NoSession,
        _ => return Err(output.unexpected()),
    };
    Ok((outcome, output.events))
}

/// The messages between two ids, both exclusive.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    pub after: Option<MessageId>,
    pub before: Option<MessageId>,
    pub limit: i64,
}

#[derive(Debug)]
pub struct MessagePage {
    /// The newest first; with `after`, the oldest first.
    pub messages: Vec<Message>,
    pub last_read: Option<MessageId>,
}

struct MessageRow {
    last_read_message_id: Option<i64>,
    id: Option<i64>,
    content: Option<String>,
    created_at: Option<DateTime<Utc>>,
    mine: Option<bool>,
}

/// `None`: not a conversation of the reader. One row without a message: the window is empty.
///
/// Hidden messages are skipped one by one, so a page also costs those between its messages.
pub async fn page(
    connection: &mut PgConnection,
    conversation: ConversationId,
    reader: UserId,
    window: Window,
) -> sqlx::Result<Option<MessagePage>> {
    // Both bounds are always set, so that every plan uses the index. Ids are positive.
    let above = window.after.map_or(0, |id| id.0);
    let below = window.before.map_or(i64::MAX, |id| id.0);
    let rows = if window.after.is_none() {
        sqlx::query_as!(
            MessageRow,
            r#"SELECT p.last_read_message_id, m.id AS "id?", m.content AS "content?", m.created_at AS "created_at?",
                      m.sender_id = p.user_id AS mine
               FROM messenger.participants AS p
               LEFT JOIN LATERAL (
                   SELECT * FROM messenger.messages
                   WHERE conversation_id = p.conversation_id AND id > $3 AND id < $4
                     AND hidden_from IS DISTINCT FROM p.user_id
                   ORDER BY id DESC LIMIT $5
               ) AS m ON true
               WHERE p.conversation_id = $1 AND p.user_id = $2
               ORDER BY m.id DESC"#,
            conversation.0,
            reader.0,
            above,
            below,
            window.limit,
        )
        .fetch_all(connection)
        .await?
    } else {
        sqlx::query_as!(
            MessageRow,
            r#"SELECT p.last_read_message_id, m.id AS "id?", m.content AS "content?", m.created_at AS "created_at?",
                      m.sender_id = p.user_id AS mine
               FROM messenger.participants AS p
               LEFT JOIN LATERAL (
                   SELECT * FROM messenger.messages
                   WHERE conversation_id = p.conversation_id AND id > $3 AND id < $4
                     AND hidden_from IS DISTINCT FROM p.user_id
                   ORDER BY id ASC LIMIT $5
               ) AS m ON true
               WHERE p.conversation_id = $1 AND p.user_id = $2
               ORDER BY m.id ASC"#,
            conversation.0,
            reader.0,
            above,
            below,
            window.limit,
        )
        .fetch_all(connection)
        .await?
    };
    let Some(first) = rows.first() else { return Ok(None) };
    let last_read = first.last_read_message_id.map(MessageId);
    let messages = rows
        .into_iter()
        .filter_map(|row| {
            let (id, content, created_at, mine) = (row.id?, row.content?, row.created_at?, row.mine?);
            Some(Message { id: MessageId(id), content, conversation_id: None, created_at, mine })
        })
        .collect();
    Ok(Some(MessagePage { messages, last_read }))
}
