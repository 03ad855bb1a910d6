//! The events of a feed, as one receiver sees them. This is the only place that makes their JSON: what is published after a commit and
//! what is read from the feed later come from here, as REST answers come from the same types.

use chrono::{DateTime, Utc};
use protocol::{
    event::kind,
    ids::{ConversationId, MessageId, UserId},
};
use serde::Serialize;

use super::{
    conversation::{Conversation, Role},
    message::Message,
    user::User,
};

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Event {
    /// Somebody else's message.
    Message(Message),
    MessageSent(MessageSent),
    /// A message as it is now, the receiver's own or somebody else's.
    MessageUpdated(Message),
    MessageDeleted(MessageDeleted),
    ConversationCreated(Box<Conversation>),
    ConversationRead(ConversationRead),
    ReceiptRead(ReceiptRead),
    UserUpdated(User),
    /// The title of a group.
    ConversationUpdated(Box<Conversation>),
    ParticipantJoined(ParticipantJoined),
    ParticipantLeft(ParticipantLeft),
    /// The role of a member.
    ParticipantUpdated(ParticipantUpdated),
}

/// The receiver's own message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MessageSent {
    #[serde(flatten)]
    pub message: Message,
    /// Only when it is published: keys are not stored.
    pub idempotency_key: Option<String>,
}

/// A message that the receiver could see is deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MessageDeleted {
    pub id: MessageId,
    pub conversation_id: ConversationId,
    #[serde(serialize_with = "super::time")]
    pub deleted_at: DateTime<Utc>,
    /// The receiver's in this conversation, without the message.
    pub unread_count: i64,
}

/// The receiver has read up to this message, on some device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConversationRead {
    pub conversation_id: ConversationId,
    pub last_read_message_id: MessageId,
    pub unread_count: i64,
}

/// Another user has read up to this message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReceiptRead {
    pub conversation_id: ConversationId,
    pub user_id: UserId,
    pub last_read_message_id: MessageId,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ParticipantJoined {
    pub conversation_id: ConversationId,
    pub user: User,
    pub role: Role,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ParticipantLeft {
    pub conversation_id: ConversationId,
    pub user_id: UserId,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ParticipantUpdated {
    pub conversation_id: ConversationId,
    pub user_id: UserId,
    pub role: Role,
}

impl Event {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Message(_) => kind::MESSAGE,
            Self::MessageSent(_) => kind::MESSAGE_SENT,
            Self::MessageUpdated(_) => kind::MESSAGE_UPDATED,
            Self::MessageDeleted(_) => kind::MESSAGE_DELETED,
            Self::ConversationCreated(_) => kind::CONVERSATION_CREATED,
            Self::ConversationRead(_) => kind::CONVERSATION_READ,
            Self::ReceiptRead(_) => kind::RECEIPT_READ,
            Self::UserUpdated(_) => kind::USER_UPDATED,
            Self::ConversationUpdated(_) => kind::CONVERSATION_UPDATED,
            Self::ParticipantJoined(_) => kind::PARTICIPANT_JOINED,
            Self::ParticipantLeft(_) => kind::PARTICIPANT_LEFT,
            Self::ParticipantUpdated(_) => kind::PARTICIPANT_UPDATED,
        }
    }
}

/// An event in no feed, for those who are connected now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum EphemeralEvent {
    Typing(Typing),
    Presence(Presence),
}

/// The user types, at least until then or their next message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Typing {
    pub conversation_id: ConversationId,
    pub user_id: UserId,
    #[serde(serialize_with = "super::time")]
    pub expires_at: DateTime<Utc>,
}

/// Whether a partner is online.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Presence {
    pub user_id: UserId,
    pub online: bool,
    /// `None` while they are online, or if it is not known.
    #[serde(serialize_with = "super::optional_time")]
    pub last_seen_at: Option<DateTime<Utc>>,
}

impl EphemeralEvent {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Typing(_) => kind::TYPING,
            Self::Presence(_) => kind::PRESENCE,
        }
    }
}
