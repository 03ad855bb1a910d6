//! Users by name.

use protocol::ids::UserId;
use sqlx::PgConnection;

use crate::domain::user::User;

const SUGGESTIONS: i64 = 5;

pub async fn find_by_name(connection: &mut PgConnection, username: &str) -> sqlx::Result<Option<User>> {
    sqlx::query_as!(
        User,
        "SELECT id, username, avatar_url FROM messenger.users WHERE id = (SELECT messenger.find_user($1))",
        username
    )
    .fetch_optional(connection)
    .await
}

/// The first names with this prefix, in any case and normal form, without `me`. A range, not a pattern: no character of the prefix is
/// special, and every plan uses the index. U+10FFFF sorts after every character of a name.
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
