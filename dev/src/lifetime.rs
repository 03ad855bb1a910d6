//! How long a server of the runner lives, how its data is kept, and where it logs.

use std::fs::{self, File};
use std::path::Path;

use anyhow::Result;
use nix::sys::signal::Signal;
use tokio::process::Command;

use crate::process::{self, ChildOutput};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    Durable,
    /// Fast, for throw-away data.
    Forgetful,
}

#[derive(Clone, Copy)]
pub(crate) enum Life {
    Bound,
    /// Until `cargo dev down`.
    Detached,
}

impl Life {
    pub(crate) fn shape(self, mut command: Command, on_death: Signal) -> Command {
        match self {
            Self::Bound => process::bind_to_runner(&mut command, on_death),
            Self::Detached => process::detach(&mut command),
        }
        command
    }
}

/// A new log file at each start.
pub(crate) fn log_file(dir: &Path, name: &str) -> Result<ChildOutput> {
    Ok(ChildOutput::File(File::create(dir.join(format!("{name}.log")))?))
}

/// Context for a failed start; the file itself may be gone soon.
pub(crate) fn log_end(dir: &Path, name: &str) -> String {
    let log = fs::read_to_string(dir.join(format!("{name}.log"))).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    format!("{name} logged:\n{}\n", lines[lines.len().saturating_sub(10)..].join("\n"))
}
