//! Runs cargo in the workspace, and finds what it builds.

use std::path::PathBuf;

use anyhow::{Context, Result};
use tokio::process::Command;

use crate::folders::Folders;
use crate::process;

/// A cargo command in the workspace, without the variables that `cargo run` added for us: they would make build scripts run
/// again.
pub(crate) fn cargo(folders: &Folders, args: &[&str]) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = process::command(program, args);
    command.current_dir(&folders.root);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(added_by_cargo_run) {
            command.env_remove(name);
        }
    }
    command
}

fn added_by_cargo_run(name: &str) -> bool {
    name == "CARGO"
        || ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"]
            .iter()
            .any(|start| name.starts_with(start))
}

pub(crate) fn binaries(profile: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let target = own.ancestors().nth(2).context("the runner lies in cargo's target folder")?;
    Ok(target.join(profile))
}
