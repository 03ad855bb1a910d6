//! Gives memory back to the system after many streams have opened.
//!
//! Each opening needs buffers for a moment: requests, signatures, subscriptions. After a storm of reconnects the allocator keeps
//! them, spread over the arenas of its threads, as much again as the open streams need. It returns only what is free at an arena's
//! end, so this asks for the rest.

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Fewer openings leave little behind.
const FEWEST: u64 = 1_000;

/// Openings since memory was last given back. Pure.
#[derive(Default)]
struct Openings {
    counted: u64,
    /// Not followed by a return of memory yet.
    pending: u64,
}

impl Openings {
    /// Whether a storm has passed: many streams have opened, and hardly any since the last look.
    fn storm_has_passed(&mut self, opened: u64) -> bool {
        let new = opened - self.counted;
        self.counted = opened;
        self.pending += new;
        let passed = self.pending >= FEWEST && new * 50 < self.pending;
        if passed {
            self.pending = 0;
        }
        passed
    }
}

pub async fn run(metrics: Arc<Metrics>, stop: CancellationToken) {
    let mut openings = Openings::default();
    let mut looks = interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let give_back = async {
        loop {
            looks.tick().await;
            if openings.storm_has_passed(metrics.streams_opened.get()) {
                trim();
            }
        }
    };
    stop.run_until_cancelled(give_back).await;
}

/// Takes some milliseconds, during which other threads that allocate may wait.
#[cfg(target_env = "gnu")]
fn trim() {
    let began = std::time::Instant::now();
    #[expect(unsafe_code, reason = "a function of the C library, safe to call at any time from any thread")]
    // SAFETY: it has no preconditions.
    let returned = unsafe { libc::malloc_trim(0) } == 1;
    tracing::debug!(returned, took = ?began.elapsed(), "gave memory back after many streams had opened");
}

#[cfg(not(target_env = "gnu"))]
fn trim() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_once_after_a_storm() {
        let mut openings = Openings::default();
        for (opened, gives_back) in [
            (0, false),
            (400, false),
            (9_000, false),
            (9_900, false),
            // The storm is over, though some streams still come.
            (9_950, true),
            (9_951, false),
            // Twenty a second leave as much behind in a minute.
            (10_949, false),
            (10_969, true),
            (10_989, false),
        ] {
            assert_eq!(openings.storm_has_passed(opened), gives_back, "at {opened}");
        }
    }
}
