//! What a user can change, one file per change. A command runs its one statement and publishes what was committed. Once
//! begun it goes on to its end, also when the client hangs up: what is committed is published.

pub mod block_user;
pub mod end_session;
pub mod log_in;
pub mod mark_read;
pub mod post_message;
pub mod refresh_session;
pub mod start_conversation;

use std::sync::Arc;

use protocol::ids::{SessionId, UserId};
use service_kit::traces::{SpanKind, Tracer};
use sqlx::PgConnection;
use tokio::sync::Semaphore;
use tracing::Instrument;

use crate::{
    publisher::Publisher,
    request_context::RequestContext,
    store::{Database, StoreError},
};

/// Commands under way at once. Requests beyond it wait, as part of their connections.
const UNDER_WAY: usize = 1_024;

/// What commands work with.
#[derive(Clone)]
pub struct Context {
    pub database: Database,
    pub publisher: Publisher,
    tracer: Tracer,
    places: Arc<Semaphore>,
}

impl Context {
    pub fn new(database: Database, publisher: Publisher, tracer: Tracer) -> Self {
        Self { database, publisher, tracer, places: Arc::new(Semaphore::new(UNDER_WAY)) }
    }

    /// Runs the one statement of a change, as a span below which its events hang.
    async fn commit<T>(
        &self,
        actor: Actor,
        mut request: RequestContext,
        change: impl AsyncFnOnce(&mut PgConnection, &RequestContext) -> sqlx::Result<T> + Clone,
    ) -> Result<T, StoreError> {
        let mut span = self.tracer.child(request.trace, "commit", SpanKind::Client);
        span.text("db.system.name", "postgresql");
        span.text("user.id", actor.user);
        request.trace = span.context().or(request.trace);
        let done = self.database.run(async |connection| change(connection, &request).await).await;
        match &done {
            Ok(_) => {}
            // What the database says stays in the log.
            Err(StoreError::Unavailable(_)) => span.fail("the database does not answer"),
            Err(StoreError::Fault(_)) => span.fail("the database refuses"),
        }
        done
    }

    /// Runs `work` apart from the request, so that a client who goes away does not stop it half way.
    #[expect(clippy::disallowed_methods, reason = "its request awaits it")]
    async fn to_its_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        let place = self.places.clone().acquire_owned().await.expect("the semaphore is never closed");
        let task = async move {
            let result = work.await;
            drop(place);
            result
        };
        match tokio::spawn(task.in_current_span()).await {
            Ok(result) => result,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(StoreError::Unavailable("the process is ending".into())),
        }
    }
}

/// Who commands, by a token whose signature was checked. The statement itself checks that the session still lives.
#[derive(Debug, Clone, Copy)]
pub struct Actor {
    pub user: UserId,
    /// None: by a external issuer's token, which has no session here and is good until it expires.
    pub session: Option<SessionId>,
}

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum CommandError<Refusal: std::error::Error> {
    #[error("the session has ended")]
    NoSession,
    #[error(transparent)]
    Refused(Refusal),
    #[error(transparent)]
    Store(#[from] StoreError),
}
