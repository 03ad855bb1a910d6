//! Which channels are wanted, changed by the hub at any time; and which connection is to listen to which of them.
//!
//! The hub only leaves its changes, under a lock of their own that nobody holds for longer than a moment: it never waits for
//! work that concerns every user. The subscriber takes them over.

use std::{
    collections::{HashMap, HashSet},
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use protocol::{channels::Channels, ids::UserId};
use service_kit::redis_topology::{Node, Slot, SlotMap};
use tokio::sync::Notify;

use super::RedisConnectionId;

/// Channels in one command: it keeps one command's work in Redis, and its answer, small.
const BATCH: usize = 512;

/// The channels that should be subscribed to. Held by the hub.
#[derive(Clone)]
pub struct DesiredSubscriptions {
    /// By the hub, not taken over yet.
    changes: Arc<Mutex<HashMap<UserId, bool>>>,
    changed: Arc<Notify>,
    state: Arc<Mutex<State>>,
    channels: Channels,
}

struct State {
    /// With their slots, so that to ask for a channel's owner takes no name.
    wanted: HashMap<UserId, Slot>,
    map: Arc<SlotMap>,
    /// Connections that listen.
    queues: HashMap<Node, NodeQueue>,
}

struct NodeQueue {
    connection: RedisConnectionId,
    /// Whose wish may differ from what this node was told. While there is no connection nothing is noted: a new one starts from
    /// `wanted`.
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
    /// Before the cluster is known, nobody listens to anything.
    pub fn new(channels: Channels) -> Self {
        let state = State { wanted: HashMap::new(), map: Arc::default(), queues: HashMap::new() };
        let (changes, changed, state) = (Arc::default(), Arc::default(), Arc::new(Mutex::new(state)));
        Self { changes, changed, state, channels }
    }

    pub fn add(&self, user: UserId) {
        self.change(user, true);
    }

    pub fn remove(&self, user: UserId) {
        self.change(user, false);
    }

    fn change(&self, user: UserId, wanted: bool) {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner).insert(user, wanted);
        self.changed.notify_one();
    }

    /// When there is something to [`Self::take_over`].
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What the hub has changed counts from now on. By one task alone: newer changes must not be overtaken.
    pub(super) fn apply_changes(&self) {
        let changes = mem::take(&mut *self.changes.lock().unwrap_or_else(PoisonError::into_inner));
        let slot = |(user, wanted)| (user, wanted, Slot::of(&self.channels.user(user)));
        let changes: Vec<_> = changes.into_iter().map(slot).collect();
        let mut state = self.lock();
        let State { wanted, map, queues } = &mut *state;
        for (user, is_wanted, slot) in changes {
            // One who is wanted already has left and come back in between, and waits to hear that the subscription is there.
            let noted = if is_wanted {
                wanted.insert(user, slot);
                true
            } else {
                wanted.remove(&user).is_some()
            };
            if noted && let Some(queue) = map.node_of_slot(slot).and_then(|node| queues.get_mut(node)) {
                queue.push(user);
            }
        }
    }

    pub(super) fn count(&self) -> usize {
        self.lock().wanted.len()
    }

    /// From now on this map says who is to listen to whom.
    pub(super) fn assign_by(&self, new: Arc<SlotMap>) {
        let mut state = self.lock();
        let State { wanted, map, queues } = &mut *state;
        for (user, slot) in wanted.iter() {
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

    /// A connection to this node, without any subscription yet. Notified when there is something to [`Self::take`].
    pub(super) fn attach(&self, node: &Node, connection: RedisConnectionId) -> Arc<Notify> {
        let mut state = self.lock();
        let State { wanted, map, queues } = &mut *state;
        let mine = wanted.iter().filter(|(_, slot)| map.node_of_slot(**slot) == Some(node));
        let changed = mine.map(|(user, _)| *user).collect();
        let notify = Arc::new(Notify::new());
        notify.notify_one();
        queues.insert(node.clone(), NodeQueue { connection, changed, notify: notify.clone() });
        notify
    }

    /// This connection listens no more.
    pub(super) fn detach(&self, node: &Node, connection: RedisConnectionId) {
        let mut state = self.lock();
        if state.queues.get(node).is_some_and(|queue| queue.connection == connection) {
            state.queues.remove(node);
        }
    }

    /// The node is to be told again of those who are still wanted there; how many that are.
    pub(super) fn retry(&self, node: &Node, users: impl Iterator<Item = UserId>) -> usize {
        let mut state = self.lock();
        let State { wanted, map, queues } = &mut *state;
        let Some(queue) = queues.get_mut(node) else { return 0 };
        let here = |user: &UserId| wanted.get(user).is_some_and(|slot| map.node_of_slot(*slot) == Some(node));
        users.filter(here).map(|user| queue.push(user)).count()
    }

    /// Some of the users whose wish has changed, by what is to be done about it at this node.
    pub(super) fn next_batch(&self, node: &Node, actual: &HashSet<UserId>) -> Batch {
        let mut state = self.lock();
        let State { wanted, map, queues } = &mut *state;
        let mut batch = Batch::default();
        let Some(queue) = queues.get_mut(node) else { return batch };
        let some: Vec<_> = queue.changed.iter().copied().take(BATCH).collect();
        for user in some {
            queue.changed.remove(&user);
            let wanted = wanted.get(&user).is_some_and(|slot| map.node_of_slot(*slot) == Some(node));
            match (wanted, actual.contains(&user)) {
                (true, false) => batch.subscribe.push(user),
                (false, true) => batch.unsubscribe.push(user),
                (true, true) => batch.unchanged.push(user),
                (false, false) => {}
            }
        }
        if !queue.changed.is_empty() {
            queue.notify.notify_one();
        }
        batch
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) subscribe: Vec<UserId>,
    pub(super) unsubscribe: Vec<UserId>,
    /// Left and came back before Redis was told: the subscription was there all the time, and the hub does not know it.
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

    /// Of a single server.
    fn desired() -> DesiredSubscriptions {
        let desired = DesiredSubscriptions::new(Channels::default());
        desired.assign_by(Arc::new(SlotMap::single_node()));
        desired
    }

    #[test]
    fn wishes_are_told_once_connected_and_only_where_they_differ() {
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
    fn one_who_left_and_came_back_at_once_is_confirmed_again() {
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
    fn many_wishes_go_out_in_batches() {
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
    fn nothing_is_remembered_of_users_who_came_and_went_while_redis_was_away() {
        let desired = desired();
        desired.attach(&Node::Only, RedisConnectionId(1));
        desired.detach(&Node::Only, RedisConnectionId(1));
        for id in 1..1_000 {
            desired.add(UserId(id));
            desired.apply_changes();
            desired.remove(UserId(id));
            desired.apply_changes();
        }
        assert!(desired.lock().queues.is_empty() && desired.lock().wanted.is_empty());
    }

    #[test]
    fn the_end_of_a_connection_does_not_end_the_one_after_it() {
        let desired = desired();
        desired.attach(&Node::Only, RedisConnectionId(1));
        desired.attach(&Node::Only, RedisConnectionId(2));
        desired.detach(&Node::Only, RedisConnectionId(1));
        desired.add(UserId(1));
        desired.apply_changes();
        assert_eq!(sorted(desired.next_batch(&Node::Only, &users([]))), [vec![1], vec![], vec![]]);
    }

    #[test]
    fn the_hub_never_waits_for_work_on_every_user() {
        let desired = desired();
        desired.attach(&Node::Only, RedisConnectionId(1));
        // As while a new connection, or a new map, is prepared for all users.
        let work = desired.lock();
        desired.add(UserId(1));
        desired.add(UserId(2));
        desired.remove(UserId(2));
        drop(work);
        desired.apply_changes();
        assert_eq!(sorted(desired.next_batch(&Node::Only, &users([]))), [vec![1], vec![], vec![]]);
    }

    #[test]
    fn each_node_is_told_of_its_own_and_a_moved_slot_is_left_here_and_joined_there() {
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

        // A node that sends us away for a slot that it has by the map is asked again.
        assert_eq!(desired.retry(&two, here.iter().copied()), joined.len());
        assert_eq!(desired.next_batch(&two, &there).subscribe.len(), joined.len());
    }
}
