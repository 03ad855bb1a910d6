//! What a user can change, one file per change. A command runs its one statement and publishes what was committed. Once
//! begun it goes on to its end, also when the client hangs up: what is committed is published.

pub mod log_in;
pub mod mark_read;
pub mod post_message;
pub mod refresh_session;
pub mod start_conversation;

use shared::ids::{SessionId, UserId};
use tracing::Instrument;

use crate::{
    publisher::Publisher,
    store::{Database, StoreError},
};

/// What commands work with.
#[derive(Clone)]
pub struct Context {
    pub database: Database,
    pub publisher: Publisher,
}

/// Who commands, by a token whose signature was checked. The statement itself checks that the session still lives.
#[derive(Debug, Clone, Copy)]
pub struct Actor {
    pub user: UserId,
    pub session: SessionId,
}

/// The session has ended: the caller is nobody.
#[derive(Debug, thiserror::Error)]
pub enum CommandError<Refusal: std::error::Error> {
    #[error("the session has ended")]
    NoSession,
    #[error(transparent)]
    Refused(Refusal),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Runs `work` apart from the request, so that a client who goes away does not stop it half way.
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::spawn(work.in_current_span()).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(StoreError::Unavailable("the process is ending".into())),
    }
}
