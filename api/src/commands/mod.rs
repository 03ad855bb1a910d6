//! Changes that a user can make, one file and one outcome type each. A command runs its statement (a login by name:
//! two) and publishes the committed events. It runs to completion even if the client hangs up, so that what is committed is published.

pub mod block_user;
pub mod change_members;
pub mod create_group;
pub mod delete_message;
pub mod edit_message;
pub mod end_sessions;
pub mod erase_user;
pub mod external_user;
pub mod log_in;
pub mod mark_read;
pub mod post_message;
pub mod publish_events;
pub mod refresh_session;
pub mod rename_group;
pub mod start_conversation;
mod turns;
pub mod update_user;

use std::sync::Arc;

use protocol::ids::{ConversationId, SessionId, UserId};
use service_kit::traces::{SpanKind, Tracer};
use sqlx::PgConnection;
use tokio::sync::{Notify, Semaphore};
use tracing::Instrument;

use self::turns::Turns;
use crate::{
    publisher::Publisher,
    request_context::RequestContext,
    store::{Appended, Database, StoreError},
};

/// Concurrent commands, those included that wait for their turn; further requests wait.
const MAX_RUNNING: usize = 4_096;

#[derive(Clone)]
pub struct CommandContext {
    pub database: Database,
    pub publisher: Publisher,
    tracer: Tracer,
    permits: Arc<Semaphore>,
    turns: Turns,
    /// The relay of this process has something to do.
    pub staged: Arc<Notify>,
    /// Erasing a user has begun in this process.
    pub erasures: Arc<Notify>,
}

impl CommandContext {
    pub fn new(database: Database, publisher: Publisher, tracer: Tracer) -> Self {
        Self {
            database,
            publisher,
            tracer,
            permits: Arc::new(Semaphore::new(MAX_RUNNING)),
            turns: Turns::default(),
            staged: Arc::default(),
            erasures: Arc::default(),
        }
    }

    /// Runs the one statement of a change as a span, the parent of its events' spans, and publishes the events. `actor`: none if another
    /// back end makes it.
    async fn commit<T>(
        &self,
        actor: impl Into<Option<Actor>>,
        mut request: RequestContext,
        change: impl AsyncFnOnce(&mut PgConnection, &RequestContext) -> sqlx::Result<(T, Vec<Appended>)> + Clone,
    ) -> Result<T, StoreError> {
        let mut span = self.tracer.child(request.trace, "commit", SpanKind::Client);
        span.text("db.system.name", "postgresql");
        if let Some(actor) = actor.into() {
            span.text("user.id", actor.user);
        }
        request.trace = span.context().or(request.trace);
        let done = self.database.run(async |connection| change(connection, &request).await).await;
        let (outcome, events) = done.inspect_err(|error| match error {
            // The database's own words stay in the log.
            StoreError::Unavailable(_) => span.fail("the database does not answer"),
            StoreError::Fault(_) => span.fail("the database rejected the statement"),
            StoreError::Crowded => span.fail("too many commands on the conversation"),
        })?;
        // The span of the commit ends before the spans of its events begin.
        drop(span);
        self.publisher.publish(events);
        Ok(outcome)
    }

    /// The same for a command that locks the conversation's row.
    async fn commit_in<T>(
        &self,
        conversation: ConversationId,
        actor: Actor,
        request: RequestContext,
        change: impl AsyncFnOnce(&mut PgConnection, &RequestContext) -> sqlx::Result<(T, Vec<Appended>)> + Clone,
    ) -> Result<T, StoreError> {
        let _turn = self.turns.take(conversation).await?;
        self.commit(actor, request, change).await
    }

    /// Runs `work` in a task of its own, which continues if the client hangs up.
    #[expect(clippy::disallowed_methods, reason = "its request awaits it")]
    async fn run_to_completion<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permit = self.permits.clone().acquire_owned().await.expect("the semaphore is never closed");
        let task = async move {
            let result = work.await;
            drop(permit);
            result
        };
        match tokio::spawn(task.in_current_span()).await {
            Ok(result) => result,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(StoreError::Unavailable("the process is ending".into())),
        }
    }
}

/// The user of a command, by a verified token. The statement itself checks that the session is live.
#[derive(Debug, Clone, Copy)]
pub struct Actor {
    pub user: UserId,
    /// `None` with an external issuer's token, which has no session here and is valid until it expires.
    pub session: Option<SessionId>,
}
