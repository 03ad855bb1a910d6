//! A user sends a message.

use protocol::ids::ConversationId;

use super::{Actor, CommandContext};
pub use crate::store::messages::PostMessageOutcome;
use crate::{
    domain::{idempotency::IdempotencyKey, message::Content},
    request_context::RequestContext,
    store::{StoreError, messages},
};

#[derive(Debug)]
pub struct Draft {
    pub conversation: ConversationId,
    pub content: Content,
    pub key: Option<IdempotencyKey>,
}

pub async fn post_message(
    context: &CommandContext,
    actor: Actor,
    Draft { conversation, content, key }: Draft,
    request: RequestContext,
) -> Result<PostMessageOutcome, StoreError> {
    let commands = context.clone();
    let work = async move {
        let post = async |connection: &mut _, request: &_| {
            let Actor { session, user } = actor;
            messages::post(connection, session, user, conversation, &content, key.as_ref(), request).await
        };
        commands.commit_in(conversation, actor, request, post).await
    };
    context.run_to_completion(work).await
}
