//! Conversations, as one of their users sees them.

use chrono::{DateTime, Utc};
use protocol::ids::{ConversationId, MessageId, SessionId, UserId};
use sqlx::PgConnection;

use super::{Appended, AppendedTo, envelopes, unexpected};
use crate::{
    domain::{
        conversation::{Conversation, ConversationKind, Role},
        event::Event,
        message::Message,
        user::User,
    },
    request_context::RequestContext,
};

#[derive(Debug)]
pub enum StartConversationOutcome {
    Created(Box<Conversation>),
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
    let row = sqlx::query!(
        r#"SELECT outcome AS "outcome!", conversation_id, event_at, receivers, epochs, seqs,
                  user_ids, usernames, avatar_urls AS "avatar_urls: Vec<Option<String>>"
           FROM messenger.start_conversation($1, $2, (SELECT username FROM messenger.users WHERE id = messenger.find_user($3)), $4, $5)"#,
        session.map(|session| session.0),
        user.0,
        username,
        request.request_id,
        request.traceparent(),
    )
    .fetch_one(connection)
    .await?;
    let (id, event_at) = match (row.outcome.as_str(), row.conversation_id.map(ConversationId), row.event_at) {
        ("created", Some(id), Some(at)) => (id, at),
        ("exists", Some(id), _) => return Ok((StartConversationOutcome::Exists(id), Vec::new())),
        ("no_user", ..) => return Ok((StartConversationOutcome::NoUser, Vec::new())),
        ("self", ..) => return Ok((StartConversationOutcome::Oneself, Vec::new())),
        ("no_session", ..) => return Ok((StartConversationOutcome::NoSession, Vec::new())),
        _ => return Err(unexpected(&row.outcome)),
    };
    let ids = row.user_ids.unwrap_or_default().into_iter();
    let names = row.usernames.unwrap_or_default().into_iter().zip(row.avatar_urls.unwrap_or_default());
    let pair: Vec<User> = ids
        .zip(names)
        .map(|(id, (username, avatar_url))| User { id: UserId(id), username, avatar_url })
        .collect();
    let seen_by = |reader: UserId| {
        let other = pair.iter().find(|user| user.id != reader).ok_or(sqlx::Error::RowNotFound)?;
        Ok::<_, sqlx::Error>(Conversation {
            id,
            kind: ConversationKind::Direct,
            title: None,
            participant_count: 2,
            role: Role::Member,
            other_participant: Some(other.clone()),
            last_message: None,
            has_unread_messages: false,
            unread_count: 0,
            last_read_message_id: None,
            other_last_read_message_id: None,
        })
    };
    let mut events = Vec::new();
    let appended = AppendedTo { receivers: row.receivers, epochs: row.epochs, seqs: row.seqs };
    for (receiver, at) in appended.positions()? {
        let event = Event::ConversationCreated(Box::new(seen_by(receiver)?));
        events.extend(envelopes([(receiver, at)], &event, event_at, request)?);
    }
    Ok((StartConversationOutcome::Created(Box::new(seen_by(user)?)), events))
}

struct ConversationRow {
    id: i64,
    reader: i64,
    is_group: bool,
    title: Option<String>,
    participant_count: i64,
    is_owner: bool,
    unread_count: i64,
    last_read_message_id: Option<i64>,
    other_last_read_message_id: Option<i64>,
    other_id: Option<i64>,
    other_username: Option<String>,
    other_avatar_url: Option<String>,
    message_id: Option<i64>,
    message_content: Option<String>,
    message_created_at: Option<DateTime<Utc>>,
    message_edited_at: Option<DateTime<Utc>>,
    message_deleted_at: Option<DateTime<Utc>>,
    sender_id: Option<i64>,
    sender_username: Option<String>,
    sender_avatar_url: Option<String>,
}

impl From<ConversationRow> for Conversation {
    fn from(row: ConversationRow) -> Self {
        let last_message = match (row.message_id, row.message_content, row.message_created_at, row.sender_id)
        {
            (Some(id), Some(content), Some(created_at), Some(sender)) => Some(Message {
                id: MessageId(id),
                content,
                conversation_id: None,
                sender: User::stored(sender, row.sender_username, row.sender_avatar_url),
                created_at,
                edited_at: row.message_edited_at,
                deleted_at: row.message_deleted_at,
                mine: sender == row.reader,
            }),
            _ => None,
        };
        Self {
            id: ConversationId(row.id),
            kind: if row.is_group { ConversationKind::Group } else { ConversationKind::Direct },
            title: row.title,
            participant_count: row.participant_count,
            role: Role::stored(row.is_owner),
            other_participant: row
                .other_id
                .map(|id| User::stored(id, row.other_username, row.other_avatar_url)),
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
        r#"SELECT id AS "id!", reader AS "reader!", is_group AS "is_group!", title, participant_count AS "participant_count!",
                  is_owner AS "is_owner!", unread_count AS "unread_count!", last_read_message_id, other_last_read_message_id,
                  other_id, other_username, other_avatar_url,
                  message_id, message_content, message_created_at, message_edited_at, message_deleted_at,
                  sender_id, sender_username, sender_avatar_url
           FROM messenger.seen_conversations WHERE reader = $1 AND id = $2"#,
        reader.0,
        conversation.0,
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(Conversation::from))
}

/// An event about a conversation, at one receiver.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    pub receiver: UserId,
    pub conversation: ConversationId,
    /// Of its last message then.
    pub number: i64,
    pub participant_count: i64,
}

