//! Identities at issuers and their users, and logins whose token has not been fetched yet.

use std::time::Duration;

use protocol::ids::{SessionId, UserId};
use sqlx::PgConnection;

use super::sessions::Session;
use crate::domain::user::{Profile, User};

/// SHA-256 of a secret that was handed out once.
pub type Hash = [u8; 32];

#[derive(Debug, Clone, Copy)]
pub struct Provisioned {
    pub user: UserId,
    pub created: bool,
}

pub async fn provision(connection: &mut PgConnection, profile: &Profile) -> sqlx::Result<Provisioned> {
    sqlx::query_as!(
        Provisioned,
        r#"SELECT user_id AS "user!", created AS "created!" FROM messenger.provision_user($1, $2, $3, $4)"#,
        profile.issuer,
        profile.subject,
        profile.username,
        profile.avatar_url,
    )
    .fetch_one(connection)
    .await
}

/// The same, and stores their login until both secrets come back, for at most `lifetime`.
pub async fn provision_with_code(
    connection: &mut PgConnection,
    profile: &Profile,
    code: &Hash,
    binding: &Hash,
    lifetime: Duration,
) -> sqlx::Result<Provisioned> {
    sqlx::query_as!(
        Provisioned,
        r#"WITH provisioned AS MATERIALIZED (SELECT * FROM messenger.provision_user($1, $2, $3, $4)),
                stored AS (
                    INSERT INTO messenger.login_codes (code_hash, binding_hash, user_id, expires_at)
                    SELECT $5, $6, user_id, now() + make_interval(secs => $7) FROM provisioned
                )
           SELECT user_id AS "user!", created AS "created!" FROM provisioned"#,
        profile.issuer,
        profile.subject,
        profile.username,
        profile.avatar_url,
        code,
        binding,
        lifetime.as_secs_f64(),
    )
    .fetch_one(connection)
    .await
}

/// The same, and starts a session.
pub async fn log_in(
    connection: &mut PgConnection,
    profile: &Profile,
    device: &str,
    lifetime: Duration,
) -> sqlx::Result<(Provisioned, Session)> {
    let row = sqlx::query!(
        r#"WITH provisioned AS MATERIALIZED (SELECT * FROM messenger.provision_user($1, $2, $3, $4)),
                started AS (
                    INSERT INTO messenger.sessions (user_id, device, expires_at)
                    SELECT user_id, $5, now() + make_interval(secs => $6) FROM provisioned
                    RETURNING id, expires_at
                )
           SELECT user_id AS "user_id!", created AS "created!", started.id, started.expires_at FROM provisioned, started"#,
        profile.issuer,
        profile.subject,
        profile.username,
        profile.avatar_url,
        device,
        lifetime.as_secs_f64(),
    )
    .fetch_one(connection)
    .await?;
    let provisioned = Provisioned { user: UserId(row.user_id), created: row.created };
    Ok((provisioned, Session { id: SessionId(row.id), expires_at: row.expires_at }))
}

/// Uses a code and starts its session, both or neither. Of concurrent requests one deletes the row. With another browser's
/// binding the code stays.
pub async fn use_code(
    connection: &mut PgConnection,
    code: &Hash,
    bindings: &[Hash],
    device: &str,
    lifetime: Duration,
) -> sqlx::Result<Option<(User, Session)>> {
    let bindings: Vec<_> = bindings.iter().map(|binding| binding.to_vec()).collect();
    let row = sqlx::query!(
        "WITH used AS (
             DELETE FROM messenger.login_codes AS c USING messenger.users AS u
             WHERE c.code_hash = $1 AND c.binding_hash = ANY ($2) AND c.expires_at > now() AND u.id = c.user_id
             RETURNING u.id, u.username, u.avatar_url
         ), started AS (
             INSERT INTO messenger.sessions (user_id, device, expires_at)
             SELECT id, $3, now() + make_interval(secs => $4) FROM used
             RETURNING id, expires_at
         )
         SELECT used.id AS user_id, username, avatar_url, started.id, started.expires_at FROM used, started",
        code,
        &bindings,
        device,
        lifetime.as_secs_f64(),
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(|row| {
        let user = User { id: UserId(row.user_id), username: row.username, avatar_url: row.avatar_url };
        (user, Session { id: SessionId(row.id), expires_at: row.expires_at })
    }))
}

pub async fn delete_expired_codes(connection: &mut PgConnection, limit: i64) -> sqlx::Result<u64> {
    let deleted = sqlx::query!(
        "DELETE FROM messenger.login_codes WHERE code_hash IN (
             SELECT code_hash FROM messenger.login_codes WHERE expires_at <= now() ORDER BY expires_at LIMIT $1 FOR UPDATE SKIP LOCKED
         )",
        limit,
    )
    .execute(connection)
    .await?;
    Ok(deleted.rows_affected())
}

pub struct KnownSubject {
    pub subject: String,
    pub user: UserId,
    pub avatar_url: Option<String>,
}

/// Each by its key, as [`super::feed`] looks up: there are no statistics of subjects.
pub async fn find_subjects(
    connection: &mut PgConnection,
    issuer: &str,
    subjects: &[String],
) -> sqlx::Result<Vec<KnownSubject>> {
    sqlx::query_as!(
        KnownSubject,
        r#"SELECT requested.subject AS "subject!", u.id AS "user", u.avatar_url
           FROM unnest($2::text[]) AS requested (subject)
           JOIN LATERAL (
               SELECT * FROM messenger.identities
               WHERE identities.issuer = $1 AND identities.subject = requested.subject LIMIT 1
           ) AS i ON true
           JOIN LATERAL (SELECT * FROM messenger.users WHERE users.id = i.user_id LIMIT 1) AS u ON true"#,
        issuer,
        subjects,
    )
    .fetch_all(connection)
    .await
}
