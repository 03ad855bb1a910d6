//! Conversations, as one of their two users sees them.

use chrono::{DateTime, Utc};
use protocol::ids::{ConversationId, MessageId, SessionId, UserId};
use serde_json::value::RawValue;
use sqlx::PgConnection;

use super::{Appended, CommandOutput, CommandRow};
use crate::{
    domain::{conversation::Conversation, message::Message, user::User},
    request_context::RequestContext,
};

#[derive(Debug)]
pub enum StartConversationOutcome {
    Created(ConversationId, Box<RawValue>),
    Exists(ConversationId),
    NoUser,
    Oneself,
    NoSession,
}

/// Starts a conversation with the user that `find_user` returns for `username`: `start_conversation()` takes exact names only.
pub async fn start(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
    username: &str,
    request: &RequestContext,
) -> sqlx::Result<(StartConversationOutcome, Vec<Appended>)> {
    let rows = sqlx::query_as!(
        CommandRow,
        r#"SELECT outcome AS "outcome!", conversation_id AS subject, NULL::timestamptz AS subject_at,
                  receiver, epoch, seq, kind, payload, event_at
           FROM messenger.start_conversation($1, $2, (SELECT username FROM messenger.users WHERE id = messenger.find_user($3)), $4, $5)"#,
        session.map(|session| session.0),
        user.0,
        username,
        request.request_id,
        request.traceparent(),
    )
    .fetch_all(connection)
    .await?;
    let output = CommandOutput::from_rows(rows, request)?;
    let outcome = match (output.outcome.as_str(), output.subject.map(ConversationId)) {
        ("created", Some(id)) => {
            let mine =
                output.events.iter().find(|event| event.receiver == user).ok_or(sqlx::Error::RowNotFound)?;
            StartConversationOutcome::Created(id, mine.envelope.data.clone())
        }
        ("exists", Some(id)) => StartConversationOutcome::Exists(id),
        ("no_user", _) => StartConversationOutcome::NoUser,
        ("self", _) => StartConversationOutcome::Oneself,
        ("no_session", _) => StartConversationOutcome::NoSession,
        _ => return Err(output.unexpected()),
    };
    Ok((outcome, output.events))
}

struct ConversationRow {
    id: i64,
    unread_count: i64,
    last_read_message_id: Option<i64>,
    other_last_read_message_id: Option<i64>,
    other_id: i64,
    other_username: String,
    other_avatar_url: Option<String>,
    message_id: Option<i64>,
    message_content: Option<String>,
    message_created_at: Option<DateTime<Utc>>,
    message_mine: Option<bool>,
}

impl From<ConversationRow> for Conversation {
    fn from(row: ConversationRow) -> Self {
        let last_message =
            match (row.message_id, row.message_content, row.message_created_at, row.message_mine) {
                (Some(id), Some(content), Some(created_at), Some(mine)) => {
                    Some(Message { id: MessageId(id), content, conversation_id: None, created_at, mine })
                }
                _ => None,
            };
        Self {
            id: ConversationId(row.id),
            other_participant: User {
                id: UserId(row.other_id),
                username: row.other_username,
                avatar_url: row.other_avatar_url,
            },
            last_message,
            has_unread_messages: row.unread_count > 0,
            unread_count: row.unread_count,
            last_read_message_id: row.last_read_message_id.map(MessageId),
            other_last_read_message_id: row.other_last_read_message_id.map(MessageId),
        }
    }
}

pub async fn find(
    connection: &mut PgConnection,
    conversation: ConversationId,
    reader: UserId,
) -> sqlx::Result<Option<Conversation>> {
    let row = sqlx::query_as!(
        ConversationRow,
        r#"SELECT p.conversation_id AS id, p.unread_count, p.last_read_message_id,
                  messenger.visible_last_read(other.last_read_message_id, p.last_message_id) AS other_last_read_message_id,
                  u.id AS other_id, u.username AS other_username, u.avatar_url AS other_avatar_url,
                  m.id AS "message_id?", m.content AS "message_content?", m.created_at AS "message_created_at?",
                  m.sender_id = p.user_id AS message_mine
           FROM messenger.participants AS p
           JOIN messenger.participants AS other ON other.conversation_id = p.conversation_id AND other.user_id = p.other_user_id
           JOIN messenger.users AS u ON u.id = p.other_user_id
           LEFT JOIN messenger.messages AS m ON m.id = p.last_message_id
           WHERE p.conversation_id = $1 AND p.user_id = $2"#,
        conversation.0,
        reader.0,
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(Conversation::from))
}

/// Conversations that have a message, the newest last message first; with `before`, the ones after it. `None`: `before` is
/// not a conversation of the reader.
pub async fn page(
    connection: &mut PgConnection,
    reader: UserId,
    before: Option<ConversationId>,
    limit: i64,
) -> sqlx::Result<Option<Vec<Conversation>>> {
    let below = match before {
        None => i64::MAX,
        Some(before) => {
            let last_message = sqlx::query_scalar!(
                "SELECT last_message_id FROM messenger.participants WHERE conversation_id = $1 AND user_id = $2",
                before.0,
                reader.0,
            )
            .fetch_optional(&mut *connection)
            .await?;
            match last_message {
                None => return Ok(None),
                // Without a message it is not in the list, and nothing follows it.
                Some(None) => return Ok(Some(Vec::new())),
                Some(Some(last_message)) => last_message,
            }
        }
    };
    let rows = sqlx::query_as!(
        ConversationRow,
        r#"SELECT p.conversation_id AS id, p.unread_count, p.last_read_message_id,
                  messenger.visible_last_read(other.last_read_message_id, p.last_message_id) AS other_last_read_message_id,
                  u.id AS other_id, u.username AS other_username, u.avatar_url AS other_avatar_url,
                  m.id AS "message_id?", m.content AS "message_content?", m.created_at AS "message_created_at?",
                  m.sender_id = p.user_id AS message_mine
           FROM messenger.participants AS p
           JOIN messenger.participants AS other ON other.conversation_id = p.conversation_id AND other.user_id = p.other_user_id
           JOIN messenger.users AS u ON u.id = p.other_user_id
           JOIN messenger.messages AS m ON m.id = p.last_message_id
           WHERE p.user_id = $1 AND p.last_message_id < $2
           ORDER BY p.last_message_id DESC
           LIMIT $3"#,
        reader.0,
        below,
        limit,
    )
    .fetch_all(connection)
    .await?;
    Ok(Some(rows.into_iter().map(Conversation::from).collect()))
}

pub async fn other_participant(
    connection: &mut PgConnection,
    conversation: ConversationId,
    reader: UserId,
) -> sqlx::Result<Option<User>> {
    sqlx::query_as!(
        User,
        "SELECT u.id, u.username, u.avatar_url
         FROM messenger.participants AS p JOIN messenger.users AS u ON u.id = p.other_user_id
         WHERE p.conversation_id = $1 AND p.user_id = $2",
        conversation.0,
        reader.0,
    )
    .fetch_optional(connection)
    .await
}
