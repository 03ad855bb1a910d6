//! Who is told about a user: of their typing, and of their presence.

use chrono::{DateTime, Utc};
use protocol::ids::{ConversationId, SessionId, UserId};
use sqlx::PgConnection;

/// Partners who are told of a user's presence, by the newest conversations, and the conversations among which they are looked for.
const MOST_PARTNERS: i64 = 200;
const MOST_CONVERSATIONS: i64 = 1_000;

/// In a larger group nobody is told who types.
const LARGEST_TYPING_GROUP: i64 = 100;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TypingOutcome {
    /// To be told to these.
    Allowed(Vec<UserId>),
    NoConversation,
    NoSession,
}

/// The others in the conversation. In a direct one, a user who blocks the one who types is not told.
pub async fn of_typing(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
    conversation: ConversationId,
) -> sqlx::Result<TypingOutcome> {
    let row = sqlx::query!(
        r#"SELECT messenger.session_is_live($1, $2) AS "is_live!", p.user_id IS NOT NULL AS "takes_part!",
                  ARRAY(SELECT o.user_id FROM messenger.participants AS o
                        WHERE o.conversation_id = c.id AND o.user_id <> p.user_id AND c.participant_count <= $4
                          AND NOT (c.user_a IS NOT NULL AND EXISTS (
                              SELECT FROM messenger.blocks AS b WHERE b.blocker_id = o.user_id AND b.blocked_id = p.user_id))
                  ) AS "others!"
           FROM (VALUES (0)) AS one
           LEFT JOIN messenger.participants AS p ON p.conversation_id = $3 AND p.user_id = $2
           LEFT JOIN messenger.conversations AS c ON c.id = p.conversation_id"#,
        session.map(|session| session.0),
        user.0,
        conversation.0,
        LARGEST_TYPING_GROUP,
    )
    .fetch_one(connection)
    .await?;
    Ok(match (row.is_live, row.takes_part) {
        (false, _) => TypingOutcome::NoSession,
        (true, false) => TypingOutcome::NoConversation,
        (true, true) => TypingOutcome::Allowed(row.others.into_iter().map(UserId).collect()),
    })
}

/// The partners of each of these users who shares their presence; `unshared`: of the others, too. Who blocks the other, in either direction,
/// is left out.
pub async fn partners(
    connection: &mut PgConnection,
    users: &[UserId],
    unshared: bool,
) -> sqlx::Result<Vec<(UserId, Vec<UserId>)>> {
    let users: Vec<i64> = users.iter().map(|user| user.0).collect();
    let rows = sqlx::query!(
        r#"SELECT u.id, ARRAY(
               SELECT recent.other_user_id
               FROM (
                   SELECT p.conversation_id, p.other_user_id, p.list_seq FROM messenger.participants AS p
                   WHERE p.user_id = u.id AND p.list_seq IS NOT NULL ORDER BY p.list_seq DESC LIMIT $4
               ) AS recent
               JOIN messenger.conversations AS c ON c.id = recent.conversation_id
               WHERE c.user_a_has_written AND c.user_b_has_written AND NOT EXISTS (
                   SELECT FROM messenger.blocks AS b
                   WHERE (b.blocker_id, b.blocked_id) IN ((u.id, recent.other_user_id), (recent.other_user_id, u.id))
               )
               ORDER BY recent.list_seq DESC LIMIT $3
           ) AS "partners!"
           FROM messenger.users AS u WHERE u.id = ANY ($1) AND (u.shares_presence OR $2)"#,
        &users,
        unshared,
        MOST_PARTNERS,
        MOST_CONVERSATIONS,
    )
    .fetch_all(connection)
    .await?;
    let partners = |ids: Vec<i64>| ids.into_iter().map(UserId).collect();
    Ok(rows.into_iter().map(|row| (UserId(row.id), partners(row.partners))).collect())
}

/// Those of these users whose presence `reader` may know, in the order asked, and when they were last online.
pub async fn visible_to(
    connection: &mut PgConnection,
    reader: UserId,
    users: &[UserId],
) -> sqlx::Result<Vec<(UserId, Option<DateTime<Utc>>)>> {
    let users: Vec<i64> = users.iter().map(|user| user.0).collect();
    let rows = sqlx::query!(
        r#"SELECT u.id, l.at AS "at?"
           FROM unnest($2::bigint[]) WITH ORDINALITY AS requested (id, ordinality)
           JOIN messenger.users AS u ON u.id = requested.id AND u.shares_presence
           JOIN messenger.conversations AS c
               ON c.user_a = least($1, u.id) AND c.user_b = greatest($1, u.id) AND c.user_a_has_written AND c.user_b_has_written
           LEFT JOIN messenger.last_seen AS l ON l.user_id = u.id
           WHERE NOT EXISTS (
               SELECT FROM messenger.blocks AS b WHERE (b.blocker_id, b.blocked_id) IN (($1, u.id), (u.id, $1))
           )
           ORDER BY requested.ordinality"#,
        reader.0,
        &users,
    )
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().map(|row| (UserId(row.id), row.at)).collect())
}

/// Now, for those who share it. In the order of ids, so that replicas do not deadlock.
pub async fn note_last_seen(connection: &mut PgConnection, users: &[UserId]) -> sqlx::Result<()> {
    let users: Vec<i64> = users.iter().map(|user| user.0).collect();
    sqlx::query!(
        "INSERT INTO messenger.last_seen (user_id, at)
         SELECT u.id, now() FROM messenger.users AS u WHERE u.id = ANY ($1) AND u.shares_presence ORDER BY u.id
         ON CONFLICT (user_id) DO UPDATE SET at = greatest(last_seen.at, excluded.at)",
        &users,
    )
    .execute(connection)
    .await?;
    Ok(())
}
