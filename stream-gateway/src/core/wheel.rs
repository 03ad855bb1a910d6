//! One timer for all connections: a timing wheel that holds each connection at its next due time. Entries are not removed; the
//! connection ignores one that is no longer its `due`. So an entry needs no generation: if a new connection has the index, its
//! own `due` decides.

use super::Millis;

/// The wheel's resolution, in milliseconds.
pub const SLOT: Millis = 250;
const SLOTS: u32 = 256;

/// When a connection's timer is due, in slots since the start: 32 bits last for decades.
pub type Due = u32;

/// The first slot that begins at or after this time.
pub fn due_at(time: Millis) -> Due {
    Due::try_from(time.div_ceil(SLOT)).unwrap_or(Due::MAX)
}

/// The slot that this time belongs to.
pub fn slot_of(time: Millis) -> Due {
    Due::try_from(time / SLOT).unwrap_or(Due::MAX)
}

pub struct Wheel {
    /// The indexes of connections.
    slots: Vec<Vec<(u32, Due)>>,
    /// The last slot that was emptied.
    turned_to: Due,
}

impl Wheel {
    pub fn new(now: Millis) -> Self {
        Self { slots: (0..SLOTS).map(|_| Vec::new()).collect(), turned_to: slot_of(now) }
    }

    /// A `due` beyond the wheel's range is inserted at its far end and re-inserted from there.
    pub fn insert(&mut self, index: u32, due: Due) {
        let slot = due.clamp(self.turned_to + 1, self.turned_to + SLOTS - 1);
        self.slots[(slot % SLOTS) as usize].push((index, due));
    }

    /// Moves the due entries to `due`, at most one slot late and never early.
    pub fn turn(&mut self, now: Millis, due: &mut Vec<(u32, Due)>) {
        while self.turned_to < slot_of(now) {
            self.turned_to += 1;
            let slot = &mut self.slots[(self.turned_to % SLOTS) as usize];
            let entries = std::mem::take(slot);
            for (index, at) in entries {
                if at > self.turned_to {
                    self.insert(index, at);
                } else {
                    due.push((index, at));
                }
            }
        }
    }

    /// When to turn next.
    pub fn next(&self) -> Millis {
        (Millis::from(self.turned_to) + 1) * SLOT
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
                wheel.insert(index as u32, due_at(start + due));
            }
            let mut now = start;
            let mut seen = vec![0; dues.len()];
            let mut out = Vec::new();
            for step in steps.into_iter().chain([300_000]) {
                let before = now;
                now += step;
                wheel.turn(now, &mut out);
                for (index, due) in out.drain(..) {
                    seen[index as usize] += 1;
                    prop_assert!(Millis::from(due) * SLOT <= now, "early");
                    prop_assert!(due + 1 >= slot_of(before), "late: due {due}, last turn at {before}");
                }
            }
            prop_assert!(seen.iter().all(|count| *count == 1));
        }
    }
}
