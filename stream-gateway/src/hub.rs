//! The connected users and their replay buffers. In memory only: all of it may be lost.
//!
//! One entry per connected user. A replay buffer has the encoded frames that some connection has not received yet, and is empty
//! when all are up to date; it is bounded per user here and per process by the engine.

use std::collections::{HashMap, VecDeque};

use protocol::{
    ids::UserId,
    position::{Position, Seq},
};
use slab::Slab;

use crate::{
    event::EncodedEvent,
    sequencer::{Millis, Sequencer},
    subscriber::RedisConnectionId,
};

/// Bounds of one user's replay buffer.
const REPLAY_FRAMES: usize = 256;
const REPLAY_BYTES: usize = 256 * 1024;

/// Names one connection, for as long as the process runs: indexes are reused, generations are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionKey {
    pub index: u32,
    pub generation: u32,
}

pub struct UserEntry {
    pub user: UserId,
    pub sequencer: Sequencer<EncodedEvent>,
    pub replay: ReplayBuffer,
    /// Oldest first.
    pub connections: Vec<ConnectionKey>,
    /// The connection on which Redis has confirmed the subscription.
    pub subscribed_on: Option<RedisConnectionId>,
    /// When the last connection closed. The entry stays for a moment, because users reload pages.
    pub empty_since: Option<Millis>,
    /// When the sequencer is next ticked; 0: never.
    pub tick_at: Millis,
}

#[derive(Default)]
pub struct Hub {
    by_user: HashMap<UserId, u32>,
    entries: Slab<UserEntry>,
}

impl Hub {
    pub fn users(&self) -> usize {
        self.entries.len()
    }

    pub fn find(&self, user: UserId) -> Option<u32> {
        self.by_user.get(&user).copied()
    }

    pub fn get(&self, at: u32) -> Option<&UserEntry> {
        self.entries.get(at as usize)
    }

    pub fn get_mut(&mut self, at: u32) -> Option<&mut UserEntry> {
        self.entries.get_mut(at as usize)
    }

    /// The entry of this user, and whether it is new.
    pub fn enter(&mut self, user: UserId) -> (u32, bool) {
        if let Some(at) = self.find(user) {
            self.entries[at as usize].empty_since = None;
            return (at, false);
        }
        let at = self.entries.insert(UserEntry {
            user,
            sequencer: Sequencer::default(),
            replay: ReplayBuffer::default(),
            connections: Vec::new(),
            subscribed_on: None,
            empty_since: None,
            tick_at: 0,
        }) as u32;
        self.by_user.insert(user, at);
        (at, true)
    }

    pub fn remove(&mut self, at: u32) -> Option<UserEntry> {
        let entry = self.entries.try_remove(at as usize)?;
        self.by_user.remove(&entry.user);
        Some(entry)
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &UserEntry)> {
        self.entries.iter().map(|(at, entry)| (at as u32, entry))
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut UserEntry> {
        self.entries.iter_mut().map(|(_, entry)| entry)
    }
}

/// Contiguous frames of one feed, the newest last.
#[derive(Default)]
pub struct ReplayBuffer {
    events: VecDeque<EncodedEvent>,
    bytes: usize,
}

impl ReplayBuffer {
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    pub fn push(&mut self, event: EncodedEvent) {
        let follows = self.events.back().is_none_or(|last| {
            last.position.epoch == event.position.epoch && last.position.seq + 1 == event.position.seq
        });
        if !follows {
            self.clear();
        }
        self.bytes += event.frame.len();
        self.events.push_back(event);
        while self.events.len() > REPLAY_FRAMES || self.bytes > REPLAY_BYTES {
            self.pop();
        }
    }

    /// The event after this position, if it is buffered.
    pub fn after(&self, position: Position) -> Option<&EncodedEvent> {
        let first = self.events.front()?.position;
        if first.epoch != position.epoch {
            return None;
        }
        let index = (position.seq + 1).checked_sub(first.seq)?;
        self.events.get(usize::try_from(index).ok()?)
    }

    /// Drops events up to this one.
    pub fn trim(&mut self, passed: Seq) {
        while self.events.front().is_some_and(|first| first.position.seq <= passed) {
            self.pop();
        }
        if self.events.is_empty() {
            self.clear();
        }
    }

    /// An empty buffer allocates no memory.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn pop(&mut self) {
        if let Some(event) = self.events.pop_front() {
            self.bytes -= event.frame.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use protocol::position::Epoch;

    use super::*;
    use crate::frame::Chunk;

    fn at(seq: Seq) -> Position {
        Position { epoch: Epoch(1), seq }
    }

    fn event(seq: Seq) -> EncodedEvent {
        EncodedEvent { position: at(seq), created_at: 0, frame: Chunk::new(&"x".repeat(94)), trace: None }
    }

    fn after(replay: &ReplayBuffer, seq: Seq) -> Option<Seq> {
        replay.after(at(seq)).map(|event| event.position.seq)
    }

    #[test]
    fn replay_buffer_returns_the_next_event_or_none() {
        let mut replay = ReplayBuffer::default();
        assert_eq!(after(&replay, 0), None);
        (5..8).for_each(|seq| replay.push(event(seq)));
        let got: Vec<_> = (3..9).map(|seq| after(&replay, seq)).collect();
        assert_eq!(got, [None, Some(5), Some(6), Some(7), None, None]);
        assert!(replay.after(Position { epoch: Epoch(2), seq: 5 }).is_none());
        replay.trim(6);
        assert_eq!((after(&replay, 5), after(&replay, 6), replay.bytes()), (None, Some(7), 100));
        replay.trim(7);
        assert!(replay.is_empty() && replay.bytes() == 0 && replay.events.capacity() == 0);
    }

    #[test]
    fn a_gap_clears_the_buffer_and_its_size_is_bounded() {
        let mut replay = ReplayBuffer::default();
        (1..4).for_each(|seq| replay.push(event(seq)));
        replay.push(event(9));
        assert_eq!((after(&replay, 1), after(&replay, 8)), (None, Some(9)));
        (10..2_000).for_each(|seq| replay.push(event(seq)));
        assert_eq!(replay.events.len(), REPLAY_FRAMES);
        assert_eq!(replay.bytes(), REPLAY_FRAMES * 100);
        assert_eq!(after(&replay, 1_998), Some(1_999));
    }

    #[test]
    fn a_user_has_one_entry() {
        let mut hub = Hub::default();
        assert_eq!(hub.enter(UserId(7)), (0, true));
        assert_eq!(hub.enter(UserId(7)), (0, false));
        assert_eq!(hub.enter(UserId(8)), (1, true));
        assert_eq!(hub.remove(0).map(|entry| entry.user), Some(UserId(7)));
        assert_eq!((hub.find(UserId(7)), hub.find(UserId(8)), hub.users()), (None, Some(1), 1));
    }
}
