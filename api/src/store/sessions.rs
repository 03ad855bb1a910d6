//! Logins. A session that is revoked, expired or not this user's does not exist, for everybody who asks.

use std::time::Duration;

use chrono::{DateTime, Utc};
use shared::{
    cursor::{Cursor, Epoch},
    ids::{SessionId, UserId},
};
use sqlx::PgConnection;

use super::number;
use crate::domain::user::User;

/// A session and its last second, by the database's clock.
#[derive(Debug, Clone, Copy)]
pub struct Session {
    pub id: SessionId,
    pub expires_at: DateTime<Utc>,
}

pub async fn start(connection: &mut PgConnection, user: UserId, lifetime: Duration) -> sqlx::Result<Session> {
    let row = sqlx::query!(
        "INSERT INTO sessions (user_id, expires_at) VALUES ($1, now() + make_interval(secs => $2)) RETURNING id, expires_at",
        user.0,
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
        "UPDATE sessions SET last_used_at = now(), expires_at = now() + make_interval(secs => $3)
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
    sqlx::query_scalar!(r#"SELECT session_is_live($1, $2) AS "live!""#, session, user.0)
        .fetch_one(connection)
        .await
}

/// Who is calling, and their place in their feed at this moment: what is read after this is at least as new.
pub async fn caller(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
) -> sqlx::Result<Option<(User, Cursor)>> {
    let row = sqlx::query!(
        "SELECT u.username, u.avatar_url, h.epoch, h.head_seq
         FROM users AS u JOIN feed_heads AS h ON h.user_id = u.id
         WHERE u.id = $2 AND session_is_live($1, $2)",
        session.map(|session| session.0),
        user.0,
    )
    .fetch_optional(connection)
    .await?;
    row.map(|row| {
        let cursor = Cursor { epoch: Epoch::from_sql(row.epoch), seq: number(row.head_seq)? };
        Ok((User { id: user, username: row.username, avatar_url: row.avatar_url }, cursor))
    })
    .transpose()
}

/// Which of these have ended, or never were?
pub async fn ended(connection: &mut PgConnection, asked: &[SessionId]) -> sqlx::Result<Vec<SessionId>> {
    if asked.is_empty() {
        return Ok(Vec::new());
    }
    let ids: Vec<i64> = asked.iter().map(|id| id.0).collect();
    let ended = sqlx::query_scalar!(
        r#"SELECT DISTINCT asked.id AS "id!"
           FROM unnest($1::bigint[]) AS asked (id)
           LEFT JOIN LATERAL (
               SELECT * FROM sessions WHERE sessions.id = asked.id AND revoked_at IS NULL AND expires_at > now() LIMIT 1
           ) AS s ON true
           WHERE s.id IS NULL"#,
        &ids,
    )
    .fetch_all(connection)
    .await?;
    Ok(ended.into_iter().map(SessionId).collect())
}
