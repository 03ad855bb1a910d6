//! Logins. A session that is revoked, expired or not this user's does not exist, for everybody who asks.

use std::time::Duration;

use chrono::{DateTime, Utc};
use protocol::{
    feed::Login,
    ids::{SessionId, UserId},
    position::{Epoch, Position},
};
use sqlx::PgConnection;

use super::number;
use crate::domain::{device, session::ListedSession, user::User};

/// A session and its last second, by the database's clock.
#[derive(Debug, Clone, Copy)]
pub struct Session {
    pub id: SessionId,
    pub expires_at: DateTime<Utc>,
}

/// `device` is what its owner will recognise it by.
pub async fn start(
    connection: &mut PgConnection,
    user: UserId,
    device: &str,
    lifetime: Duration,
) -> sqlx::Result<Session> {
    let row = sqlx::query!(
        "INSERT INTO messenger.sessions (user_id, device, expires_at) VALUES ($1, $2, now() + make_interval(secs => $3))
         RETURNING id, expires_at",
        user.0,
        device,
        lifetime.as_secs_f64(),
    )
    .fetch_one(connection)
    .await?;
    Ok(Session { id: SessionId(row.id), expires_at: row.expires_at })
}

/// Lets a live session live on for another `lifetime`.
pub async fn slide(
    connection: &mut PgConnection,
    session: SessionId,
    user: UserId,
    lifetime: Duration,
) -> sqlx::Result<Option<Session>> {
    let expires_at = sqlx::query_scalar!(
        "UPDATE messenger.sessions SET last_used_at = now(), expires_at = now() + make_interval(secs => $3)
         WHERE id = $1 AND user_id = $2 AND revoked_at IS NULL AND expires_at > now()
         RETURNING expires_at",
        session.0,
        user.0,
        lifetime.as_secs_f64(),
    )
    .fetch_optional(connection)
    .await?;
    Ok(expires_at.map(|expires_at| Session { id: session, expires_at }))
}

