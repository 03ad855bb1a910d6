//! A user goes on: the session lives for another lifetime from now.

use std::time::Duration;

use super::Actor;
use crate::store::{
    Database, StoreError,
    sessions::{self, Session},
};

/// `None`: the session has ended.
pub async fn refresh_session(
    database: &Database,
    actor: Actor,
    lifetime: Duration,
) -> Result<Option<Session>, StoreError> {
    database
        .run(async |connection| sessions::slide(connection, actor.session, actor.user, lifetime).await)
        .await
}
