//! What need not be kept for ever is deleted in small statements: walks over all users, again and again, and deletes of their
//! feeds what is beyond the age and the count that are kept, always the start of a feed; a client whose cursor is before what
//! is left reloads. And walks over all sessions, and deletes those that ended some days ago. And deletes codes of logins that
//! nobody fetched.
//!
//! Replicas do this side by side without agreeing: a deletion that is repeated does nothing.

use std::time::Duration;

use protocol::ids::{SessionId, UserId};
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    store::{
        Database, StoreError,
        feed::{self, Keep},
        identities, sessions,
    },
};

/// Users looked at in one step.
const USERS: i64 = 500;
/// Events deleted by one statement, at most. A user with more to delete gets more statements.
const ROWS: i64 = 1_000;
/// Sessions looked at in one step.
const SESSIONS: i64 = 1_000;
/// How long a session that has ended stays, so that an operator can look back a little.
const ENDED_KEEP: Duration = Duration::from_hours(168);
/// Between two steps of a walk, and between two walks.
const STEP_PAUSE: Duration = Duration::from_secs(1);
const WALK_PAUSE: Duration = Duration::from_mins(10);

/// What a step did.
#[derive(Debug, PartialEq, Eq)]
pub struct Step {
    pub deleted: u64,
    /// Where the next step goes on; `None`: every user was looked at.
    pub next: Option<UserId>,
}

/// One step of a walk: the users after this one.
pub async fn prune_after(database: &Database, keep: Keep, after: UserId) -> Result<Step, StoreError> {
    let (prefixes, last) = database
        .run(async |connection| feed::old_prefixes(connection, keep, after, USERS, ROWS).await)
        .await?;
    let mut deleted = 0;
    let mut full = None;
    for prefix in prefixes {
        let rows = database.run(async |connection| feed::delete_prefix(connection, prefix).await).await?;
        deleted += rows;
        // There may be more of this one: go on just before them.
        if rows >= ROWS.cast_unsigned() && full.is_none() {
            full = Some(UserId(prefix.user.0 - 1));
        }
    }
    Ok(Step { deleted, next: full.or(last) })
}

/// One step over codes of logins: those that nobody fetched in time.
pub async fn prune_codes(database: &Database) -> Result<u64, StoreError> {
    database.run(async |connection| identities::delete_expired_codes(connection, ROWS).await).await
}

/// One step over sessions: the rows after this one. Those that ended long ago are deleted; how many, and where to go on.
pub async fn prune_sessions_after(
    database: &Database,
    after: SessionId,
) -> Result<(u64, Option<SessionId>), StoreError> {
    database
        .run(async |connection| sessions::delete_ended(connection, ENDED_KEEP, after, SESSIONS).await)
        .await
}

/// What was deleted.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    pub events: u64,
    pub sessions: u64,
    pub codes: u64,
}

/// One whole walk over everything, without pauses.
pub async fn prune_all(database: &Database, keep: Keep) -> Result<Pruned, StoreError> {
    let mut pruned = Pruned::default();
    let mut after = Some(UserId(0));
    while let Some(user) = after {
        let step = prune_after(database, keep, user).await?;
        pruned.events += step.deleted;
        after = step.next;
    }
    let mut after = Some(SessionId(0));
    while let Some(session) = after {
        let (deleted, next) = prune_sessions_after(database, session).await?;
        pruned.sessions += deleted;
        after = next;
    }
    loop {
        let deleted = prune_codes(database).await?;
        pruned.codes += deleted;
        if deleted == 0 {
            return Ok(pruned);
        }
    }
}

/// Feeds, sessions and codes, side by side.
pub async fn run(database: Database, keep: Keep, metrics: Metrics, stop: CancellationToken) {
    let feeds = async {
        let mut after = UserId(0);
        loop {
            let step = prune_after(&database, keep, after).await;
            let more = step.map(|Step { deleted, next }| {
                metrics.pruned_events.inc_by(deleted);
                after = next.unwrap_or(UserId(0));
                next.is_some()
            });
            pause(more, "feeds").await;
        }
    };
    let sessions = async {
        let mut after = SessionId(0);
        loop {
            let step = prune_sessions_after(&database, after).await;
            let more = step.map(|(deleted, next)| {
                metrics.pruned_sessions.inc_by(deleted);
                after = next.unwrap_or(SessionId(0));
                next.is_some()
            });
            pause(more, "sessions").await;
        }
    };
    let codes = async {
        loop {
            let deleted = prune_codes(&database).await;
            pause(deleted.map(|deleted| deleted >= ROWS.cast_unsigned()), "codes").await;
        }
    };
    tokio::select! {
        ((), (), ()) = async { tokio::join!(feeds, sessions, codes) } => {}
        () = stop.cancelled() => {}
    }
}

/// After a step: a short while when there are more, a long one after the last, or when it could not be made. At random, so that
/// replicas look at different places.
async fn pause(more: Result<bool, StoreError>, what: &'static str) {
    let pause = match more {
        Ok(true) => STEP_PAUSE,
        Ok(false) => WALK_PAUSE,
        Err(error) => {
            tracing::warn!(%error, what, "cannot prune now");
            WALK_PAUSE
        }
    };
    tokio::time::sleep(rand::random_range(pause / 2..=pause)).await;
}
