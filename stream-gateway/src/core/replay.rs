//! The recent events that some stream of a user has not received yet.

use std::collections::VecDeque;

use protocol::position::{Position, Seq};

use crate::event::EncodedEvent;

/// Bounds of one user's replay buffer. The hub bounds those of the process.
const REPLAY_FRAMES: usize = 256;
const REPLAY_BYTES: usize = 256 * 1024;

/// Contiguous events of one feed, the newest last. Empty when no stream lags, and then it has no memory of its own.
#[derive(Default)]
pub struct ReplayBuffer(Option<Box<Buffered>>);

#[derive(Default)]
struct Buffered {
    events: VecDeque<EncodedEvent>,
    bytes: usize,
}

impl ReplayBuffer {
    pub fn bytes(&self) -> usize {
        self.0.as_ref().map_or(0, |buffered| buffered.bytes)
    }

    #[cfg(test)]
    pub fn events(&self) -> impl Iterator<Item = &EncodedEvent> {
        self.0.iter().flat_map(|buffered| &buffered.events)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    pub fn push(&mut self, event: EncodedEvent) {
        let follows = self.last().is_none_or(|last| last.is_followed_by(event.position));
        if !follows {
            self.clear();
        }
        let buffered = self.0.get_or_insert_default();
        buffered.bytes += event.frame.len();
        buffered.events.push_back(event);
    }

    /// Drops the oldest events over the bounds of one user.
    pub fn shrink(&mut self) {
        let Some(buffered) = self.0.as_mut() else { return };
        while buffered.events.len() > REPLAY_FRAMES || buffered.bytes > REPLAY_BYTES {
            buffered.pop();
        }
    }

    fn last(&self) -> Option<Position> {
        Some(self.0.as_ref()?.events.back()?.position)
    }

    /// The event after this position, if it is buffered.
    pub fn after(&self, position: Position) -> Option<&EncodedEvent> {
        let events = &self.0.as_ref()?.events;
        let first = events.front()?.position;
        if first.epoch != position.epoch {
            return None;
        }
        let index = (position.seq + 1).checked_sub(first.seq)?;
        events.get(usize::try_from(index).ok()?)
    }

    /// Drops events up to this one.
    pub fn trim(&mut self, passed: Seq) {
        let Some(buffered) = self.0.as_mut() else { return };
        while buffered.events.front().is_some_and(|first| first.position.seq <= passed) {
            buffered.pop();
        }
        if buffered.events.is_empty() {
            self.clear();
        }
    }

    pub fn clear(&mut self) {
        self.0 = None;
    }
}

impl Buffered {
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
    use crate::{frame::Chunk, metrics::DeliveryPath};

    fn at(seq: Seq) -> Position {
        Position { epoch: Epoch(1), seq }
    }

    fn event(seq: Seq) -> EncodedEvent {
        EncodedEvent {
            position: at(seq),
            created_at: 0,
            frame: Chunk::new(&"x".repeat(94)),
            path: DeliveryPath::Redis,
            trace: None,
        }
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
        assert!(replay.is_empty() && replay.bytes() == 0);
    }

    #[test]
    fn a_gap_clears_the_buffer_and_its_size_is_bounded() {
        let mut replay = ReplayBuffer::default();
        (1..4).for_each(|seq| replay.push(event(seq)));
        replay.push(event(9));
        assert_eq!((after(&replay, 1), after(&replay, 8)), (None, Some(9)));
        (10..2_000).for_each(|seq| replay.push(event(seq)));
        replay.shrink();
        assert_eq!(replay.bytes(), REPLAY_FRAMES * 100);
        assert_eq!((after(&replay, 1_998), after(&replay, 1_999)), (Some(1_999), None));
    }
}
