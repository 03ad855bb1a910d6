//! A user extends their session by another lifetime from now.

use std::time::Duration;

use super::{Actor, CommandContext};
use crate::store::{
    StoreError,
    sessions::{self, Session},
};

#[derive(Debug, Clone, Copy)]
pub enum RefreshSessionOutcome {
    Refreshed(Session),
    /// The session has ended, or there is none: an external token is renewed by its issuer.
    NoSession,
}

pub async fn refresh_session(
    context: &CommandContext,
    actor: Actor,
    lifetime: Duration,
) -> Result<RefreshSessionOutcome, StoreError> {
    let Some(session) = actor.session else { return Ok(RefreshSessionOutcome::NoSession) };
    let database = context.database.clone();
    let work = async move {
        database
            .run(async |connection| sessions::extend(connection, session, actor.user, lifetime).await)
            .await
    };
    let session = context.run_to_completion(work).await?;
    Ok(session.map_or(RefreshSessionOutcome::NoSession, RefreshSessionOutcome::Refreshed))
}
