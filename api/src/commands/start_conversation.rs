//! A user starts a conversation with another one.

use super::{Actor, CommandContext};
pub use crate::store::conversations::StartConversationOutcome;
use crate::{
    request_context::RequestContext,
    store::{StoreError, conversations},
};

pub async fn start_conversation(
    context: &CommandContext,
    actor: Actor,
    username: String,
    request: RequestContext,
) -> Result<StartConversationOutcome, StoreError> {
    let commands = context.clone();
    let work = async move {
        let start = async |connection: &mut _, request: &_| {
            conversations::start(connection, actor.session, actor.user, &username, request).await
        };
        commands.commit(actor, request, start).await
    };
    context.run_to_completion(work).await
}
