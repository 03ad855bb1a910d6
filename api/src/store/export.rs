//! The data of one user in pages of a bounded size, so that exporting a user of any size takes the same memory.

use protocol::ids::{ConversationId, MessageId, SessionId, UserId};
use sqlx::PgConnection;

use super::unexpected;
use crate::domain::{
    conversation::{ConversationKind, Role},
    export::ExportedLine,
    user::AddableBy,
};

/// Messages of a conversation that one page looks at, and those of the user that it has at most.
const SCAN: i64 = 5_000;
const MESSAGES: i64 = 200;
const ROWS: i64 = 500;

/// The user and their identities. Empty: there is no such user.
pub async fn user(connection: &mut PgConnection, user: UserId) -> sqlx::Result<Vec<ExportedLine>> {
    let row = sqlx::query!(
        r#"SELECT u.username, u.avatar_url, u.shares_presence, u.addable_by, u.created_at, l.at AS "last_seen_at?"
           FROM messenger.users AS u LEFT JOIN messenger.last_seen AS l ON l.user_id = u.id WHERE u.id = $1"#,
        user.0,
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = row else { return Ok(Vec::new()) };
    let mut lines = vec![ExportedLine::User {
        id: user,
        username: row.username,
        avatar_url: row.avatar_url,
        shares_presence: row.shares_presence,
        addable_by: AddableBy::parse(&row.addable_by).ok_or_else(|| unexpected(&row.addable_by))?,
        created_at: row.created_at,
        last_seen_at: row.last_seen_at,
    }];
    let identities = sqlx::query!(
        "SELECT issuer, subject, created_at FROM messenger.identities WHERE user_id = $1 ORDER BY created_at, issuer, subject",
        user.0,
    )
    .fetch_all(connection)
    .await?;
    lines.extend(identities.into_iter().map(|row| ExportedLine::Identity {
        issuer: row.issuer,
        subject: row.subject,
        created_at: row.created_at,
    }));
    Ok(lines)
}

/// The sessions after this one, ended ones too. Also returns where the next page begins; `None` if there is none.
pub async fn sessions(
    connection: &mut PgConnection,
    user: UserId,
    after: SessionId,
) -> sqlx::Result<(Vec<ExportedLine>, Option<SessionId>)> {
    let rows = sqlx::query!(
        "SELECT id, device, created_at, last_used_at, expires_at, revoked_at FROM messenger.sessions
         WHERE user_id = $1 AND id > $2 ORDER BY id LIMIT $3",
        user.0,
        after.0,
        ROWS,
    )
    .fetch_all(connection)
    .await?;
    let next = rows.last().map(|row| SessionId(row.id));
    let lines = rows.into_iter().map(|row| ExportedLine::Session {
        id: SessionId(row.id),
        device: row.device,
        created_at: row.created_at,
        last_used_at: row.last_used_at,
        expires_at: row.expires_at,
        revoked_at: row.revoked_at,
    });
    Ok((lines.collect(), next))
}

/// The same with the users whom this one blocks.
pub async fn blocks(
    connection: &mut PgConnection,
    user: UserId,
    after: UserId,
) -> sqlx::Result<(Vec<ExportedLine>, Option<UserId>)> {
    let rows = sqlx::query!(
        "SELECT blocked_id, created_at FROM messenger.blocks
         WHERE blocker_id = $1 AND blocked_id > $2 ORDER BY blocked_id LIMIT $3",
        user.0,
        after.0,
        ROWS,
    )
    .fetch_all(connection)
    .await?;
    let next = rows.last().map(|row| UserId(row.blocked_id));
    let lines = rows
        .into_iter()
        .map(|row| ExportedLine::Block { user_id: UserId(row.blocked_id), created_at: row.created_at });
    Ok((lines.collect(), next))
}

/// The next conversation after this one, also one that the user has left. `None`: there are no more.
pub async fn conversation(
    connection: &mut PgConnection,
    user: UserId,
    after: ConversationId,
) -> sqlx::Result<Option<(ConversationId, ExportedLine)>> {
    let row = sqlx::query!(
        r#"SELECT c.id, c.user_a IS NULL AS "is_group!", CASE WHEN p.user_id IS NOT NULL THEN c.title END AS title,
                  p.other_user_id AS "other_user_id?", p.is_owner AS "is_owner?",
                  coalesce(p.joined_at, f.joined_at) AS "joined_at!", p.last_read_message_id AS "last_read_message_id?"
           FROM (
               SELECT least(
                   (SELECT min(a.id) FROM messenger.conversations AS a WHERE a.user_a = $1 AND a.id > $2),
                   (SELECT min(b.id) FROM messenger.conversations AS b WHERE b.user_b = $1 AND b.id > $2),
                   (SELECT min(m.conversation_id) FROM messenger.participants AS m
                    WHERE m.user_id = $1 AND m.list_seq IS NOT NULL AND m.conversation_id > $2),
                   (SELECT min(l.conversation_id) FROM messenger.former_participants AS l
                    WHERE l.user_id = $1 AND l.conversation_id > $2)
               ) AS id
           ) AS next
           JOIN messenger.conversations AS c ON c.id = next.id
           LEFT JOIN messenger.participants AS p ON p.conversation_id = c.id AND p.user_id = $1
           LEFT JOIN messenger.former_participants AS f ON f.conversation_id = c.id AND f.user_id = $1"#,
        user.0,
        after.0,
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(|row| {
        let id = ConversationId(row.id);
        let line = ExportedLine::Conversation {
            id,
            kind: if row.is_group { ConversationKind::Group } else { ConversationKind::Direct },
            title: row.title,
            other_user_id: row.other_user_id.map(UserId),
            role: row.is_owner.map(Role::stored),
            joined_at: row.joined_at,
            last_read_message_id: row.last_read_message_id.map(MessageId),
        };
        (id, line)
    }))
}

/// The user's messages among the next ones of a conversation after this number, and where the next page begins; `None` if there is none.
pub async fn messages(
    connection: &mut PgConnection,
    user: UserId,
    conversation: ConversationId,
    after: i64,
) -> sqlx::Result<(Vec<ExportedLine>, Option<i64>)> {
    let rows = sqlx::query!(
        r#"SELECT w.last, w.scanned AS "scanned!", m.number AS "number?", m.id AS "id?", m.content AS "content?",
                  m.created_at AS "created_at?", m.edited_at AS "edited_at?", m.deleted_at AS "deleted_at?"
           FROM (
               SELECT max(s.number) AS last, count(*) AS scanned
               FROM (
                   SELECT number FROM messenger.messages
                   WHERE conversation_id = $1 AND number > $2 ORDER BY number LIMIT $4
               ) AS s
           ) AS w
           LEFT JOIN LATERAL (
               SELECT * FROM messenger.messages
               WHERE conversation_id = $1 AND number > $2 AND number <= w.last AND sender_id = $3 ORDER BY number LIMIT $5
           ) AS m ON true
           ORDER BY m.number"#,
        conversation.0,
        after,
        user.0,
        SCAN,
        MESSAGES,
    )
    .fetch_all(connection)
    .await?;
    let Some(last) = rows.last() else { return Ok((Vec::new(), None)) };
    let next = match last.number {
        Some(number) if i64::try_from(rows.len()).unwrap_or(i64::MAX) == MESSAGES => Some(number),
        _ => last.last.filter(|_| last.scanned == SCAN),
    };
    let line = |(id, content, created_at, edited_at, deleted_at): (Option<i64>, Option<String>, _, _, _)| {
        let id = MessageId(id?);
        let (content, created_at) = (content?, created_at?);
        Some(ExportedLine::Message {
            id,
            conversation_id: conversation,
            content,
            created_at,
            edited_at,
            deleted_at,
        })
    };
    let rows =
        rows.into_iter().map(|row| (row.id, row.content, row.created_at, row.edited_at, row.deleted_at));
    Ok((rows.filter_map(line).collect(), next))
}
