//! The machine under the figures: without it they cannot be read later.

use std::{
    fs,
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use crate::report::Percentiles;

pub fn describe() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let cpu = field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.into());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let memory = field("/proc/meminfo", "MemTotal").unwrap_or_default();
    let gigabytes = memory.trim_end_matches(" kB").parse::<f64>().unwrap_or_default() / 1024.0 / 1024.0;
    format!("{cores} cores ({cpu}), {gigabytes:.0} GiB, Linux {}", kernel.trim())
}

pub fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

pub fn disk_sync(folder: &Path) -> anyhow::Result<Percentiles> {
    let mut file = tempfile::tempfile_in(folder)?;
    let block = [7; 8_192];
    let mut samples = Vec::new();
    let began = Instant::now();
    while samples.len() < 200 && began.elapsed() < Duration::from_secs(2) {
        let before = Instant::now();
        file.write_all(&block)?;
        file.sync_data()?;
        samples.push(before.elapsed().as_micros() as u32);
    }
    Ok(Percentiles::of(samples))
}

fn field(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'));
    value.map(|value| value.trim().to_owned())
}
