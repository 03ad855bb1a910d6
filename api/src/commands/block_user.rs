//! A user blocks or unblocks another user, who is not notified. Messages that were hidden by a block stay hidden.

use protocol::ids::UserId;

use super::{Actor, CommandContext};
pub use crate::store::blocks::BlockUserOutcome;
use crate::store::{StoreError, blocks};

pub async fn set_block(
    context: &CommandContext,
    Actor { session, user }: Actor,
    other: UserId,
    blocked: bool,
) -> Result<BlockUserOutcome, StoreError> {
    let database = context.database.clone();
    let work = async move {
        database.run(async |connection| blocks::set(connection, session, user, other, blocked).await).await
    };
    let outcome = context.run_to_completion(work).await?;
    if let BlockUserOutcome::Done = outcome {
        tracing::info!(user.id = %user, other.id = %other, blocked, "block set");
    }
    Ok(outcome)
}
