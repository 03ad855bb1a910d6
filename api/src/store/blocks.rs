//! Blocks: who does not want to hear from whom. What they change is in `post_message()`, `start_conversation()` and in what
//! readers of messages see.

use protocol::ids::{SessionId, UserId};
use sqlx::PgConnection;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockUserOutcome {
    /// It is as wanted, whether or not it was before.
    Done,
    /// There is no such user, or it is the caller.
    NoUser,
    NoSession,
}

impl BlockUserOutcome {
    fn from_row(lives: bool, found: bool) -> Self {
        match (lives, found) {
            (false, _) => Self::NoSession,
            (true, false) => Self::NoUser,
            (true, true) => Self::Done,
        }
    }
}

pub async fn block(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
    blocked: UserId,
) -> sqlx::Result<BlockUserOutcome> {
    let row = sqlx::query!(
        r#"WITH caller AS MATERIALIZED (SELECT messenger.session_is_live($1, $2) AS lives),
                other AS (SELECT id FROM messenger.users WHERE id = $3 AND id <> $2),
                made AS (
                    INSERT INTO messenger.blocks (blocker_id, blocked_id) SELECT $2, other.id FROM other, caller WHERE caller.lives
                    ON CONFLICT DO NOTHING
                )
           SELECT lives AS "lives!", EXISTS (SELECT FROM other) AS "found!" FROM caller"#,
        session.map(|session| session.0),
        user.0,
        blocked.0,
    )
    .fetch_one(connection)
    .await?;
    Ok(BlockUserOutcome::from_row(row.lives, row.found))
}

pub async fn unblock(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
    blocked: UserId,
) -> sqlx::Result<BlockUserOutcome> {
    let row = sqlx::query!(
        r#"WITH caller AS MATERIALIZED (SELECT messenger.session_is_live($1, $2) AS lives),
                other AS (SELECT id FROM messenger.users WHERE id = $3 AND id <> $2),
                ended AS (
                    DELETE FROM messenger.blocks USING caller WHERE caller.lives AND blocker_id = $2 AND blocked_id = $3
                )
           SELECT lives AS "lives!", EXISTS (SELECT FROM other) AS "found!" FROM caller"#,
        session.map(|session| session.0),
        user.0,
        blocked.0,
    )
    .fetch_one(connection)
    .await?;
    Ok(BlockUserOutcome::from_row(row.lives, row.found))
}