/// Each conversation as its receiver saw it at that moment, with the titles and texts of today. Later messages are left out: their own
/// events follow. A receiver who has left sees no title and no message.
pub async fn as_of(connection: &mut PgConnection, moments: &[Moment]) -> sqlx::Result<Vec<Conversation>> {
    if moments.is_empty() {
        return Ok(Vec::new());
    }
    let receivers: Vec<i64> = moments.iter().map(|moment| moment.receiver.0).collect();
    let ids: Vec<i64> = moments.iter().map(|moment| moment.conversation.0).collect();
    let numbers: Vec<i64> = moments.iter().map(|moment| moment.number).collect();
    let counts: Vec<i64> = moments.iter().map(|moment| moment.participant_count).collect();
    let rows = sqlx::query_as!(
        ConversationRow,
        r#"SELECT moment.conversation_id AS "id!", moment.receiver AS "reader!", coalesce(c.is_group, true) AS "is_group!", c.title,
                  moment.participant_count AS "participant_count!", coalesce(c.is_owner, false) AS "is_owner!", unread.count AS "unread_count!",
                  CASE WHEN c.last_read_number <= moment.number THEN c.last_read_message_id END AS last_read_message_id,
                  CASE WHEN c.other_last_read_number <= moment.number THEN c.other_last_read_message_id END AS other_last_read_message_id,
                  c.other_id, c.other_username, c.other_avatar_url,
                  m.id AS "message_id?", m.content AS "message_content?", m.created_at AS "message_created_at?",
                  m.edited_at AS message_edited_at, m.deleted_at AS message_deleted_at,
                  m.sender_id AS "sender_id?", u.username AS "sender_username?", u.avatar_url AS sender_avatar_url
           FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[]) WITH ORDINALITY
               AS moment (receiver, conversation_id, number, participant_count, ordinality)
           LEFT JOIN LATERAL (
               SELECT * FROM messenger.seen_conversations AS s
               WHERE s.reader = moment.receiver AND s.id = moment.conversation_id LIMIT 1
           ) AS c ON true
           LEFT JOIN LATERAL (
               SELECT * FROM messenger.messages
               WHERE conversation_id = c.id AND number > c.joined_number AND number <= moment.number
                 AND hidden_from IS DISTINCT FROM c.reader
               ORDER BY number DESC LIMIT 1
           ) AS m ON true
           LEFT JOIN messenger.users AS u ON u.id = m.sender_id
           CROSS JOIN LATERAL (
               SELECT count(*) FROM messenger.messages
               WHERE conversation_id = c.id AND number > greatest(c.joined_number, c.last_read_number) AND number <= moment.number
                 AND sender_id <> c.reader AND hidden_from IS DISTINCT FROM c.reader AND deleted_at IS NULL
           ) AS unread
           ORDER BY moment.ordinality"#,
        &receivers,
        &ids,
        &numbers,
        &counts,
    )
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().map(Conversation::from).collect())
}

/// The reader's list, the newest first; with `before`, the conversations after it. `None`: `before` is not a conversation of the reader.
pub async fn page(
    connection: &mut PgConnection,
    reader: UserId,
    before: Option<ConversationId>,
    limit: i64,
) -> sqlx::Result<Option<Vec<Conversation>>> {
    let below = match before {
        None => i64::MAX,
        Some(before) => {
            let list_seq = sqlx::query_scalar!(
                "SELECT list_seq FROM messenger.participants WHERE conversation_id = $1 AND user_id = $2",
                before.0,
                reader.0,
            )
            .fetch_optional(&mut *connection)
            .await?;
            match list_seq {
                None => return Ok(None),
                // It is not in the list, and nothing follows it.
                Some(None) => return Ok(Some(Vec::new())),
                Some(Some(list_seq)) => list_seq,
            }
        }
    };
    let rows = sqlx::query_as!(
        ConversationRow,
        r#"SELECT id AS "id!", reader AS "reader!", is_group AS "is_group!", title, participant_count AS "participant_count!",
                  is_owner AS "is_owner!", unread_count AS "unread_count!", last_read_message_id, other_last_read_message_id,
                  other_id, other_username, other_avatar_url,
                  message_id, message_content, message_created_at, message_edited_at, message_deleted_at,
                  sender_id, sender_username, sender_avatar_url
           FROM messenger.seen_conversations
           WHERE reader = $1 AND list_seq < $2
           ORDER BY list_seq DESC
           LIMIT $3"#,
        reader.0,
        below,
        limit,
    )
    .fetch_all(connection)
    .await?;
    Ok(Some(rows.into_iter().map(Conversation::from).collect()))
}

/// `None` also in a group.
pub async fn other_participant(
    connection: &mut PgConnection,
    conversation: ConversationId,
    reader: UserId,
) -> sqlx::Result<Option<User>> {
    let row = sqlx::query!(
        r#"SELECT p.other_user_id AS "id!", u.username AS "username?", u.avatar_url
           FROM messenger.participants AS p LEFT JOIN messenger.users AS u ON u.id = p.other_user_id
           WHERE p.conversation_id = $1 AND p.user_id = $2 AND p.other_user_id IS NOT NULL"#,
        conversation.0,
        reader.0,
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(|row| User::stored(row.id, row.username, row.avatar_url)))
}
