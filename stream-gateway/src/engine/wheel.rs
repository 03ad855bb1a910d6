//! One timer for all connections: a timing wheel that holds each connection at its next due time. Entries are not removed; the
//! engine ignores one whose time is no longer the connection's `due`.

use crate::{hub::ConnectionKey, sequencer::Millis};

/// The wheel's resolution, in milliseconds.
pub const SLOT: Millis = 250;
const SLOTS: u64 = 256;

pub struct Wheel {
    slots: Vec<Vec<(ConnectionKey, Millis)>>,
    /// The last slot that was emptied.
    turned_to: u64,
}

impl Wheel {
    pub fn new(now: Millis) -> Self {
        Self { slots: (0..SLOTS).map(|_| Vec::new()).collect(), turned_to: now / SLOT }
    }

    /// A `due` beyond the wheel's range is inserted at its far end and re-inserted from there.
    pub fn insert(&mut self, key: ConnectionKey, due: Millis) {
        let slot = due.div_ceil(SLOT).clamp(self.turned_to + 1, self.turned_to + SLOTS - 1);
        self.slots[(slot % SLOTS) as usize].push((key, due));
    }

    /// Moves the due entries to `due`, at most one slot late and never early.
    pub fn turn(&mut self, now: Millis, due: &mut Vec<(ConnectionKey, Millis)>) {
        while self.turned_to < now / SLOT {
            self.turned_to += 1;
            let slot = &mut self.slots[(self.turned_to % SLOTS) as usize];
            let entries = std::mem::take(slot);
            for (key, at) in entries {
                if at.div_ceil(SLOT) > self.turned_to {
                    self.insert(key, at);
                } else {
                    due.push((key, at));
                }
            }
        }
    }

    /// When to turn next.
    pub fn next(&self) -> Millis {
        (self.turned_to + 1) * SLOT
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_entry_is_due_once_and_at_most_a_slot_late(
            start in 0..1_000_000u64,
            dues in proptest::collection::vec(0..200_000u64, 1..100),
            steps in proptest::collection::vec(1..5_000u64, 1..400),
        ) {
            let mut wheel = Wheel::new(start);
            for (index, due) in dues.iter().enumerate() {
                wheel.insert(ConnectionKey { index: index as u32, generation: 0 }, start + due);
            }
            let mut now = start;
            let mut seen = vec![0; dues.len()];
            let mut out = Vec::new();
            for step in steps.into_iter().chain([300_000]) {
                let before = now;
                now += step;
                wheel.turn(now, &mut out);
                for (key, due) in out.drain(..) {
                    seen[key.index as usize] += 1;
                    prop_assert!(due <= now, "early");
                    prop_assert!(due.div_ceil(SLOT) + 1 >= before / SLOT, "late: due {due}, last turn at {before}");
                }
            }
            prop_assert!(seen.iter().all(|count| *count == 1));
        }
    }
}
