//! Finishes the erasing of users, step by step: what one replica began, any other continues. Steps lock what they work on, so replicas take
//! different ones.

use std::{sync::Arc, time::Duration};

use protocol::ids::UserId;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    publisher::Publisher,
    store::{Database, StoreError, erasures},
};

/// Messages that one step looks at, and about how many events it appends: it holds the lock of a conversation and of its members' heads.
const SCAN: i64 = 5_000;
const EVENTS: i64 = 1_000;
/// Rows of a feed that one statement deletes.
const ROWS: i64 = 5_000;
/// What a replica that has died began is found within this time: texts are gone a minute after the request.
const EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, Default, PartialEq, Eq)]
pub struct EraseStep {
    pub messages: u64,
    /// Nothing of this user is left.
    pub finished: Option<UserId>,
}

/// One step: a part of one conversation, or of the end. `None`: there is nothing to do. Without a publisher, gateways find the events by
/// reconciling.
pub async fn erase_next(
    database: &Database,
    publisher: Option<&Publisher>,
) -> Result<Option<EraseStep>, StoreError> {
    let erase = async |connection: &mut _| erasures::erase_messages(connection, SCAN, EVENTS).await;
    if let Some(step) = database.run(erase).await? {
        if let Some(publisher) = publisher {
            publisher.publish(step.events);
        }
        tracing::debug!(user.id = %step.user, conversation.id = %step.conversation, messages = step.messages, "erased messages");
        return Ok(Some(EraseStep { messages: step.messages, finished: None }));
    }
    let finished = database.run(async |connection| erasures::finish(connection, ROWS).await).await?;
    Ok(finished.map(|(user, finished)| EraseStep { messages: 0, finished: finished.then_some(user) }))
}

/// Until `stop`. `begun` wakes it.
pub async fn run(
    database: Database,
    publisher: Publisher,
    metrics: Metrics,
    begun: Arc<Notify>,
    stop: CancellationToken,
) {
    let steps = async {
        loop {
            match erase_next(&database, Some(&publisher)).await {
                Ok(Some(step)) => {
                    metrics.erased_messages.inc_by(step.messages);
                    if let Some(user) = step.finished {
                        metrics.erased_users.inc();
                        tracing::info!(user.id = %user, "user erased");
                    }
                    continue;
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%error, "erasing a user failed; it is retried in seconds");
                    sleep(EVERY).await;
                }
            }
            let _ = timeout(EVERY.mul_f64(rand::random_range(0.8..1.2)), begun.notified()).await;
        }
    };
    stop.run_until_cancelled(steps).await;
}
