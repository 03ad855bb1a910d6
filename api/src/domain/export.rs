//! What is exported of a user: their own rows and what they wrote, one JSON object a line. Others are in it by their ids alone.

use chrono::{DateTime, Utc};
use protocol::ids::{ConversationId, MessageId, SessionId, UserId};
use serde::Serialize;

use super::{
    conversation::{ConversationKind, Role},
    optional_time, time,
    user::AddableBy,
};

#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum ExportedLine {
    User {
        id: UserId,
        username: String,
        #[serde(rename = "avatarURL")]
        avatar_url: Option<String>,
        shares_presence: bool,
        addable_by: AddableBy,
        #[serde(serialize_with = "time")]
        created_at: DateTime<Utc>,
        #[serde(serialize_with = "optional_time")]
        last_seen_at: Option<DateTime<Utc>>,
    },
    Identity {
        issuer: String,
        subject: String,
        #[serde(serialize_with = "time")]
        created_at: DateTime<Utc>,
    },
    Session {
        id: SessionId,
        device: String,
        #[serde(serialize_with = "time")]
        created_at: DateTime<Utc>,
        #[serde(serialize_with = "time")]
        last_used_at: DateTime<Utc>,
        #[serde(serialize_with = "time")]
        expires_at: DateTime<Utc>,
        #[serde(serialize_with = "optional_time")]
        revoked_at: Option<DateTime<Utc>>,
    },
    Block {
        user_id: UserId,
        #[serde(serialize_with = "time")]
        created_at: DateTime<Utc>,
    },
    /// Followed by the user's messages in it. `role`: none after leaving.
    Conversation {
        id: ConversationId,
        kind: ConversationKind,
        title: Option<String>,
        other_user_id: Option<UserId>,
        role: Option<Role>,
        #[serde(serialize_with = "time")]
        joined_at: DateTime<Utc>,
        last_read_message_id: Option<MessageId>,
    },
    Message {
        id: MessageId,
        conversation_id: ConversationId,
        content: String,
        #[serde(serialize_with = "time")]
        created_at: DateTime<Utc>,
        #[serde(serialize_with = "optional_time")]
        edited_at: Option<DateTime<Utc>>,
        #[serde(serialize_with = "optional_time")]
        deleted_at: Option<DateTime<Utc>>,
    },
    /// The last line: nothing is missing.
    End,
}
