//! A user ends sessions of theirs. Every replica rejects them from the next statement on. Gateways close the open streams
//! when a notice arrives through Redis, or at their next reconcile.

use super::{Actor, CommandContext};
use crate::store::{
    StoreError,
    sessions::{self, SessionsToEnd},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndSessionsOutcome {
    /// Other sessions, or the caller's own: there may have been none.
    Ended,
    /// The named session is not a live session of the caller.
    NotFound,
    NoSession,
}

pub async fn end_sessions(
    context: &CommandContext,
    actor: Actor,
    which: SessionsToEnd,
) -> Result<EndSessionsOutcome, StoreError> {
    let CommandContext { database, publisher, .. } = context.clone();
    let work = async move {
        let ended = database
            .run(async |connection| sessions::end(connection, actor.session, actor.user, which).await)
            .await?;
        let Some(ended) = ended else { return Ok(EndSessionsOutcome::NoSession) };
        if ended.is_empty() && matches!(which, SessionsToEnd::One(_)) {
            return Ok(EndSessionsOutcome::NotFound);
        }
        tracing::info!(user.id = %actor.user, sessions = ?ended, "sessions ended by their user");
        publisher.publish_revoked(actor.user, &ended);
        Ok(EndSessionsOutcome::Ended)
    };
    context.run_to_completion(work).await
}
