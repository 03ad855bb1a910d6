//! The open files that the process needs beside its streams. Without free descriptors it could not even answer its liveness
//! probe.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Public connections that are not streams (yet).
pub const HTTP: usize = 2_048;
/// Connections of operators.
pub const OPS: usize = 64;
/// Rejected streams whose goodbye waits for the client to close.
pub const REJECTED: usize = 1_000;
/// For Redis, `api`, logs and the runtime.
const REST: usize = 500;

/// Open files that this many streams need.
pub fn needed(streams: u64) -> u64 {
    streams.saturating_add((HTTP + OPS + REJECTED + REST) as u64)
}

/// The hard limit of open files.
pub fn allowed() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(_, hard)| hard)
}

/// Raises the soft limit to the hard one. The configuration check compares that with [`needed`].
pub fn raise() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
}
