//! The file that a running Postgres writes into its data folder.

use std::{fs, path::Path};

/// The pid and port of the server that takes connections on this data.
pub fn ready(data: &Path) -> Option<(u32, u16)> {
    let file = fs::read_to_string(data.join("postmaster.pid")).ok()?;
    // Line by line: pid, folder, time, port, and in the eighth line the state.
    let lines: Vec<&str> = file.lines().map(str::trim).collect();
    let pid = lines.first()?.parse().ok()?;
    (lines.get(7) == Some(&"ready")).then_some((pid, lines.get(3)?.parse().ok()?))
}
