//! An owner gives a group another title.

use protocol::ids::ConversationId;

use super::{Actor, CommandContext};
use crate::{
    domain::{conversation::Conversation, group::Title},
    request_context::RequestContext,
    store::{
        StoreError,
        groups::{self, Refusal},
    },
};

pub async fn rename_group(
    context: &CommandContext,
    actor: Actor,
    conversation: ConversationId,
    title: Title,
    request: RequestContext,
) -> Result<Result<Box<Conversation>, Refusal>, StoreError> {
    let commands = context.clone();
    let work = async move {
        let rename = async |connection: &mut _, request: &_| {
            groups::rename(connection, actor.session, actor.user, conversation, &title, request).await
        };
        commands.commit_in(conversation, actor, request, rename).await
    };
    context.run_to_completion(work).await
}
