//! One clock for all processes of the bench, so that a time taken in one can be compared with a time taken in another.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

pub type Micros = u64;

pub fn now() -> Micros {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has this clock");
    (time.tv_sec() as Micros) * 1_000_000 + (time.tv_nsec() as Micros) / 1_000
}

/// Between an order and the first event: long enough for all processes to get ready.
pub const HEAD_START: Duration = Duration::from_millis(500);

pub fn soon() -> Micros {
    now() + micros(HEAD_START)
}

pub fn sleep_until(at: Micros) {
    std::thread::sleep(Duration::from_micros(at.saturating_sub(now())));
}

pub fn micros(duration: Duration) -> Micros {
    duration.as_micros() as Micros
}
