//! People.

use shared::ids::UserId;
use sqlx::PgConnection;

use crate::domain::user::User;

/// The names that are suggested for a prefix.
const SUGGESTIONS: i64 = 5;

pub async fn find_by_name(connection: &mut PgConnection, username: &str) -> sqlx::Result<Option<User>> {
    sqlx::query_as!(User, "SELECT id, username, avatar_url FROM users WHERE username = $1", username)
        .fetch_optional(connection)
        .await
}

/// The first names with this prefix, whatever its case, without `me`. Every character of the prefix is a plain one.
pub async fn names_with_prefix(
    connection: &mut PgConnection,
    prefix: &str,
    me: UserId,
) -> sqlx::Result<Vec<String>> {
    let escaped = prefix.replace('\\', r"\\").replace('%', r"\%").replace('_', r"\_");
    sqlx::query_scalar!(
        r#"SELECT username FROM users
           WHERE lower(username) COLLATE "C" LIKE lower($1) || '%' AND id <> $2
           ORDER BY lower(username) COLLATE "C", username COLLATE "C"
           LIMIT $3"#,
        escaped,
        me.0,
        SUGGESTIONS,
    )
    .fetch_all(connection)
    .await
}
