//! Commands on one conversation run one after the other. Postgres makes them wait for the conversation's row anyway; here they wait
//! without a connection, in the order of their arrival, so a busy group leaves the pool to others.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use protocol::ids::ConversationId;
use tokio::sync::OwnedMutexGuard;

use crate::store::StoreError;

type Queue = Arc<tokio::sync::Mutex<()>>;
type Queues = Arc<Mutex<HashMap<ConversationId, Queue>>>;

/// Of one conversation; more are refused. All members of the largest group may mark a message read together.
const MOST_WAITING: usize = 2_048;
/// Below the time that a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(4);

#[derive(Clone, Default)]
pub(super) struct Turns(Queues);

/// Until it is dropped, no other command on the conversation runs in this process.
pub(super) struct Turn {
    conversation: ConversationId,
    queues: Queues,
    guard: Option<OwnedMutexGuard<()>>,
}

impl Turns {
    pub(super) async fn take(&self, conversation: ConversationId) -> Result<Turn, StoreError> {
        let queue = {
            let mut queues = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let queue = queues.entry(conversation).or_default();
            // One is the map's, one of the command that runs.
            if Arc::strong_count(queue) >= MOST_WAITING + 2 {
                return Err(StoreError::Crowded);
            }
            queue.clone()
        };
        let mut turn = Turn { conversation, queues: self.0.clone(), guard: None };
        let guard = tokio::time::timeout(PATIENCE, queue.lock_owned()).await;
        turn.guard = Some(guard.map_err(|_| StoreError::Crowded)?);
        Ok(turn)
    }
}

impl Drop for Turn {
    /// The last one takes the queue along.
    fn drop(&mut self) {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        self.guard = None;
        if queues.get(&self.conversation).is_some_and(|queue| Arc::strong_count(queue) == 1) {
            queues.remove(&self.conversation);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::join_all;

    use super::*;

    const HERE: ConversationId = ConversationId(1);
    const THERE: ConversationId = ConversationId(2);

    #[tokio::test]
    async fn one_at_a_time_in_the_order_of_arrival() {
        let turns = Turns::default();
        let order = Mutex::new(Vec::new());
        let running = AtomicUsize::new(0);
        let command = async |nth: usize| {
            let _turn = turns.take(HERE).await.unwrap();
            assert_eq!(running.fetch_add(1, Ordering::Relaxed), 0);
            tokio::task::yield_now().await;
            running.fetch_sub(1, Ordering::Relaxed);
            order.lock().unwrap().push(nth);
        };
        join_all((0..20).map(command)).await;
        assert_eq!(*order.lock().unwrap(), (0..20).collect::<Vec<_>>());
        assert!(turns.0.lock().unwrap().is_empty(), "nothing is left behind");
    }

    #[tokio::test]
    async fn other_conversations_do_not_wait() {
        let turns = Turns::default();
        let here = turns.take(HERE).await.unwrap();
        let _there = turns.take(THERE).await.unwrap();
        // A request that was given up is in nobody's way.
        let given_up = tokio::time::timeout(Duration::from_millis(5), turns.take(HERE)).await;
        assert!(given_up.is_err());
        drop(here);
        drop(turns.take(HERE).await.unwrap());
        assert_eq!(turns.0.lock().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn too_many_are_refused_at_once() {
        let turns = Turns::default();
        let here = turns.take(HERE).await.unwrap();
        let waiting = (0..=MOST_WAITING).map(|_| async { turns.take(HERE).await.map(drop) });
        let released = async {
            tokio::task::yield_now().await;
            drop(here);
        };
        let (answers, ()) = tokio::join!(join_all(waiting), released);
        assert_eq!(answers.iter().filter(|answer| answer.is_err()).count(), 1);
        assert!(answers[MOST_WAITING].is_err());
        assert!(turns.0.lock().unwrap().is_empty());
    }
}
