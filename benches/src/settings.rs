//! What the bench is told by its surroundings: where programs are.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

/// The Redis server: the one that the dev runner names, else this machine's.
pub fn redis_server() -> anyhow::Result<PathBuf> {
    if let Some(path) = variable("DEV_REDIS_SERVER") {
        return Ok(path);
    }
    on_path("redis-server").or_else(|| on_path("valkey-server")).context(
        "no Redis server: neither redis-server nor valkey-server is on PATH, nor is DEV_REDIS_SERVER set",
    )
}

/// The folder of `initdb` and `postgres`: the one that the dev runner names, else the newest of this machine.
pub fn postgres_programs() -> anyhow::Result<PathBuf> {
    if let Some(folder) = variable("DEV_POSTGRES_BIN_DIR") {
        return Ok(folder);
    }
    let version = |folder: &Path| folder.file_name()?.to_str()?.parse::<u32>().ok();
    let installed = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = installed
        .map(|entry| entry.path())
        .filter(|folder| folder.join("bin/postgres").exists())
        .max_by_key(|folder| version(folder));
    newest
        .map(|folder| folder.join("bin"))
        .or_else(|| on_path("initdb")?.parent().map(Path::to_owned))
        .context("no Postgres server: initdb is not on PATH, nor is DEV_POSTGRES_BIN_DIR set")
}

/// nginx: the one that the dev runner names, else this machine's. It is often where only root's PATH leads.
pub fn nginx() -> anyhow::Result<PathBuf> {
    let usual = || Some(PathBuf::from("/usr/sbin/nginx")).filter(|path| path.is_file());
    let found = variable("DEV_NGINX").or_else(|| on_path("nginx")).or_else(usual);
    found.context("no nginx: it is not on PATH, nor is DEV_NGINX set")
}

/// The cargo that runs us, if one does.
pub fn cargo() -> Option<PathBuf> {
    variable("CARGO")
}

/// A service's binary, which the same build puts beside our own.
pub fn service(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("a running program has a path")?;
    let path = own.with_file_name(name);
    anyhow::ensure!(path.exists(), "{} is not built: cargo build -p api -p stream-gateway", path.display());
    Ok(path)
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = variable("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|path| path.is_file())
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}
