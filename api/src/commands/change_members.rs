//! Who belongs to a group: an owner adds somebody, changes a role, takes somebody out; a member leaves.

use protocol::ids::{ConversationId, UserId};

use super::{Actor, CommandContext};
pub use crate::store::groups::{AddParticipantOutcome, SetRoleOutcome};
use crate::{
    domain::conversation::Role,
    request_context::RequestContext,
    store::{
        StoreError,
        groups::{self, Refusal},
    },
};

/// `largest`: how many members a group may have.
pub async fn add(
    context: &CommandContext,
    actor: Actor,
    conversation: ConversationId,
    username: String,
    largest: i64,
    request: RequestContext,
) -> Result<AddParticipantOutcome, StoreError> {
    let commands = context.clone();
    let work = async move {
        let add = async |connection: &mut _, request: &_| {
            let Actor { session, user } = actor;
            groups::add(connection, session, user, conversation, &username, largest, request).await
        };
        commands.commit_in(conversation, actor, request, add).await
    };
    context.run_to_completion(work).await
}

pub async fn set_role(
    context: &CommandContext,
    actor: Actor,
    conversation: ConversationId,
    who: UserId,
    role: Role,
    request: RequestContext,
) -> Result<SetRoleOutcome, StoreError> {
    let commands = context.clone();
    let work = async move {
        let set = async |connection: &mut _, request: &_| {
            groups::set_role(connection, actor.session, actor.user, conversation, who, role, request).await
        };
        commands.commit_in(conversation, actor, request, set).await
    };
    context.run_to_completion(work).await
}

pub async fn remove(
    context: &CommandContext,
    actor: Actor,
    conversation: ConversationId,
    who: UserId,
    request: RequestContext,
) -> Result<Result<(), Refusal>, StoreError> {
    let commands = context.clone();
    let work = async move {
        let remove = async |connection: &mut _, request: &_| {
            groups::remove(connection, actor.session, actor.user, conversation, who, request).await
        };
        commands.commit_in(conversation, actor, request, remove).await
    };
    context.run_to_completion(work).await
}
