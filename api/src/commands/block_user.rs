//! A user blocks or unblocks another user, who is not notified.

use protocol::ids::UserId;

use super::{Actor, CommandContext};
pub use crate::store::blocks::BlockUserOutcome;
use crate::store::{StoreError, blocks};

pub async fn block_user(
    context: &CommandContext,
    actor: Actor,
    other: UserId,
) -> Result<BlockUserOutcome, StoreError> {
    set(context, actor, other, true).await
}

/// Messages that were hidden by the block stay hidden.
pub async fn unblock_user(
    context: &CommandContext,
    actor: Actor,
    other: UserId,
) -> Result<BlockUserOutcome, StoreError> {
    set(context, actor, other, false).await
}

async fn set(
    context: &CommandContext,
    actor: Actor,
    other: UserId,
    blocked: bool,
) -> Result<BlockUserOutcome, StoreError> {
    let Actor { session, user } = actor;
    let database = context.database.clone();
    let work = async move {
        let set = async |connection: &mut _| {
            if blocked {
                blocks::block(connection, session, user, other).await
            } else {
                blocks::unblock(connection, session, user, other).await
            }
        };
        database.run(set).await
    };
    let outcome = context.run_to_completion(work).await?;
    if let BlockUserOutcome::Done = outcome {
        tracing::info!(user.id = %user, other.id = %other, blocked, "block set");
    }
    Ok(outcome)
}
