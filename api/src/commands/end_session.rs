//! A user ends sessions of theirs. REST refuses them from the next statement on, on every replica; open streams are told by
//! Redis, and found by the gateways' next reconcile where that is lost.

use thiserror::Error;

use super::{Actor, CommandError, Context};
use crate::store::sessions::{self, Which};

#[derive(Debug, Error)]
#[error("no such session of the caller")]
pub struct NoSuchSession;

/// An error only when one was named: of all others, or of the caller's own, there may be none.
pub async fn end_sessions(
    context: &Context,
    actor: Actor,
    which: Which,
) -> Result<(), CommandError<NoSuchSession>> {
    let Context { database, publisher, .. } = context.clone();
    let work = async move {
        let ended = database
            .run(async |connection| sessions::end(connection, actor.session, actor.user, which).await)
            .await?;
        let Some(ended) = ended else { return Ok(Err(CommandError::NoSession)) };
        if ended.is_empty() && matches!(which, Which::One(_)) {
            return Ok(Err(CommandError::Refused(NoSuchSession)));
        }
        tracing::info!(user.id = %actor.user, sessions = ?ended, "sessions ended by their user");
        publisher.publish_revoked(actor.user, &ended);
        Ok(Ok(()))
    };
    context.to_its_end(work).await?
}
