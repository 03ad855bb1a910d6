//! How fast to part from streams when the process must go: at a steady rate over a window, so that their reconnects are a
//! trickle for the others and not a storm. Pure.

use crate::sequencer::Millis;

/// Between two steps, in milliseconds.
const STEP: Millis = 250;

pub struct DrainSchedule {
    end: Millis,
    next: Millis,
}

impl DrainSchedule {
    pub fn new(now: Millis, window: Millis) -> Self {
        Self { end: now + window, next: now }
    }

    pub fn end(&self) -> Millis {
        self.end
    }

    /// When the next step is due.
    pub fn next(&self) -> Millis {
        self.next
    }

    /// One step: how many of those who stay to part from now.
    pub fn step(&mut self, staying: usize, now: Millis) -> usize {
        self.next = now + STEP;
        let steps_left = self.end.saturating_sub(now) / STEP;
        staying.div_ceil(usize::try_from(steps_left).unwrap_or(usize::MAX).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_steady_and_nobody_is_left_at_the_end() {
        let mut drain = DrainSchedule::new(1_000, 10_000);
        let (mut staying, mut shares) = (10_000, Vec::new());
        while drain.next() < drain.end() {
            let share = drain.step(staying, drain.next());
            shares.push(share);
            staying -= share;
        }
        assert_eq!(staying, 0);
        assert_eq!(shares.len(), 40);
        assert!(shares.iter().all(|share| *share == 250), "{shares:?}");
    }

    #[test]
    fn without_a_window_all_go_at_once() {
        assert_eq!(DrainSchedule::new(5, 0).step(7, 5), 7);
    }
}
