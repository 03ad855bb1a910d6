//! A login of a user that still lives, as its owner sees it in their list.

use chrono::{DateTime, Utc};
use protocol::ids::SessionId;
use serde::Serialize;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListedSession {
    pub id: SessionId,
    /// What its owner recognises it by.
    pub device: String,
    #[serde(serialize_with = "super::time")]
    pub created_at: DateTime<Utc>,
    /// Within some minutes: see [`crate::last_used`].
    #[serde(serialize_with = "super::time")]
    pub last_used_at: DateTime<Utc>,
    /// The one by which the list was asked for.
    pub current: bool,
}
