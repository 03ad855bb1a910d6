//! Every connection is an open file to the kernel. Here is what this process may hold besides its streams, and it makes sure
//! that there may be enough: a process without descriptors cannot even answer its liveness probe.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Connections inside HTTP: requests that are no streams yet.
pub const HTTP: usize = 2_048;
/// Connections of operators.
pub const OPS: usize = 64;
/// Refused streams that are still being said goodbye to.
pub const TURNED_AWAY: usize = 1_000;
/// Redis, `api`, logs, the runtime's own.
const REST: usize = 500;

/// Raises the soft limit as far as is allowed, which must be far enough.
pub fn raise(streams: usize) -> anyhow::Result<()> {
    let needed = (streams + HTTP + OPS + TURNED_AWAY + REST) as u64;
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    anyhow::ensure!(
        maximum.is_none_or(|maximum| maximum >= needed),
        "MAX_STREAMS is {streams}, which needs {needed} open files, and {} are allowed (ulimit -Hn): \
         lower the one or raise the other",
        maximum.unwrap_or_default(),
    );
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    Ok(())
}
