//! A conversation as one of its users sees it.

use protocol::ids::{ConversationId, MessageId};
use serde::{Deserialize, Serialize};

use super::{message::Message, user::User};

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Conversation {
    pub id: ConversationId,
    pub kind: ConversationKind,
    /// Of a group. `None` in a replayed event whose receiver has left the group.
    pub title: Option<String>,
    pub participant_count: i64,
    pub role: Role,
    /// `None` in a group.
    pub other_participant: Option<User>,
    /// The last one that the user sees.
    pub last_message: Option<Message>,
    pub has_unread_messages: bool,
    pub unread_count: i64,
    pub last_read_message_id: Option<MessageId>,
    /// `None` in a group.
    pub other_last_read_message_id: Option<MessageId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum ConversationKind {
    /// Of two users.
    Direct,
    Group,
}

/// What a user may do in a group; in a direct conversation both are members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Role {
    Owner,
    Member,
}

impl Role {
    pub fn stored(is_owner: bool) -> Self {
        if is_owner { Self::Owner } else { Self::Member }
    }
}
