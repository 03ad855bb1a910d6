//! Sessions. One that is revoked, expired or another user's is treated as absent everywhere.

use std::time::Duration;

use chrono::{DateTime, Utc};
use protocol::{
    feed::Login,
    ids::{SessionId, UserId},
    position::Position,
};
use sqlx::PgConnection;

use super::{position, unexpected};
use crate::domain::{
    device,
    session::ListedSession,
    user::{AddableBy, OwnUser, User},
};

/// `expires_at` is by the database's clock.
#[derive(Debug, Clone, Copy)]
pub struct Session {
    pub id: SessionId,
    pub expires_at: DateTime<Utc>,
}

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

/// For the user of this subject; `None` if there is none.
pub async fn start_for_subject(
    connection: &mut PgConnection,
    issuer: &str,
    subject: &str,
    device: &str,
    lifetime: Duration,
) -> sqlx::Result<Option<(UserId, Session)>> {
    let row = sqlx::query!(
        "INSERT INTO messenger.sessions (user_id, device, expires_at)
         SELECT i.user_id, $3, now() + make_interval(secs => $4)
         FROM messenger.identities AS i WHERE i.issuer = $1 AND i.subject = $2
         RETURNING user_id, id, expires_at",
        issuer,
        subject,
        device,
        lifetime.as_secs_f64(),
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(|row| (UserId(row.user_id), Session { id: SessionId(row.id), expires_at: row.expires_at })))
}

pub async fn extend(
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

/// A user's live sessions, the most recently used first.
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

#[derive(Debug, Clone, Copy)]
pub enum SessionsToEnd {
    One(SessionId),
    Others,
    Own,
}

/// Ends sessions and returns their ids; `None` if the caller's own session is not live.
///
/// Rows are locked in the order of their ids, so that two sessions that end each other do not deadlock.
pub async fn end(
    connection: &mut PgConnection,
    caller: Option<SessionId>,
    user: UserId,
    which: SessionsToEnd,
) -> sqlx::Result<Option<Vec<SessionId>>> {
    let caller = caller.map(|session| session.0);
    let (one, others) = match which {
        SessionsToEnd::One(session) => (Some(session.0), false),
        SessionsToEnd::Others => (None, true),
        SessionsToEnd::Own => (caller, false),
    };
    let row = sqlx::query!(
        r#"WITH caller AS MATERIALIZED (SELECT messenger.session_is_live($1, $2) AS is_live),
                ending AS MATERIALIZED (
                    SELECT s.id FROM messenger.sessions AS s, caller
                    WHERE caller.is_live AND s.user_id = $2 AND s.revoked_at IS NULL AND s.expires_at > now()
                      AND CASE WHEN $4 THEN s.id IS DISTINCT FROM $1 ELSE s.id = $3 END
                    ORDER BY s.id
                    FOR NO KEY UPDATE OF s
                ),
                ended AS (
                    UPDATE messenger.sessions SET revoked_at = now() WHERE id IN (SELECT id FROM ending) RETURNING id
                )
           SELECT is_live AS "is_live!", ARRAY(SELECT id FROM ended) AS "ended!" FROM caller"#,
        caller,
        user.0,
        one,
        others,
    )
    .fetch_one(connection)
    .await?;
    Ok(row.is_live.then(|| row.ended.into_iter().map(SessionId).collect()))
}

/// Sets `last_used_at` where it is older than `coarse`; returns how many rows changed. A locked row is being refreshed or ended, and
/// is skipped.
pub async fn touch(connection: &mut PgConnection, logins: &[Login], coarse: Duration) -> sqlx::Result<u64> {
    let (ids, users) = columns(logins);
    let done = sqlx::query!(
        "UPDATE messenger.sessions SET last_used_at = now()
         WHERE id IN (
             SELECT s.id FROM unnest($1::bigint[], $2::bigint[]) AS requested (id, user_id)
                 JOIN messenger.sessions AS s ON s.id = requested.id AND s.user_id = requested.user_id
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

/// Deletes, among the next `rows` sessions after `after`, the ones that ended longer than `keep` ago. Returns how many, and
/// the last session examined; `None` if there are no more.
pub async fn delete_ended(
    connection: &mut PgConnection,
    keep: Duration,
    after: SessionId,
    rows: i64,
) -> sqlx::Result<(u64, Option<SessionId>)> {
    let row = sqlx::query!(
        r#"WITH scanned AS MATERIALIZED (
               SELECT id, least(revoked_at, expires_at) AS ended_at FROM messenger.sessions WHERE id > $1 ORDER BY id LIMIT $2
           ), deleted AS (
               DELETE FROM messenger.sessions WHERE id IN (
                   SELECT id FROM scanned WHERE ended_at < now() - make_interval(secs => $3)
               ) RETURNING id
           )
           SELECT (SELECT count(*) FROM deleted) AS "deleted!", (SELECT max(id) FROM scanned) AS last"#,
        after.0,
        rows,
        keep.as_secs_f64(),
    )
    .fetch_one(connection)
    .await?;
    Ok((row.deleted.cast_unsigned(), row.last.map(SessionId)))
}

pub struct FoundCaller {
    pub user: OwnUser,
    pub head: Position,
    /// Unread messages in all conversations, as of `head`.
    pub unread_total: i64,
}

/// The caller and their head at this moment: everything that is read later is at least as new.
pub async fn caller(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
) -> sqlx::Result<Option<FoundCaller>> {
    let row = sqlx::query!(
        "SELECT u.username, u.avatar_url, u.shares_presence, u.addable_by, h.epoch, h.head_seq, h.unread_total
         FROM messenger.users AS u JOIN messenger.feed_heads AS h ON h.user_id = u.id
         WHERE u.id = $2 AND messenger.session_is_live($1, $2)",
        session.map(|session| session.0),
        user.0,
    )
    .fetch_optional(connection)
    .await?;
    row.map(|row| {
        let user = User { id: user, username: row.username, avatar_url: row.avatar_url };
        let addable_by = AddableBy::parse(&row.addable_by).ok_or_else(|| unexpected(&row.addable_by))?;
        Ok(FoundCaller {
            user: OwnUser { user, shares_presence: row.shares_presence, addable_by },
            head: position(row.epoch, row.head_seq)?,
            unread_total: row.unread_total,
        })
    })
    .transpose()
}

/// The logins whose session is revoked, expired, unknown or another user's.
pub async fn ended_logins(connection: &mut PgConnection, requested: &[Login]) -> sqlx::Result<Vec<Login>> {
    if requested.is_empty() {
        return Ok(Vec::new());
    }
    let (ids, users) = columns(requested);
    let ended = sqlx::query!(
        r#"SELECT DISTINCT requested.id AS "id!", requested.user_id AS "user_id!"
           FROM unnest($1::bigint[], $2::bigint[]) AS requested (id, user_id)
           LEFT JOIN LATERAL (
               SELECT * FROM messenger.sessions
               WHERE sessions.id = requested.id AND sessions.user_id = requested.user_id
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

fn columns(logins: &[Login]) -> (Vec<i64>, Vec<i64>) {
    logins.iter().map(|login| (login.session.0, login.user.0)).unzip()
}
