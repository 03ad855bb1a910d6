//! Every stream is an open file to the kernel: makes sure that there may be enough.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Beyond streams: listeners, Redis, `api`, requests that are no streams yet.
const OTHERS: u64 = 1_000;

/// Raises the soft limit as far as needed and allowed.
pub fn raise(streams: usize) -> anyhow::Result<()> {
    let needed = streams as u64 + OTHERS;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    anyhow::ensure!(
        maximum.is_none_or(|maximum| maximum >= needed),
        "MAX_STREAMS is {streams}, which needs {needed} open files, and {} are allowed (ulimit -Hn): \
         lower the one or raise the other",
        maximum.unwrap_or_default(),
    );
    if current.is_some_and(|current| current < needed) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(needed), maximum })?;
    }
    Ok(())
}
