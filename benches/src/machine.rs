//! The machine under the figures: without it they cannot be read later.

use std::{
    fs,
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;

use crate::report::Percentiles;

const PAGE: u64 = 4_096;

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

/// In bytes; what may be used without swapping.
pub fn available_memory() -> anyhow::Result<u64> {
    bytes("MemAvailable")
}

/// What the kernel needs for sockets, in bytes, over the whole machine.
#[derive(Debug, Clone, Copy)]
pub struct KernelMemory {
    /// Of all its objects: sockets, files, epoll's entries.
    pub slab: u64,
    /// Bytes in the sockets' buffers.
    pub sockets: u64,
    pub available: u64,
}

impl KernelMemory {
    pub fn now() -> anyhow::Result<Self> {
        let text = fs::read_to_string("/proc/net/sockstat")?;
        let tcp = text.lines().find_map(|line| line.strip_prefix("TCP: ")).unwrap_or_default();
        let pages: u64 =
            tcp.rsplit("mem ").next().unwrap_or_default().trim().parse().context("TCP's pages")?;
        Ok(Self { slab: bytes("Slab")?, sockets: pages * PAGE, available: available_memory()? })
    }
}

fn bytes(name: &str) -> anyhow::Result<u64> {
    let value = field("/proc/meminfo", name).with_context(|| format!("no {name} in /proc/meminfo"))?;
    Ok(value.trim_end_matches(" kB").parse::<u64>().with_context(|| format!("{name} is {value}"))? * 1_024)
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
