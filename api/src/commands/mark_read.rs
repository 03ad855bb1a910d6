//! A user marks a conversation as read, up to a message.

use protocol::ids::{ConversationId, MessageId};

use super::{Actor, CommandContext};
pub use crate::store::messages::MarkReadOutcome;
use crate::{
    request_context::RequestContext,
    store::{StoreError, messages},
};

/// Up to the message `to`, or to the last one.
pub async fn mark_read(
    context: &CommandContext,
    actor: Actor,
    conversation: ConversationId,
    to: Option<MessageId>,
    request: RequestContext,
) -> Result<MarkReadOutcome, StoreError> {
    let commands = context.clone();
    let work = async move {
        let mark = async |connection: &mut _, request: &_| {
            messages::mark_read(connection, actor.session, actor.user, conversation, to, request).await
        };
        commands.commit_in(conversation, actor, request, mark).await
    };
    context.run_to_completion(work).await
}
