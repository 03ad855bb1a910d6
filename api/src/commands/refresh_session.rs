//! A user goes on: the session lives for another lifetime from now.

use std::time::Duration;

use super::Actor;
use crate::store::{
    Database, StoreError,
    sessions::{self, Session},
};

/// `None`: the session has ended, or there is none: a foreign token is renewed where it came from.
pub async fn refresh_session(
    database: &Database,
    actor: Actor,
    lifetime: Duration,
) -> Result<Option<Session>, StoreError> {
    let Some(session) = actor.session else { return Ok(None) };
    database.run(async |connection| sessions::slide(connection, session, actor.user, lifetime).await).await
}
