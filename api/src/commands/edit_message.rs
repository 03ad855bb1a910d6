//! A user changes the text of their message.

use std::time::Duration;

use protocol::ids::{ConversationId, MessageId};

use super::{Actor, CommandContext};
pub use crate::store::messages::EditMessageOutcome;
use crate::{
    domain::message::Content,
    request_context::RequestContext,
    store::{StoreError, messages},
};

#[derive(Debug)]
pub struct Edit {
    pub conversation: ConversationId,
    /// `None` if it cannot exist.
    pub message: Option<MessageId>,
    pub content: Content,
}

/// Messages older than `window` keep their text.
pub async fn edit_message(
    context: &CommandContext,
    actor: Actor,
    Edit { conversation, message, content }: Edit,
    window: Duration,
    request: RequestContext,
) -> Result<EditMessageOutcome, StoreError> {
    let commands = context.clone();
    let work = async move {
        let edit = async |connection: &mut _, request: &_| {
            let Actor { session, user } = actor;
            messages::edit(connection, session, user, conversation, message, &content, window, request).await
        };
        commands.commit_in(conversation, actor, request, edit).await
    };
    context.run_to_completion(work).await
}
