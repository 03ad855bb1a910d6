//! The open files that the process needs beside its streams. Without free descriptors it could not even answer its liveness
//! probe.

use service_kit::ops;

/// Public connections that are not streams (yet).
pub const HTTP: usize = 2_048;
/// Rejected streams whose goodbye waits for the client to close.
pub const REJECTED: usize = 1_000;
/// For Redis, `api`, logs and the runtime.
const REST: usize = 500;

/// Open files that this many streams need.
pub fn needed(streams: u64) -> u64 {
    streams.saturating_add((HTTP + ops::CONNECTIONS + REJECTED + REST) as u64)
}
