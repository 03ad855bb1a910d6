//! Accounts elsewhere and the users that they are here, and logins that wait to be fetched.

use std::time::Duration;

use shared::ids::UserId;
use sqlx::PgConnection;

use crate::domain::user::{Profile, User};

/// SHA-256 of something that was given out once.
pub type Hash = [u8; 32];

/// The user of this profile, who is made at the first login. `true`: just now.
pub async fn provision(connection: &mut PgConnection, profile: &Profile) -> sqlx::Result<(UserId, bool)> {
    let row = sqlx::query!(
        r#"SELECT user_id AS "user_id!", created AS "created!" FROM provision_user($1, $2, $3, $4)"#,
        profile.issuer,
        profile.subject,
        profile.username,
        profile.avatar_url,
    )
    .fetch_one(connection)
    .await?;
    Ok((UserId(row.user_id), row.created))
}

/// Keeps a login for whoever brings both halves back in time.
pub async fn keep_code(
    connection: &mut PgConnection,
    code: &Hash,
    binding: &Hash,
    user: UserId,
    lifetime: Duration,
) -> sqlx::Result<()> {
    sqlx::query!(
        "INSERT INTO login_codes (code_hash, binding_hash, user_id, expires_at)
         VALUES ($1, $2, $3, now() + make_interval(secs => $4))",
        code,
        binding,
        user.0,
        lifetime.as_secs_f64(),
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Uses a code up, whichever replica is asked, and however many at once: one of them deletes the row. With another browser's
/// binding it is left for the one whose it is.
pub async fn use_code(
    connection: &mut PgConnection,
    code: &Hash,
    binding: &Hash,
) -> sqlx::Result<Option<User>> {
    sqlx::query_as!(
        User,
        "DELETE FROM login_codes AS c USING users AS u
         WHERE c.code_hash = $1 AND c.binding_hash = $2 AND c.expires_at > now() AND u.id = c.user_id
         RETURNING u.id, u.username, u.avatar_url",
        code,
        binding,
    )
    .fetch_optional(connection)
    .await
}

/// Deletes up to `limit` codes that nobody fetched in time.
pub async fn delete_expired_codes(connection: &mut PgConnection, limit: i64) -> sqlx::Result<u64> {
    let deleted = sqlx::query!(
        "DELETE FROM login_codes WHERE code_hash IN (
             SELECT code_hash FROM login_codes WHERE expires_at <= now() ORDER BY expires_at LIMIT $1 FOR UPDATE SKIP LOCKED
         )",
        limit,
    )
    .execute(connection)
    .await?;
    Ok(deleted.rows_affected())
}

/// A subject who is a user here.
pub struct Known {
    pub subject: String,
    pub user: UserId,
    pub avatar_url: Option<String>,
}

/// Those of an issuer's subjects who are users here.
pub async fn known(
    connection: &mut PgConnection,
    issuer: &str,
    subjects: &[String],
) -> sqlx::Result<Vec<Known>> {
    sqlx::query_as!(
        Known,
        r#"SELECT i.subject, u.id AS "user", u.avatar_url
           FROM identities AS i JOIN users AS u ON u.id = i.user_id
           WHERE i.issuer = $1 AND i.subject = ANY ($2)"#,
        issuer,
        subjects,
    )
    .fetch_all(connection)
    .await
}
