//! Another back end makes or changes a user of the external issuer, or starts a session with which that user's page opens streams.

use std::time::Duration;

use protocol::ids::UserId;

use super::CommandContext;
pub use crate::store::users::PutUserOutcome;
use crate::{
    request_context::RequestContext,
    store::{
        StoreError,
        sessions::{self, Session},
        users::{self, ProfileChange},
    },
};

/// A user of the external issuer.
#[derive(Debug, Clone)]
pub struct ExternalUser {
    pub issuer: String,
    pub subject: String,
}

pub async fn put_user(
    context: &CommandContext,
    user: ExternalUser,
    change: ProfileChange,
    request: RequestContext,
) -> Result<PutUserOutcome, StoreError> {
    let commands = context.clone();
    let work = async move {
        let put = async |connection: &mut _, request: &_| {
            users::put(connection, &user.issuer, &user.subject, &change, request).await
        };
        commands.commit(None, request, put).await
    };
    context.run_to_completion(work).await
}

/// `None`: there is no such user. `device`: what the user recognises the session by.
pub async fn start_session(
    context: &CommandContext,
    user: ExternalUser,
    device: String,
    lifetime: Duration,
) -> Result<Option<(UserId, Session)>, StoreError> {
    let database = context.database.clone();
    let work = async move {
        let ExternalUser { issuer, subject } = &user;
        let start = async |connection: &mut _| {
            sessions::start_for_subject(connection, issuer, subject, &device, lifetime).await
        };
        database.run(start).await
    };
    context.run_to_completion(work).await
}
