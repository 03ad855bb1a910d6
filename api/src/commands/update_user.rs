//! A user changes their profile.

use super::{Actor, CommandContext};
pub use crate::store::users::{ProfileChange, UpdateUserOutcome};
use crate::{
    request_context::RequestContext,
    store::{StoreError, users},
};

pub async fn update_user(
    context: &CommandContext,
    actor: Actor,
    change: ProfileChange,
    request: RequestContext,
) -> Result<UpdateUserOutcome, StoreError> {
    let commands = context.clone();
    let work = async move {
        let update = async |connection: &mut _, request: &_| {
            users::update(connection, actor.session, actor.user, &change, request).await
        };
        commands.commit(actor, request, update).await
    };
    context.run_to_completion(work).await
}
