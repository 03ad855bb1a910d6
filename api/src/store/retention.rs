//! Removes texts of messages that are too old, or that nobody can read any more, and deletes their rows later. A feed refers to its
//! messages: while one may still do so, the row stays without its text, so that no client has to resync because of it.

use std::time::Duration;

use protocol::ids::{ConversationId, MessageId, UserId};
use sqlx::PgConnection;

use super::{Appended, envelope, feed::BODY_MARGIN, position, to_json};
use crate::{
    config::Keep,
    domain::event::{Event, MessageDeleted},
};

/// Looks at the oldest text of the next `conversations` after `after`. Returns those with texts older than `age`, and the last
/// conversation looked at; `None` if there are no more.
pub async fn conversations_with_old_texts(
    connection: &mut PgConnection,
    age: Duration,
    after: ConversationId,
    conversations: i64,
) -> sqlx::Result<(Vec<ConversationId>, Option<ConversationId>)> {
    let found = sqlx::query!(
        r#"SELECT c.id, coalesce(first.created_at < now() - make_interval(secs => $3), false) AS "is_old!"
           FROM (SELECT id, emptied_number FROM messenger.conversations WHERE id > $1 ORDER BY id LIMIT $2) AS c
           LEFT JOIN LATERAL (
               SELECT m.created_at FROM messenger.messages AS m
               WHERE m.conversation_id = c.id AND m.number > c.emptied_number ORDER BY m.number LIMIT 1
           ) AS first ON true
           ORDER BY c.id"#,
        after.0,
        conversations,
        age.as_secs_f64(),
    )
    .fetch_all(connection)
    .await?;
    let last = found.last().map(|row| ConversationId(row.id));
    let old = found.into_iter().filter(|row| row.is_old).map(|row| ConversationId(row.id));
    Ok((old.collect(), last))
}

/// SQL `expire_messages()`: the next messages older than `age`, at most `most`. Returns how many, and the events about it.
pub async fn expire_messages(
    connection: &mut PgConnection,
    conversation: ConversationId,
    age: Duration,
    most: i32,
) -> sqlx::Result<(u64, Vec<Appended>)> {
    let rows = sqlx::query!(
        "SELECT expired, message_id, event_at, receiver, unread_count, epoch, seq
         FROM messenger.expire_messages($1, now() - make_interval(secs => $2), $3)",
        conversation.0,
        age.as_secs_f64(),
        most,
    )
    .fetch_all(connection)
    .await?;
    let expired = rows.first().and_then(|row| row.expired).unwrap_or(0);
    let mut events = Vec::new();
    for row in rows {
        let (Some(receiver), Some(id), Some(deleted_at)) = (row.receiver, row.message_id, row.event_at)
        else {
            continue;
        };
        let (Some(epoch), Some(seq), Some(unread_count)) = (row.epoch, row.seq, row.unread_count) else {
            continue;
        };
        let event = Event::MessageDeleted(MessageDeleted {
            id: MessageId(id),
            conversation_id: conversation,
            deleted_at,
            unread_count,
        });
        let at = position(epoch, seq)?;
        let envelope = envelope(at, event.name(), to_json(&event)?, deleted_at, None, None);
        events.push(Appended { receiver: UserId(receiver), envelope });
    }
    Ok((expired.cast_unsigned(), events))
}

/// How long the row of a message stays after it was written: no feed refers to it, and no repeat of its idempotency key asks for it.
fn row_age(keep: Keep) -> Duration {
    (keep.age + keep.edit_window).max(keep.idempotency_keys).max(keep.messages.unwrap_or_default())
        + BODY_MARGIN
}

/// Looks at the oldest rows of the next `conversations` after `after`, and deletes those, at most `rows` of each, that have lost their
/// text and to which nothing refers: no feed, and no list as its last message. Returns how many were deleted, and the last conversation
/// looked at.
pub async fn delete_old_rows(
    connection: &mut PgConnection,
    keep: Keep,
    after: ConversationId,
    conversations: i64,
    rows: i64,
) -> sqlx::Result<(u64, Option<ConversationId>)> {
    let done = sqlx::query!(
        r#"WITH c AS MATERIALIZED (
               SELECT id, emptied_number FROM messenger.conversations WHERE id > $1 ORDER BY id LIMIT $2
           ), deleted AS (
               DELETE FROM messenger.messages AS gone USING (
                   SELECT o.id
                   FROM c CROSS JOIN LATERAL (
                       SELECT m.id, m.created_at FROM messenger.messages AS m
                       WHERE m.conversation_id = c.id AND m.number <= c.emptied_number ORDER BY m.number LIMIT $4
                   ) AS o
                   WHERE o.created_at < now() - make_interval(secs => $3)
                     AND NOT EXISTS (SELECT FROM messenger.participants AS p WHERE p.conversation_id = c.id AND p.last_message_id = o.id)
               ) AS old
               WHERE gone.id = old.id
               RETURNING 1
           )
           SELECT (SELECT count(*) FROM deleted) AS "deleted!", (SELECT max(id) FROM c) AS last"#,
        after.0,
        conversations,
        row_age(keep).as_secs_f64(),
        rows,
    )
    .fetch_one(connection)
    .await?;
    Ok((done.deleted.cast_unsigned(), done.last.map(ConversationId)))
}

/// SQL `empty_left_group()`: the next texts, at most `most`, of a group without members. `None`: there is no such group.
pub async fn empty_left_group(
    connection: &mut PgConnection,
    most: i32,
) -> sqlx::Result<Option<(ConversationId, u64)>> {
    let row = sqlx::query!("SELECT conversation, emptied FROM messenger.empty_left_group($1)", most)
        .fetch_one(connection)
        .await?;
    Ok(row.conversation.map(|id| (ConversationId(id), row.emptied.unwrap_or(0).cast_unsigned())))
}

/// Deletes messages, at most `rows`, of a group whose last member left long ago, and after the last one the group itself. `None`: there is
/// no such group.
pub async fn delete_left_group(
    connection: &mut PgConnection,
    keep: Keep,
    rows: i64,
) -> sqlx::Result<Option<u64>> {
    let done = sqlx::query!(
        r#"WITH c AS MATERIALIZED (
               SELECT id FROM messenger.conversations
               WHERE emptied_at < now() - make_interval(secs => $1) ORDER BY emptied_at LIMIT 1 FOR UPDATE SKIP LOCKED
           ), deleted AS (
               DELETE FROM messenger.messages WHERE id IN (
                   SELECT m.id FROM c JOIN messenger.messages AS m ON m.conversation_id = c.id ORDER BY m.number LIMIT $2
               )
               RETURNING 1
           ), closed AS (
               DELETE FROM messenger.conversations
               WHERE id IN (SELECT id FROM c) AND (SELECT count(*) FROM deleted) < $2
           )
           SELECT (SELECT count(*) FROM c) AS "groups!", (SELECT count(*) FROM deleted) AS "deleted!""#,
        (row_age(Keep { messages: None, ..keep })).as_secs_f64(),
        rows,
    )
    .fetch_one(connection)
    .await?;
    Ok((done.groups > 0).then_some(done.deleted.cast_unsigned()))
}
