//! Every connection is an open file to the kernel. Here is what this process may hold besides its streams, so that
//! there may be enough: a process without descriptors cannot even answer its liveness probe.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Connections inside HTTP: requests that are no streams yet.
pub const HTTP: usize = 2_048;
/// Connections of operators.
pub const OPS: usize = 64;
/// Refused streams that are still being said goodbye to.
pub const REJECTED: usize = 1_000;
/// Redis, `api`, logs, the runtime's own.
const REST: usize = 500;

/// Open files that this many streams need.
pub fn needed(streams: u64) -> u64 {
    streams.saturating_add((HTTP + OPS + REJECTED + REST) as u64)
}

/// Open files that this process may have, at most.
pub fn allowed() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(_, hard)| hard)
}

/// Raises the soft limit as far as is allowed. That it is far enough is a matter of the settings.
pub fn raise() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
}
