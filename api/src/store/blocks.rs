//! Blocks. Their effects are in `post_message()`, `start_conversation()` and in the queries that read messages.

use protocol::ids::{SessionId, UserId};
use sqlx::PgConnection;

use crate::domain::user::User;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockUserOutcome {
    /// Also if nothing had to change.
    Done,
    /// There is no such user, or it is the caller.
    NoUser,
    NoSession,
}

/// Blocks the user `other`, or ends the block.
pub async fn set(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
    other: UserId,
    blocked: bool,
) -> sqlx::Result<BlockUserOutcome> {
    let row = sqlx::query!(
        r#"WITH caller AS MATERIALIZED (SELECT messenger.session_is_live($1, $2) AS is_live),
                other AS (SELECT id FROM messenger.users WHERE id = $3 AND id <> $2),
                made AS (
                    INSERT INTO messenger.blocks (blocker_id, blocked_id)
                    SELECT $2, other.id FROM other, caller WHERE caller.is_live AND $4
                    ON CONFLICT DO NOTHING
                ),
                ended AS (
                    DELETE FROM messenger.blocks USING caller
                    WHERE caller.is_live AND NOT $4 AND blocker_id = $2 AND blocked_id = $3
                )
           SELECT is_live AS "is_live!", EXISTS (SELECT FROM other) AS "found!" FROM caller"#,
        session.map(|session| session.0),
        user.0,
        other.0,
        blocked,
    )
    .fetch_one(connection)
    .await?;
    Ok(match (row.is_live, row.found) {
        (false, _) => BlockUserOutcome::NoSession,
        (true, false) => BlockUserOutcome::NoUser,
        (true, true) => BlockUserOutcome::Done,
    })
}

/// The users whom `user` blocks, the newest block first.
pub async fn of_user(connection: &mut PgConnection, user: UserId) -> sqlx::Result<Vec<User>> {
    sqlx::query_as!(
        User,
        "SELECT u.id, u.username, u.avatar_url
         FROM messenger.blocks AS b JOIN messenger.users AS u ON u.id = b.blocked_id
         WHERE b.blocker_id = $1
         ORDER BY b.created_at DESC, b.blocked_id DESC",
        user.0,
    )
    .fetch_all(connection)
    .await
}
