//! A user goes on: the session lives for another lifetime from now.

use std::time::Duration;

use super::{Actor, Context};
use crate::store::{
    StoreError,
    sessions::{self, Session},
};

/// `None`: the session has ended, or there is none: a external token is renewed where it came from.
pub async fn refresh_session(
    context: &Context,
    actor: Actor,
    lifetime: Duration,
) -> Result<Option<Session>, StoreError> {
    let Some(session) = actor.session else { return Ok(None) };
    let database = context.database.clone();
    let work = async move {
        database
            .run(async |connection| sessions::slide(connection, session, actor.user, lifetime).await)
            .await
    };
    context.to_its_end(work).await
}
