//! Which channels are wanted: shared state, changed by the hub at any time.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use shared::ids::UserId;
use tokio::sync::Notify;

/// Channels in one command: it keeps one command's work in Redis, and its answer, small.
const BATCH: usize = 512;

/// The channels that should be subscribed to. Held by the hub.
#[derive(Clone, Default)]
pub struct Wishes {
    state: Arc<Mutex<WishState>>,
    pub(super) changed: Arc<Notify>,
}

#[derive(Default)]
struct WishState {
    wanted: HashSet<UserId>,
    /// Whose wish may differ from what Redis was told. Empty while there is no connection: a new one starts from `wanted`.
    changed: HashSet<UserId>,
    connected: bool,
}

impl Wishes {
    pub fn want(&self, user: UserId) {
        self.change(user, |state| state.wanted.insert(user));
    }

    pub fn unwant(&self, user: UserId) {
        self.change(user, |state| state.wanted.remove(&user));
    }

    fn change(&self, user: UserId, change: impl FnOnce(&mut WishState) -> bool) {
        let mut state = self.lock();
        if change(&mut state) && state.connected {
            state.changed.insert(user);
            self.changed.notify_one();
        }
    }

    pub(super) fn count(&self) -> usize {
        self.lock().wanted.len()
    }

    /// A connection without any subscription begins or ends.
    pub(super) fn start_over(&self, connected: bool) {
        let mut state = self.lock();
        state.connected = connected;
        state.changed = if connected { state.wanted.clone() } else { HashSet::new() };
        if connected {
            self.changed.notify_one();
        }
    }

    /// Some of the users whose wish has changed, by what is to be done about it.
    pub(super) fn take(&self, actual: &HashSet<UserId>) -> Batch {
        let mut state = self.lock();
        let mut batch = Batch::default();
        let some: Vec<_> = state.changed.iter().copied().take(BATCH).collect();
        for user in some {
            state.changed.remove(&user);
            match (state.wanted.contains(&user), actual.contains(&user)) {
                (true, false) => batch.join.push(user),
                (false, true) => batch.leave.push(user),
                (true, true) => batch.back.push(user),
                (false, false) => {}
            }
        }
        if !state.changed.is_empty() {
            self.changed.notify_one();
        }
        batch
    }

    fn lock(&self) -> MutexGuard<'_, WishState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) join: Vec<UserId>,
    pub(super) leave: Vec<UserId>,
    /// Left and came back before Redis was told: the subscription was there all the time, and the hub does not know it.
    pub(super) back: Vec<UserId>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users(ids: impl IntoIterator<Item = i64>) -> HashSet<UserId> {
        ids.into_iter().map(UserId).collect()
    }

    fn sorted(mut batch: Batch) -> [Vec<i64>; 3] {
        batch.join.sort();
        let ids = |users: Vec<UserId>| users.into_iter().map(|user| user.0).collect();
        [ids(batch.join), ids(batch.leave), ids(batch.back)]
    }

    #[test]
    fn wishes_are_told_once_connected_and_only_where_they_differ() {
        let wishes = Wishes::default();
        wishes.want(UserId(1));
        wishes.want(UserId(2));
        assert_eq!(wishes.take(&users([])), Batch::default());
        wishes.start_over(true);
        assert_eq!(sorted(wishes.take(&users([]))), [vec![1, 2], vec![], vec![]]);
        wishes.unwant(UserId(1));
        wishes.want(UserId(3));
        wishes.unwant(UserId(3));
        assert_eq!(sorted(wishes.take(&users([1, 2]))), [vec![], vec![1], vec![]]);
    }

    #[test]
    fn one_who_left_and_came_back_at_once_is_confirmed_again() {
        let wishes = Wishes::default();
        wishes.want(UserId(2));
        wishes.start_over(true);
        assert_eq!(sorted(wishes.take(&users([]))), [vec![2], vec![], vec![]]);
        wishes.unwant(UserId(2));
        wishes.want(UserId(2));
        assert_eq!(sorted(wishes.take(&users([2]))), [vec![], vec![], vec![2]]);
    }

    #[test]
    fn many_wishes_go_out_in_batches() {
        let wishes = Wishes::default();
        (1..=1_300).for_each(|id| wishes.want(UserId(id)));
        wishes.start_over(true);
        let mut actual = users([]);
        let mut batches = Vec::new();
        loop {
            let batch = wishes.take(&actual);
            if batch.join.is_empty() {
                break;
            }
            batches.push(batch.join.len());
            actual.extend(batch.join);
        }
        assert_eq!(batches, [BATCH, BATCH, 1_300 - 2 * BATCH]);
    }

    #[test]
    fn nothing_is_remembered_of_users_who_came_and_went_while_redis_was_away() {
        let wishes = Wishes::default();
        for id in 1..1_000 {
            wishes.want(UserId(id));
            wishes.unwant(UserId(id));
        }
        assert!(wishes.lock().changed.is_empty() && wishes.lock().wanted.is_empty());
    }
}
