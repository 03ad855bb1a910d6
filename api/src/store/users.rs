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

/// The first names with this prefix, whatever its case, without `me`. A range and no pattern: every character of the prefix is
/// a plain one, and the index serves it whatever the plan. U+10FFFF comes after every character that a name has.
pub async fn names_with_prefix(
    connection: &mut PgConnection,
    prefix: &str,
    me: UserId,
) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"SELECT username FROM users
           WHERE lower(username) COLLATE "C" >= lower($1) AND lower(username) COLLATE "C" < lower($1) || chr(1114111)
             AND id <> $2
           ORDER BY lower(username) COLLATE "C", username COLLATE "C"
           LIMIT $3"#,
        prefix,
        me.0,
        SUGGESTIONS,
    )
    .fetch_all(connection)
    .await
}
