//! Messages of a conversation, and how far its users have read.

use std::{collections::BTreeMap, time::Duration};

use chrono::{DateTime, Utc};
use protocol::ids::{ConversationId, MessageId, SessionId, UserId};
use sqlx::PgConnection;

use super::{Appended, AppendedTo, envelopes, unexpected};
use crate::{
    domain::{
        event::{ConversationRead, Event, MessageDeleted, MessageSent, ReceiptRead},
        idempotency::{IdempotencyKey, KeySpace},
        message::{Content, Message},
        user::User,
    },
    request_context::RequestContext,
};

#[derive(Debug)]
pub enum PostMessageOutcome {
    Sent(Message),
    /// The same key and content as before: the message that was posted then, as it is now.
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
    let hashes = key.map(|key| key.hashes(KeySpace::Messages, [content.as_str()]));
    let row = sqlx::query!(
        r#"SELECT outcome AS "outcome!", message_id, content, created_at, edited_at, deleted_at,
                  sender_username, sender_avatar_url, receivers, epochs, seqs
           FROM messenger.post_message($1, $2, $3, $4, $5, $6, $7, $8)"#,
        session.map(|session| session.0),
        sender.0,
        conversation.0,
        content.as_str(),
        hashes.as_ref().map(|hashes| &hashes.key[..]),
        hashes.as_ref().map(|hashes| &hashes.content[..]),
        request.request_id,
        request.traceparent(),
    )
    .fetch_one(connection)
    .await?;
    let message = match (row.message_id, row.content, row.created_at, row.sender_username) {
        (Some(id), Some(content), Some(created_at), Some(username)) => Some(Message {
            id: MessageId(id),
            content,
            conversation_id: Some(conversation),
            sender: User { id: sender, username, avatar_url: row.sender_avatar_url },
            created_at,
            edited_at: row.edited_at,
            deleted_at: row.deleted_at,
            mine: true,
        }),
        _ => None,
    };
    let outcome = match (row.outcome.as_str(), message) {
        ("posted", Some(message)) => PostMessageOutcome::Sent(message),
        ("replayed", Some(message)) => PostMessageOutcome::Replayed(message),
        ("key_conflict", _) => PostMessageOutcome::KeyConflict,
        ("no_conversation", _) => PostMessageOutcome::NoConversation,
        ("no_session", _) => PostMessageOutcome::NoSession,
        _ => return Err(unexpected(&row.outcome)),
    };
    let PostMessageOutcome::Sent(message) = &outcome else { return Ok((outcome, Vec::new())) };

    let appended = AppendedTo { receivers: row.receivers, epochs: row.epochs, seqs: row.seqs };
    let (own, others): (Vec<_>, Vec<_>) =
        appended.positions()?.into_iter().partition(|(receiver, _)| *receiver == sender);
    let idempotency_key = key.map(|key| key.as_str().to_owned());
    let sent = Event::MessageSent(MessageSent { message: message.clone(), idempotency_key });
    let received = Event::Message(Message { mine: false, ..message.clone() });
    let mut events = envelopes(own, &sent, message.created_at, request)?;
    events.extend(envelopes(others, &received, message.created_at, request)?);
    Ok((outcome, events))
}

#[derive(Debug)]
pub enum EditMessageOutcome {
    /// Also if it is the same text, which changes nothing.
    Edited(Message),
    WindowOver,
    NotYours,
    NoMessage,
    NoConversation,
    NoSession,
}

