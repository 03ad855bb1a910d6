//! Feeds do not grow for ever: walks over all users, again and again, and deletes what is beyond the age and the count that
//! are kept. Always the start of a feed, in small statements; a client whose cursor is before what is left reloads.
//!
//! Replicas do this side by side without agreeing: each deletion is one user's prefix, and repeating it does nothing.

use std::time::Duration;

use shared::ids::UserId;
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    store::{
        Database, StoreError,
        feed::{self, Keep},
    },
};

/// Users looked at in one step.
const USERS: i64 = 500;
/// Events deleted by one statement, at most. A user with more to delete gets more statements.
const ROWS: i64 = 1_000;
/// Between two steps of a walk, and between two walks.
const STEP_PAUSE: Duration = Duration::from_secs(1);
const WALK_PAUSE: Duration = Duration::from_secs(10 * 60);

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

pub async fn run(database: Database, keep: Keep, metrics: Metrics, stop: CancellationToken) {
    let mut after = UserId(0);
    loop {
        let pause = match prune_after(&database, keep, after).await {
            Ok(Step { deleted, next }) => {
                metrics.feed_pruned.inc_by(deleted);
                after = next.unwrap_or(UserId(0));
                if next.is_some() { STEP_PAUSE } else { WALK_PAUSE }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot prune feeds now");
                WALK_PAUSE
            }
        };
        // At random, so that replicas look at different places.
        tokio::select! {
            () = tokio::time::sleep(rand::random_range(pause / 2..=pause)) => {}
            () = stop.cancelled() => return,
        }
    }
}
