//! A user deletes their message, or an owner one of the group's.

use protocol::ids::{ConversationId, MessageId};

use super::{Actor, CommandContext};
pub use crate::store::messages::DeleteMessageOutcome;
use crate::{
    request_context::RequestContext,
    store::{StoreError, messages},
};

/// `message`: `None` if it cannot exist.
pub async fn delete_message(
    context: &CommandContext,
    actor: Actor,
    conversation: ConversationId,
    message: Option<MessageId>,
    request: RequestContext,
) -> Result<DeleteMessageOutcome, StoreError> {
    let commands = context.clone();
    let work = async move {
        let delete = async |connection: &mut _, request: &_| {
            messages::delete(connection, actor.session, actor.user, conversation, message, request).await
        };
        commands.commit_in(conversation, actor, request, delete).await
    };
    context.run_to_completion(work).await
}
