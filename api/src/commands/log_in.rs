//! A user logs in: a session begins.

use std::time::Duration;

use crate::{
    domain::user::User,
    store::{
        Database, StoreError,
        sessions::{self, Session},
        users,
    },
};

/// As whoever has this name, without a proof: for development. `None`: nobody has it.
pub async fn log_in_by_name(
    database: &Database,
    username: &str,
    device: &str,
    lifetime: Duration,
) -> Result<Option<(User, Session)>, StoreError> {
    database
        .run(async |connection| {
            let Some(user) = users::find_by_name(connection, username).await? else { return Ok(None) };
            let session = sessions::start(connection, user.id, device, lifetime).await?;
            Ok(Some((user, session)))
        })
        .await
}