/// SQL `edit_message()`. `message`: `None` if it cannot exist.
#[expect(clippy::too_many_arguments, reason = "the arguments of one function of SQL")]
pub async fn edit(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    editor: UserId,
    conversation: ConversationId,
    message: Option<MessageId>,
    content: &Content,
    window: Duration,
    request: &RequestContext,
) -> sqlx::Result<(EditMessageOutcome, Vec<Appended>)> {
    let row = sqlx::query!(
        r#"SELECT outcome AS "outcome!", content, created_at, edited_at, sender_username, sender_avatar_url, receivers, epochs, seqs
           FROM messenger.edit_message($1, $2, $3, $4, $5, $6, $7, $8)"#,
        session.map(|session| session.0),
        editor.0,
        conversation.0,
        message.map(|id| id.0),
        content.as_str(),
        window.as_secs_f64(),
        request.request_id,
        request.traceparent(),
    )
    .fetch_one(connection)
    .await?;
    let outcome = match (row.outcome.as_str(), message, row.content, row.created_at) {
        ("edited" | "unchanged", Some(id), Some(content), Some(created_at)) => {
            EditMessageOutcome::Edited(Message {
                id,
                content,
                conversation_id: Some(conversation),
                sender: User::stored(editor.0, row.sender_username, row.sender_avatar_url),
                created_at,
                edited_at: row.edited_at,
                deleted_at: None,
                mine: true,
            })
        }
        ("window_over", ..) => EditMessageOutcome::WindowOver,
        ("not_yours", ..) => EditMessageOutcome::NotYours,
        ("no_message", ..) => EditMessageOutcome::NoMessage,
        ("no_conversation", ..) => EditMessageOutcome::NoConversation,
        ("no_session", ..) => EditMessageOutcome::NoSession,
        _ => return Err(unexpected(&row.outcome)),
    };
    let EditMessageOutcome::Edited(message) = &outcome else { return Ok((outcome, Vec::new())) };
    let Some(edited_at) = message.edited_at else { return Ok((outcome, Vec::new())) };

    let appended = AppendedTo { receivers: row.receivers, epochs: row.epochs, seqs: row.seqs };
    let (own, others): (Vec<_>, Vec<_>) =
        appended.positions()?.into_iter().partition(|(receiver, _)| *receiver == editor);
    let received = Event::MessageUpdated(Message { mine: false, ..message.clone() });
    let mut events = envelopes(own, &Event::MessageUpdated(message.clone()), edited_at, request)?;
    events.extend(envelopes(others, &received, edited_at, request)?);
    Ok((outcome, events))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeleteMessageOutcome {
    /// Also if it was deleted before.
    Deleted,
    NotYours,
    NoMessage,
    NoConversation,
    NoSession,
}

/// SQL `delete_message()`. `message`: `None` if it cannot exist.
pub async fn delete(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
    conversation: ConversationId,
    message: Option<MessageId>,
    request: &RequestContext,
) -> sqlx::Result<(DeleteMessageOutcome, Vec<Appended>)> {
    let row = sqlx::query!(
        r#"SELECT outcome AS "outcome!", deleted_at, unread_counts, receivers, epochs, seqs
           FROM messenger.delete_message($1, $2, $3, $4, $5, $6)"#,
        session.map(|session| session.0),
        user.0,
        conversation.0,
        message.map(|id| id.0),
        request.request_id,
        request.traceparent(),
    )
    .fetch_one(connection)
    .await?;
    let outcome = match row.outcome.as_str() {
        "deleted" | "unchanged" => DeleteMessageOutcome::Deleted,
        "not_yours" => DeleteMessageOutcome::NotYours,
        "no_message" => DeleteMessageOutcome::NoMessage,
        "no_conversation" => DeleteMessageOutcome::NoConversation,
        "no_session" => DeleteMessageOutcome::NoSession,
        other => return Err(unexpected(other)),
    };
    let (Some(id), Some(deleted_at)) = (message, row.deleted_at) else { return Ok((outcome, Vec::new())) };

    let appended = AppendedTo { receivers: row.receivers, epochs: row.epochs, seqs: row.seqs };
    let positions = appended.positions()?;
    let counts = row.unread_counts.unwrap_or_default();
    if counts.len() != positions.len() {
        return Err(sqlx::Error::Decode("a receiver without a count".into()));
    }
    let mut by_count: BTreeMap<i64, Vec<_>> = BTreeMap::new();
    for (count, receiver) in counts.into_iter().zip(positions) {
        by_count.entry(count).or_default().push(receiver);
    }
    let mut events = Vec::new();
    for (unread_count, receivers) in by_count {
        let event = Event::MessageDeleted(MessageDeleted {
            id,
            conversation_id: conversation,
            deleted_at,
            unread_count,
        });
        events.extend(envelopes(receivers, &event, deleted_at, request)?);
    }
    Ok((outcome, events))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MarkReadOutcome {
    Moved,
    Unmoved,
    NoConversation,
    NoSession,
}

/// Groups of more members get no receipts: every reader would cost as many events as there are members.
const RECEIPTS_UP_TO: i32 = 32;

/// SQL `mark_read()`: up to the message `to`, or the last one.
pub async fn mark_read(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    reader: UserId,
    conversation: ConversationId,
    to: Option<MessageId>,
    request: &RequestContext,
) -> sqlx::Result<(MarkReadOutcome, Vec<Appended>)> {
    let rows = sqlx::query!(
        r#"SELECT outcome AS "outcome!", message_id, unread_count, event_at, receivers, epochs, seqs
           FROM messenger.mark_read($1, $2, $3, $4, $5, $6, $7)"#,
        session.map(|session| session.0),
        reader.0,
        conversation.0,
        to.map(|id| id.0),
        RECEIPTS_UP_TO,
        request.request_id,
        request.traceparent(),
    )
    .fetch_all(connection)
    .await?;
    let outcome = match rows.first().ok_or(sqlx::Error::RowNotFound)?.outcome.as_str() {
        "moved" => MarkReadOutcome::Moved,
        "unmoved" => MarkReadOutcome::Unmoved,
        "no_conversation" => MarkReadOutcome::NoConversation,
        "no_session" => MarkReadOutcome::NoSession,
        other => return Err(unexpected(other)),
    };
    let mut events = Vec::new();
    for row in rows {
        let (Some(to), Some(at)) = (row.message_id, row.event_at) else { continue };
        let last_read_message_id = MessageId(to);
        let event = match row.unread_count {
            Some(unread_count) => Event::ConversationRead(ConversationRead {
                conversation_id: conversation,
                last_read_message_id,
                unread_count,
            }),
            None => Event::ReceiptRead(ReceiptRead {
                conversation_id: conversation,
                user_id: reader,
                last_read_message_id,
            }),
        };
        let appended = AppendedTo { receivers: row.receivers, epochs: row.epochs, seqs: row.seqs };
        events.extend(envelopes(appended.positions()?, &event, at, request)?);
    }
    Ok((outcome, events))
}

/// The messages between two, both exclusive.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    pub after: Option<MessageId>,
    pub before: Option<MessageId>,
    pub limit: i64,
}

#[derive(Debug)]
pub enum MessagePage {
    Found {
        /// The newest first; with `after`, the oldest first.
        messages: Vec<Message>,
        /// The newest message of the page, if the reader's read position is before it.
        unread: Option<MessageId>,
    },
    /// Not a conversation of the reader.
    NoConversation,
    /// `after` is not a message that the reader sees there.
    NoAfter,
    NoBefore,
}

struct MessageRow {
    last_read_number: i64,
    after_number: Option<i64>,
    before_number: Option<i64>,
    number: Option<i64>,
    id: Option<i64>,
    content: Option<String>,
    created_at: Option<DateTime<Utc>>,
    edited_at: Option<DateTime<Utc>>,
    deleted_at: Option<DateTime<Utc>>,
    sender_id: Option<i64>,
    sender_username: Option<String>,
    sender_avatar_url: Option<String>,
}

/// Hidden messages are skipped one by one, so a page also costs those between its messages.
pub async fn page(
    connection: &mut PgConnection,
    conversation: ConversationId,
    reader: UserId,
    window: Window,
) -> sqlx::Result<MessagePage> {
    let [after, before] = [window.after, window.before].map(|id| id.map(|id| id.0));
    // Both bounds are always set, so that every plan uses the index.
    let rows = if after.is_none() {
        sqlx::query_as!(
            MessageRow,
            r#"SELECT p.last_read_number, NULL::bigint AS after_number, b.number AS "before_number?",
                      m.number AS "number?", m.id AS "id?", m.created_at AS "created_at?", m.sender_id AS "sender_id?",
                      CASE WHEN m.text_hidden_from = p.user_id THEN '' ELSE m.content END AS content,
                      CASE WHEN m.text_hidden_from = p.user_id THEN NULL ELSE m.edited_at END AS edited_at,
                      CASE WHEN m.text_hidden_from = p.user_id THEN m.edited_at ELSE m.deleted_at END AS deleted_at,
                      u.username AS "sender_username?", u.avatar_url AS sender_avatar_url
               FROM messenger.participants AS p
               LEFT JOIN messenger.messages AS b
                   ON b.id = $3 AND b.conversation_id = p.conversation_id AND b.number > p.joined_number
                   AND b.hidden_from IS DISTINCT FROM p.user_id
               LEFT JOIN LATERAL (
                   SELECT * FROM messenger.messages
                   WHERE conversation_id = p.conversation_id AND number > p.joined_number
                     AND number < coalesce(b.number, CASE WHEN $3::bigint IS NULL THEN 9223372036854775807 ELSE 0 END)
                     AND hidden_from IS DISTINCT FROM p.user_id
                   ORDER BY number DESC LIMIT $4
               ) AS m ON true
               LEFT JOIN messenger.users AS u ON u.id = m.sender_id
               WHERE p.conversation_id = $1 AND p.user_id = $2
               ORDER BY m.number DESC"#,
            conversation.0,
            reader.0,
            before,
            window.limit,
        )
        .fetch_all(connection)
        .await?
    } else {
        sqlx::query_as!(
            MessageRow,
            r#"SELECT p.last_read_number, a.number AS "after_number?", b.number AS "before_number?",
                      m.number AS "number?", m.id AS "id?", m.created_at AS "created_at?", m.sender_id AS "sender_id?",
                      CASE WHEN m.text_hidden_from = p.user_id THEN '' ELSE m.content END AS content,
                      CASE WHEN m.text_hidden_from = p.user_id THEN NULL ELSE m.edited_at END AS edited_at,
                      CASE WHEN m.text_hidden_from = p.user_id THEN m.edited_at ELSE m.deleted_at END AS deleted_at,
                      u.username AS "sender_username?", u.avatar_url AS sender_avatar_url
               FROM messenger.participants AS p
               LEFT JOIN messenger.messages AS a
                   ON a.id = $3 AND a.conversation_id = p.conversation_id AND a.number > p.joined_number
                   AND a.hidden_from IS DISTINCT FROM p.user_id
               LEFT JOIN messenger.messages AS b
                   ON b.id = $4 AND b.conversation_id = p.conversation_id AND b.number > p.joined_number
                   AND b.hidden_from IS DISTINCT FROM p.user_id
               LEFT JOIN LATERAL (
                   SELECT * FROM messenger.messages
                   WHERE conversation_id = p.conversation_id AND number > a.number
                     AND number < coalesce(b.number, CASE WHEN $4::bigint IS NULL THEN 9223372036854775807 ELSE 0 END)
                     AND hidden_from IS DISTINCT FROM p.user_id
                   ORDER BY number ASC LIMIT $5
               ) AS m ON true
               LEFT JOIN messenger.users AS u ON u.id = m.sender_id
               WHERE p.conversation_id = $1 AND p.user_id = $2
               ORDER BY m.number ASC"#,
            conversation.0,
            reader.0,
            after,
            before,
            window.limit,
        )
        .fetch_all(connection)
        .await?
    };
    let Some(first) = rows.first() else { return Ok(MessagePage::NoConversation) };
    if after.is_some() && first.after_number.is_none() {
        return Ok(MessagePage::NoAfter);
    }
    if before.is_some() && first.before_number.is_none() {
        return Ok(MessagePage::NoBefore);
    }
    let newest = rows.iter().max_by_key(|row| row.number);
    let unread = newest.filter(|row| row.number > Some(row.last_read_number)).and_then(|row| row.id);
    let messages = rows
        .into_iter()
        .filter_map(|row| {
            let sender = row.sender_id?;
            Some(Message {
                id: MessageId(row.id?),
                content: row.content?,
                conversation_id: None,
                sender: User::stored(sender, row.sender_username, row.sender_avatar_url),
                created_at: row.created_at?,
                edited_at: row.edited_at,
                deleted_at: row.deleted_at,
                mine: sender == reader.0,
            })
        })
        .collect();
    Ok(MessagePage::Found { messages, unread: unread.map(MessageId) })
}

/// Deletes up to `rows` idempotency keys that are older than `keep`.
pub async fn delete_old_keys(connection: &mut PgConnection, keep: Duration, rows: i64) -> sqlx::Result<u64> {
    let done = sqlx::query!(
        "DELETE FROM messenger.idempotency_keys WHERE (sender_id, key_hash) IN (
             SELECT sender_id, key_hash FROM messenger.idempotency_keys
             WHERE created_at < now() - make_interval(secs => $1)
             ORDER BY created_at LIMIT $2
         )",
        keep.as_secs_f64(),
        rows,
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}
