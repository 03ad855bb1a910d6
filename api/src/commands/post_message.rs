//! A user writes in a conversation.

use protocol::ids::ConversationId;
use thiserror::Error;

use super::{Actor, CommandError, Context};
use crate::{
    domain::message::{Content, IdempotencyKey, Message},
    request_context::RequestContext,
    store::messages::{self, Posted},
};

#[derive(Debug)]
pub struct Draft {
    pub conversation: ConversationId,
    pub content: Content,
    pub key: Option<IdempotencyKey>,
}

/// The message, and whether an earlier send with the same key had made it.
#[derive(Debug)]
pub struct Sent {
    pub message: Message,
    pub replayed: bool,
}

#[derive(Debug, Error)]
pub enum Refusal {
    #[error("the key was used for another message")]
    KeyConflict,
    #[error("no conversation of the sender")]
    NoConversation,
}

pub async fn post_message(
    context: &Context,
    actor: Actor,
    draft: Draft,
    request: RequestContext,
) -> Result<Sent, CommandError<Refusal>> {
    let commands = context.clone();
    let work = async move {
        let Draft { conversation, content, key } = draft;
        let posted = commands
            .commit(actor, request, async |connection, request| {
                let Actor { session, user } = actor;
                messages::post(connection, session, user, conversation, &content, key.as_ref(), request).await
            })
            .await?;
        let message = |id, created_at| Message {
            id,
            content: content.as_str().to_owned(),
            conversation_id: Some(conversation),
            created_at,
            mine: true,
        };
        Ok(match posted {
            Posted::New(id, created_at, events) => {
                commands.publisher.publish(events);
                Ok(Sent { message: message(id, created_at), replayed: false })
            }
            Posted::Replayed(id, created_at) => Ok(Sent { message: message(id, created_at), replayed: true }),
            Posted::KeyConflict => Err(CommandError::Refused(Refusal::KeyConflict)),
            Posted::NoConversation => Err(CommandError::Refused(Refusal::NoConversation)),
            Posted::NoSession => Err(CommandError::NoSession),
        })
    };
    context.to_its_end(work).await?
}
