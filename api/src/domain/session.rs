//! A live session as its user sees it in their list.

use chrono::{DateTime, Utc};
use protocol::ids::SessionId;
use serde::Serialize;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListedSession {
    pub id: SessionId,
    pub device: String,
    #[serde(serialize_with = "super::time")]
    pub created_at: DateTime<Utc>,
    /// Within some minutes: the module `last_used` writes it.
    #[serde(serialize_with = "super::time")]
    pub last_used_at: DateTime<Utc>,
    pub current: bool,
}
