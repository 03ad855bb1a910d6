//! A conversation as one of its two users sees it.

use protocol::ids::{ConversationId, MessageId};
use serde::Serialize;

use super::{message::Message, user::User};

/// The same JSON as SQL `conversation_json()` writes into events.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Conversation {
    pub id: ConversationId,
    pub other_participant: User,
    pub last_message: Option<Message>,
    pub has_unread_messages: bool,
    pub unread_count: i64,
    pub last_read_message_id: Option<MessageId>,
    pub other_last_read_message_id: Option<MessageId>,
}