pub async fn is_live(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
) -> sqlx::Result<bool> {
    let session = session.map(|session| session.0);
    sqlx::query_scalar!(r#"SELECT messenger.session_is_live($1, $2) AS "live!""#, session, user.0)
        .fetch_one(connection)
        .await
}

/// The live session itself.
pub async fn find(
    connection: &mut PgConnection,
    session: SessionId,
    user: UserId,
) -> sqlx::Result<Option<Session>> {
    let expires_at = sqlx::query_scalar!(
        "SELECT expires_at FROM messenger.sessions
         WHERE id = $1 AND user_id = $2 AND revoked_at IS NULL AND expires_at > now()",
        session.0,
        user.0,
    )
    .fetch_optional(connection)
    .await?;
    Ok(expires_at.map(|expires_at| Session { id: session, expires_at }))
}

/// A user's live sessions, the newest use first.
pub async fn of_user(
    connection: &mut PgConnection,
    user: UserId,
    current: Option<SessionId>,
    limit: i64,
) -> sqlx::Result<Vec<ListedSession>> {
    let rows = sqlx::query!(
        "SELECT id, device, created_at, last_used_at FROM messenger.sessions
         WHERE user_id = $1 AND revoked_at IS NULL AND expires_at > now()
         ORDER BY last_used_at DESC, id DESC
         LIMIT $2",
        user.0,
        limit,
    )
    .fetch_all(connection)
    .await?;
    let listed = rows.into_iter().map(|row| ListedSession {
        id: SessionId(row.id),
        device: if row.device.is_empty() { device::UNKNOWN.to_owned() } else { row.device },
        created_at: row.created_at,
        last_used_at: row.last_used_at,
        current: current == Some(SessionId(row.id)),
    });
    Ok(listed.collect())
}

/// Which sessions of a user are to end.
#[derive(Debug, Clone, Copy)]
pub enum Which {
    One(SessionId),
    /// All but the caller's own.
    Others,
    /// The caller's own.
    Own,
}

/// Ends them, if the caller's session lives: then answers those that ended, else `None`.
///
/// Rows are locked in the order of their ids, so that two who end each other do not wait in a circle.
pub async fn end(
    connection: &mut PgConnection,
    caller: Option<SessionId>,
    user: UserId,
    which: Which,
) -> sqlx::Result<Option<Vec<SessionId>>> {
    let caller = caller.map(|session| session.0);
    let (one, others) = match which {
        Which::One(session) => (Some(session.0), false),
        Which::Others => (None, true),
        Which::Own => (caller, false),
    };
    let row = sqlx::query!(
        r#"WITH caller AS MATERIALIZED (SELECT messenger.session_is_live($1, $2) AS lives),
                ending AS MATERIALIZED (
                    SELECT s.id FROM messenger.sessions AS s, caller
                    WHERE caller.lives AND s.user_id = $2 AND s.revoked_at IS NULL AND s.expires_at > now()
                      AND CASE WHEN $4 THEN s.id IS DISTINCT FROM $1 ELSE s.id = $3 END
                    ORDER BY s.id
                    FOR NO KEY UPDATE OF s
                ),
                ended AS (
                    UPDATE messenger.sessions SET revoked_at = now() WHERE id IN (SELECT id FROM ending) RETURNING id
                )
           SELECT lives AS "lives!", ARRAY(SELECT id FROM ended) AS "ended!" FROM caller"#,
        caller,
        user.0,
        one,
        others,
    )
    .fetch_one(connection)
    .await?;
    Ok(row.lives.then(|| row.ended.into_iter().map(SessionId).collect()))
}

/// Notes that these are in use: moves the time of those where it is older than `coarse`, and says how many.
///
/// A row that somebody else holds is being refreshed or ended, and needs no note.
pub async fn used(connection: &mut PgConnection, logins: &[Login], coarse: Duration) -> sqlx::Result<u64> {
    let (ids, users) = columns(logins);
    let done = sqlx::query!(
        "UPDATE messenger.sessions SET last_used_at = now()
         WHERE id IN (
             SELECT s.id FROM unnest($1::bigint[], $2::bigint[]) AS asked (id, user_id)
                 JOIN messenger.sessions AS s ON s.id = asked.id AND s.user_id = asked.user_id
             WHERE s.last_used_at < now() - make_interval(secs => $3)
               AND s.revoked_at IS NULL AND s.expires_at > now()
             FOR NO KEY UPDATE OF s SKIP LOCKED
         )",
        &ids,
        &users,
        coarse.as_secs_f64(),
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

/// Of the next `rows` sessions after `after`, deletes those that ended longer than `keep` ago. Answers how many, and the
/// last one looked at; `None` when there are no more.
pub async fn delete_ended(
    connection: &mut PgConnection,
    keep: Duration,
    after: SessionId,
    rows: i64,
) -> sqlx::Result<(u64, Option<SessionId>)> {
    let row = sqlx::query!(
        r#"WITH looked_at AS MATERIALIZED (
               SELECT id, least(revoked_at, expires_at) AS ended_at FROM messenger.sessions WHERE id > $1 ORDER BY id LIMIT $2
           ), deleted AS (
               DELETE FROM messenger.sessions WHERE id IN (
                   SELECT id FROM looked_at WHERE ended_at < now() - make_interval(secs => $3)
               ) RETURNING id
           )
           SELECT (SELECT count(*) FROM deleted) AS "deleted!", (SELECT max(id) FROM looked_at) AS last"#,
        after.0,
        rows,
        keep.as_secs_f64(),
    )
    .fetch_one(connection)
    .await?;
    Ok((row.deleted.cast_unsigned(), row.last.map(SessionId)))
}

/// Who is calling, and their place in their feed at this moment: what is read after this is at least as new.
pub async fn caller(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
) -> sqlx::Result<Option<(User, Position)>> {
    let row = sqlx::query!(
        "SELECT u.username, u.avatar_url, h.epoch, h.head_seq
         FROM messenger.users AS u JOIN messenger.feed_heads AS h ON h.user_id = u.id
         WHERE u.id = $2 AND messenger.session_is_live($1, $2)",
        session.map(|session| session.0),
        user.0,
    )
    .fetch_optional(connection)
    .await?;
    row.map(|row| {
        let cursor = Position { epoch: Epoch::from_sql(row.epoch), seq: number(row.head_seq)? };
        Ok((User { id: user, username: row.username, avatar_url: row.avatar_url }, cursor))
    })
    .transpose()
}

/// The logins whose session is revoked, expired, unknown or another user's.
pub async fn ended_logins(connection: &mut PgConnection, asked: &[Login]) -> sqlx::Result<Vec<Login>> {
    if asked.is_empty() {
        return Ok(Vec::new());
    }
    let (ids, users) = columns(asked);
    let ended = sqlx::query!(
        r#"SELECT DISTINCT asked.id AS "id!", asked.user_id AS "user_id!"
           FROM unnest($1::bigint[], $2::bigint[]) AS asked (id, user_id)
           LEFT JOIN LATERAL (
               SELECT * FROM messenger.sessions
               WHERE sessions.id = asked.id AND sessions.user_id = asked.user_id
                 AND revoked_at IS NULL AND expires_at > now()
               LIMIT 1
           ) AS s ON true
           WHERE s.id IS NULL"#,
        &ids,
        &users,
    )
    .fetch_all(connection)
    .await?;
    Ok(ended.into_iter().map(|row| Login { user: UserId(row.user_id), session: SessionId(row.id) }).collect())
}

/// Of many logins: their sessions, and in the same order their users.
fn columns(logins: &[Login]) -> (Vec<i64>, Vec<i64>) {
    logins.iter().map(|login| (login.session.0, login.user.0)).unzip()
}
