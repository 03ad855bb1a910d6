//! People.

use protocol::ids::UserId;
use sqlx::PgConnection;

use crate::domain::user::User;

/// The names that are suggested for a prefix.
const SUGGESTIONS: i64 = 5;

/// SQL `find_user()`.
pub async fn find_by_name(connection: &mut PgConnection, username: &str) -> sqlx::Result<Option<User>> {
    sqlx::query_as!(
        User,
        "SELECT id, username, avatar_url FROM messenger.users WHERE id = (SELECT messenger.find_user($1))",
        username
    )
    .fetch_optional(connection)
    .await
}

/// The first names with this prefix, whatever its case and normal form, without `me`. A range and no pattern: every character of the prefix is
/// a plain one, and the index serves it whatever the plan. U+10FFFF comes after every character that a name has.
pub async fn names_with_prefix(
    connection: &mut PgConnection,
    prefix: &str,
    me: UserId,
) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"SELECT username FROM messenger.users
           WHERE messenger.fold_name(username) COLLATE "C" >= messenger.fold_name($1)
             AND messenger.fold_name(username) COLLATE "C" < messenger.fold_name($1) || chr(1114111)
             AND id <> $2
           ORDER BY messenger.fold_name(username) COLLATE "C", username COLLATE "C"
           LIMIT $3"#,
        prefix,
        me.0,
        SUGGESTIONS,
    )
    .fetch_all(connection)
    .await
}
