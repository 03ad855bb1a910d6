//! Delays between retries: exponential, bounded, with jitter so that replicas do not retry in step.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

#[derive(Debug)]
pub struct Backoff {
    builder: ExponentialBuilder,
    delays: ExponentialBackoff,
}

impl Backoff {
    /// The longest delay is `first`, then twice as much each time, up to `max`. Each is drawn from the upper half.
    pub fn new(first: Duration, max: Duration) -> Self {
        // The jitter of backon adds up to as much again.
        let builder = ExponentialBuilder::new().with_min_delay(first / 2).with_max_delay(max / 2);
        let builder = builder.without_max_times().with_jitter();
        Self { builder, delays: builder.build() }
    }

    pub fn next_delay(&mut self) -> Duration {
        self.delays.next().expect("the number of retries is not limited")
    }

    pub fn reset(&mut self) {
        self.delays = self.builder.build();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_bound_and_start_again_after_a_reset() {
        let [first, max] = [100, 1_000].map(Duration::from_millis);
        let mut backoff = Backoff::new(first, max);
        for _ in 0..2 {
            for longest in [100, 200, 400, 800, 1_000, 1_000].map(Duration::from_millis) {
                let delay = backoff.next_delay();
                assert!((longest / 2..=longest).contains(&delay), "{delay:?}, at most {longest:?}");
            }
            backoff.reset();
        }
    }
}
