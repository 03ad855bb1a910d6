//! How fast to part from streams when the process must go: at a steady rate over a window, so that their reconnects are a
//! trickle for the others and not a storm. Pure.

use crate::sequencer::Millis;

pub struct Drain {
    end: Millis,
}

impl Drain {
    pub fn new(now: Millis, window: Millis) -> Self {
        Self { end: now + window }
    }

    pub fn end(&self) -> Millis {
        self.end
    }

    /// How many of those who stay to part from now, when asked again after `step`.
    pub fn share(&self, staying: usize, now: Millis, step: Millis) -> usize {
        let steps_left = self.end.saturating_sub(now) / step.max(1);
        staying.div_ceil(usize::try_from(steps_left).unwrap_or(usize::MAX).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_steady_and_nobody_is_left_at_the_end() {
        let drain = Drain::new(1_000, 10_000);
        let (mut staying, mut now, mut shares) = (10_000, 1_000, Vec::new());
        while now < drain.end() {
            let share = drain.share(staying, now, 250);
            shares.push(share);
            staying -= share;
            now += 250;
        }
        assert_eq!(staying, 0);
        assert!(shares.iter().all(|share| (240..=260).contains(share)), "{shares:?}");
    }

    #[test]
    fn without_a_window_all_go_at_once() {
        assert_eq!(Drain::new(5, 0).share(7, 5, 250), 7);
    }
}
