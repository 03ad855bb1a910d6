//! A person, as the others see one.

use serde::Serialize;
use shared::ids::UserId;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct User {
    pub id: UserId,
    pub username: String,
    #[serde(rename = "avatarURL")]
    pub avatar_url: Option<String>,
}

/// Can anybody have this name? Postgres cannot hold U+0000 in a text, so nobody has such a name, and asking would be an error.
pub fn may_be_a_name(text: &str) -> bool {
    !text.is_empty() && !text.contains('\0')
}
