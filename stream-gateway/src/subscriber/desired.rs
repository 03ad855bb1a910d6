//! The desired subscriptions, and the connection that each belongs to.
//!
//! There are two locks. The delivery thread takes the one of `changes`, to record that a user's first stream opened or that the
//! user was forgotten; the supervisor takes it to fetch the recorded changes. Both hold it for one map operation. Only the
//! supervisor and the node subscribers take the lock of `state`, for work that may concern every user, so the delivery thread
//! never waits for such work.

use std::{
    collections::{HashMap, HashSet},
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use protocol::{channels::Channels, ids::UserId};
use service_kit::redis_topology::{Node, Slot, SlotMap};
use tokio::sync::Notify;

use crate::core::RedisConnectionId;

/// Channels per command, so that Redis answers other clients in between.
const BATCH: usize = 512;

/// The channels that should be subscribed. Clones share them.
#[derive(Clone)]
pub struct DesiredSubscriptions {
    /// Recorded by the delivery thread and not applied yet.
    changes: Arc<Mutex<HashMap<UserId, bool>>>,
    changed: Arc<Notify>,
    state: Arc<Mutex<SubscriptionTable>>,
    channels: Channels,
}

struct SubscriptionTable {
    /// With their slots, so that finding a channel's node needs no name.
    desired: HashMap<UserId, Slot>,
    map: Arc<SlotMap>,
    /// Queues of connected nodes.
    queues: HashMap<Node, NodeQueue>,
}

struct NodeQueue {
    connection: RedisConnectionId,
    /// Users whose desired and actual subscription at this node may differ. Nothing is recorded without a connection: a new one
    /// starts from `desired`.
    changed: HashSet<UserId>,
    notify: Arc<Notify>,
}

impl NodeQueue {
    fn push(&mut self, user: UserId) {
        self.changed.insert(user);
        self.notify.notify_one();
    }
}

impl DesiredSubscriptions {
    /// Until the slot map is known, no node is assigned.
    pub fn new(channels: Channels) -> Self {
        let state =
            SubscriptionTable { desired: HashMap::new(), map: Arc::default(), queues: HashMap::new() };
        let (changes, changed, state) = (Arc::default(), Arc::default(), Arc::new(Mutex::new(state)));
        Self { changes, changed, state, channels }
    }

    pub fn add(&self, user: UserId) {
        self.change(user, true);
    }

    pub fn remove(&self, user: UserId) {
        self.change(user, false);
    }

    fn change(&self, user: UserId, is_desired: bool) {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner).insert(user, is_desired);
        self.changed.notify_one();
    }

    /// Waits for something to [`Self::apply_changes`].
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Applies the recorded changes. Called by one task alone, so that no change overtakes a newer one.
    pub(super) fn apply_changes(&self) {
        let changes = mem::take(&mut *self.changes.lock().unwrap_or_else(PoisonError::into_inner));
        let slot = |(user, is_desired)| (user, is_desired, Slot::of(&self.channels.user(user)));
        let changes: Vec<_> = changes.into_iter().map(slot).collect();
        let mut state = self.lock();
        let SubscriptionTable { desired, map, queues } = &mut *state;
        for (user, is_desired, slot) in changes {
            // A user who is desired already left and returned in between: the engine waits for the confirmation again.
            let changed = if is_desired {
                desired.insert(user, slot);
                true
            } else {
                desired.remove(&user).is_some()
            };
            if changed && let Some(queue) = map.node_of_slot(slot).and_then(|node| queues.get_mut(node)) {
                queue.push(user);
            }
        }
    }

    pub(super) fn count(&self) -> usize {
        self.lock().desired.len()
    }

    /// Moves subscriptions to the nodes that own their slots by the `new` map.
    pub(super) fn assign_by(&self, new: Arc<SlotMap>) {
        let mut state = self.lock();
        let SubscriptionTable { desired, map, queues } = &mut *state;
        for (user, slot) in desired.iter() {
            let (from, to) = (map.node_of_slot(*slot), new.node_of_slot(*slot));
            if from != to {
                for node in [from, to].into_iter().flatten() {
                    if let Some(queue) = queues.get_mut(node) {
                        queue.push(*user);
                    }
                }
            }
        }
        *map = new;
    }

    /// A new connection to this node, without subscriptions. Notified when [`Self::next_batch`] has something.
    pub(super) fn attach(&self, node: &Node, connection: RedisConnectionId) -> Arc<Notify> {
        let mut state = self.lock();
        let SubscriptionTable { desired, map, queues } = &mut *state;
        let mine = desired.iter().filter(|(_, slot)| map.node_of_slot(**slot) == Some(node));
        let changed = mine.map(|(user, _)| *user).collect();
        let notify = Arc::new(Notify::new());
        notify.notify_one();
        queues.insert(node.clone(), NodeQueue { connection, changed, notify: notify.clone() });
        notify
    }

    pub(super) fn detach(&self, node: &Node, connection: RedisConnectionId) {
        let mut state = self.lock();
        if state.queues.get(node).is_some_and(|queue| queue.connection == connection) {
            state.queues.remove(node);
        }
    }

    /// Queues those of the users whose subscription is still desired at this node; returns how many.
    pub(super) fn retry(&self, node: &Node, users: impl Iterator<Item = UserId>) -> usize {
        let mut state = self.lock();
        let SubscriptionTable { desired, map, queues } = &mut *state;
        let Some(queue) = queues.get_mut(node) else { return 0 };
        let here =
            |user: &UserId| desired.get(user).is_some_and(|slot| map.node_of_slot(*slot) == Some(node));
        users.filter(here).map(|user| queue.push(user)).count()
    }

    /// Some of this node's changes, by what must be done about them.
    pub(super) fn next_batch(&self, node: &Node, actual: &HashSet<UserId>) -> Batch {
        let mut state = self.lock();
        let SubscriptionTable { desired, map, queues } = &mut *state;
        let mut batch = Batch::default();
        let Some(queue) = queues.get_mut(node) else { return batch };
        let some: Vec<_> = queue.changed.iter().copied().take(BATCH).collect();
        for user in some {
            queue.changed.remove(&user);
            let here = desired.get(&user).is_some_and(|slot| map.node_of_slot(*slot) == Some(node));
            match (here, actual.contains(&user)) {
                (true, false) => batch.subscribe.push(user),
                (false, true) => batch.unsubscribe.push(user),
                (true, true) => batch.unchanged.push(user),
                (false, false) => {}
            }
        }
        if queue.changed.is_empty() {
            queue.changed.shrink_to(BATCH);
        } else {
            queue.notify.notify_one();
        }
        batch
    }

    fn lock(&self) -> MutexGuard<'_, SubscriptionTable> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) subscribe: Vec<UserId>,
    pub(super) unsubscribe: Vec<UserId>,
    /// The user left and returned before the node unsubscribed: still subscribed, but the engine needs the confirmation again.
    pub(super) unchanged: Vec<UserId>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users(ids: impl IntoIterator<Item = i64>) -> HashSet<UserId> {
        ids.into_iter().map(UserId).collect()
    }

    fn sorted(mut batch: Batch) -> [Vec<i64>; 3] {
        batch.subscribe.sort();
        let ids = |users: Vec<UserId>| users.into_iter().map(|user| user.0).collect();
        [ids(batch.subscribe), ids(batch.unsubscribe), ids(batch.unchanged)]
    }

    fn desired() -> DesiredSubscriptions {
        let desired = DesiredSubscriptions::new(Channels::default());
        desired.assign_by(Arc::new(SlotMap::single_node()));
        desired
    }

    #[test]
    fn a_batch_holds_only_the_differences_after_connecting() {
        let desired = desired();
        desired.add(UserId(1));
        desired.add(UserId(2));
        desired.apply_changes();
        assert_eq!(desired.next_batch(&Node::Only, &users([])), Batch::default());
        desired.attach(&Node::Only, RedisConnectionId(1));
        assert_eq!(sorted(desired.next_batch(&Node::Only, &users([]))), [vec![1, 2], vec![], vec![]]);
        desired.remove(UserId(1));
        desired.add(UserId(3));
        desired.remove(UserId(3));
        desired.apply_changes();
        assert_eq!(sorted(desired.next_batch(&Node::Only, &users([1, 2]))), [vec![], vec![1], vec![]]);
    }

    #[test]
    fn an_emptied_queue_keeps_memory_for_a_batch_only() {
        let desired = desired();
        desired.attach(&Node::Only, RedisConnectionId(1));
        (0..20_000).for_each(|id| desired.add(UserId(id)));
        desired.apply_changes();
        while desired.next_batch(&Node::Only, &users([])) != Batch::default() {}
        assert!(desired.lock().queues[&Node::Only].changed.capacity() < 2 * BATCH);
    }

    #[test]
    fn a_user_who_left_and_returned_is_confirmed_again() {
        let desired = desired();
        desired.add(UserId(2));
        desired.apply_changes();
        desired.attach(&Node::Only, RedisConnectionId(1));
        assert_eq!(sorted(desired.next_batch(&Node::Only, &users([]))), [vec![2], vec![], vec![]]);
        desired.remove(UserId(2));
        desired.add(UserId(2));
        desired.apply_changes();
        assert_eq!(sorted(desired.next_batch(&Node::Only, &users([2]))), [vec![], vec![], vec![2]]);
    }

    #[test]
    fn many_subscriptions_are_sent_in_batches() {
        let desired = desired();
        (1..=1_300).for_each(|id| desired.add(UserId(id)));
        desired.apply_changes();
        desired.attach(&Node::Only, RedisConnectionId(1));
        let mut actual = users([]);
        let mut batches = Vec::new();
        loop {
            let batch = desired.next_batch(&Node::Only, &actual);
            if batch.subscribe.is_empty() {
                break;
            }
            batches.push(batch.subscribe.len());
            actual.extend(batch.subscribe);
        }
        assert_eq!(batches, [BATCH, BATCH, 1_300 - 2 * BATCH]);
    }

    #[test]
    fn nothing_is_kept_of_users_who_left_while_redis_was_away() {
        let desired = desired();
        desired.attach(&Node::Only, RedisConnectionId(1));
        desired.detach(&Node::Only, RedisConnectionId(1));
        for id in 1..1_000 {
            desired.add(UserId(id));
            desired.apply_changes();
            desired.remove(UserId(id));
            desired.apply_changes();
        }
        assert!(desired.lock().queues.is_empty() && desired.lock().desired.is_empty());
    }

    #[test]
    fn detaching_a_connection_keeps_the_one_after_it() {
        let desired = desired();
        desired.attach(&Node::Only, RedisConnectionId(1));
        desired.attach(&Node::Only, RedisConnectionId(2));
        desired.detach(&Node::Only, RedisConnectionId(1));
        desired.add(UserId(1));
        desired.apply_changes();
        assert_eq!(sorted(desired.next_batch(&Node::Only, &users([]))), [vec![1], vec![], vec![]]);
    }

    #[test]
    fn the_delivery_thread_never_waits_for_work_on_every_user() {
        let desired = desired();
        desired.attach(&Node::Only, RedisConnectionId(1));
        // As during the work for a new connection or a new slot map.
        let work = desired.lock();
        desired.add(UserId(1));
        desired.add(UserId(2));
        desired.remove(UserId(2));
        drop(work);
        desired.apply_changes();
        assert_eq!(sorted(desired.next_batch(&Node::Only, &users([]))), [vec![1], vec![], vec![]]);
    }

    #[test]
    fn moved_slots_are_resubscribed_on_their_new_node() {
        let [one, two] = [1, 2].map(|port| Node::At("host".into(), port));
        let map = |second_from| {
            Arc::new(SlotMap::from_ranges(vec![
                (0, second_from - 1, one.clone()),
                (second_from, 16_383, two.clone()),
            ]))
        };
        let desired = DesiredSubscriptions::new(Channels::default());
        desired.assign_by(map(8_000));
        (1..=100).for_each(|id| desired.add(UserId(id)));
        desired.apply_changes();
        desired.attach(&one, RedisConnectionId(1));
        desired.attach(&two, RedisConnectionId(2));
        let here: HashSet<_> = desired.next_batch(&one, &users([])).subscribe.into_iter().collect();
        let there: HashSet<_> = desired.next_batch(&two, &users([])).subscribe.into_iter().collect();
        assert!(here.is_disjoint(&there) && here.len() + there.len() == 100);
        assert!(here.len() > 20 && there.len() > 20, "{} and {}", here.len(), there.len());

        desired.assign_by(map(4_000));
        let left: HashSet<_> = desired.next_batch(&one, &here).unsubscribe.into_iter().collect();
        let joined: HashSet<_> = desired.next_batch(&two, &there).subscribe.into_iter().collect();
        assert!(!left.is_empty() && left == joined && left.is_subset(&here));

        // A node that redirects us for a slot that it owns by the map gets the command again.
        assert_eq!(desired.retry(&two, here.iter().copied()), joined.len());
        assert_eq!(desired.next_batch(&two, &there).subscribe.len(), joined.len());
    }
}
