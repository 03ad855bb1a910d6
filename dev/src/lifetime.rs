//! Starts a server of the runner: its lifetime, data and log.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use testkit::process::Account;
use tokio::process::Command;

use crate::process::{self, Child};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    /// With the runner; the data is kept.
    Durable,
    /// With the runner; fast, for throw-away data.
    Forgetful,
    /// As `Forgetful`, but until `cargo dev down`.
    Detached,
}

/// The fast shutdown of both servers; it leaves Postgres nothing to recover.
pub(crate) const STOP: Signal = Signal::SIGINT;

/// Starts a server that logs to a new file in `dir`, and waits until it is ready.
pub(crate) async fn start(
    name: &str,
    mut server: Command,
    account: Account,
    dir: &Path,
    life: Life,
    ready: impl AsyncFn() -> bool,
) -> Result<Child> {
    server.current_dir("/");
    account.run(server.as_std_mut());
    match life {
        Life::Durable | Life::Forgetful => process::bind_to_runner(&mut server, STOP),
        Life::Detached => process::detach(&mut server),
    }
    let log = dir.join(format!("{name}.log"));
    let child = Child::log(name, server, File::create(&log)?)?;
    // The file itself may be gone soon.
    child.until_ready(ready).await.with_context(|| {
        let log = fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        format!("{name} logged:\n{}\n", lines[lines.len().saturating_sub(10)..].join("\n"))
    })?;
    Ok(child)
}
