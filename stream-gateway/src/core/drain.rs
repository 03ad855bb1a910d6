//! The rate at which a drain closes streams: steady over a window, so that the other gateways see no storm of reconnects. Pure.

use super::Millis;

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

    /// How many of the remaining streams to close now.
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
    fn the_rate_is_steady_and_no_stream_is_left_at_the_end() {
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
    fn without_a_window_all_streams_close_immediately() {
        assert_eq!(DrainSchedule::new(5, 0).step(7, 5), 7);
    }
}
