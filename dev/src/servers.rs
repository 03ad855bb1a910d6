//! Postgres and Redis: the ones that were given, or private ones.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::folders::Folders;
use crate::lifetime::{self, Life};
use crate::process::Child;
use crate::{postgres, redis, terminal, tools};

const STOP_PATIENCE: Duration = Duration::from_secs(20);

#[derive(clap::Args)]
pub(crate) struct GivenServers {
    /// Use this Postgres instead of a private one
    #[arg(long, env, global = true, hide_env_values = true)]
    pub(crate) database_url: Option<String>,
    /// Use this Redis instead of a private one
    #[arg(long, env, global = true, hide_env_values = true)]
    pub(crate) redis_url: Option<String>,
    /// Start Valkey instead of Redis, and install it if needed
    #[arg(long, global = true)]
    pub(crate) valkey: bool,
}

pub(crate) struct Servers {
    pub(crate) database_url: String,
    pub(crate) redis_url: String,
    /// Servers that this run started. Servers that were given or already running stay.
    pub(crate) children: Vec<Child>,
}

impl Servers {
    pub(crate) async fn start(
        folders: &Folders,
        given: &GivenServers,
        dir: &Path,
        life: Life,
    ) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let (database_url, postgres) = start_postgres(folders, given, dir, life).await?;
        let (redis_url, redis) = match &given.redis_url {
            Some(url) => (url.clone(), None),
            None => redis::start(&redis::program(folders, given.valkey).await?, dir, life).await?,
        };
        Ok(Self { database_url, redis_url, children: postgres.into_iter().chain(redis).collect() })
    }

    /// In reverse order.
    pub(crate) async fn stop(&self) {
        for child in self.children.iter().rev() {
            stop(child).await;
        }
    }
}

pub(crate) async fn stop(child: &Child) {
    child.stop(lifetime::STOP, STOP_PATIENCE).await;
}

pub(crate) async fn start_postgres(
    folders: &Folders,
    given: &GivenServers,
    dir: &Path,
    life: Life,
) -> Result<(String, Option<Child>)> {
    match &given.database_url {
        Some(url) => Ok((url.clone(), None)),
        None => postgres::start(&postgres::programs(folders).await?, dir, life).await,
    }
}

pub(crate) fn running(dir: &Path) -> impl DoubleEndedIterator<Item = (&'static str, u32, u16)> {
    let found = [("Postgres", postgres::running(dir)), ("Redis", redis::running(dir))];
    found.into_iter().filter_map(|(name, server)| server.map(|(pid, port)| (name, pid, port)))
}

pub(crate) async fn print_env(folders: &Folders, given: &GivenServers) -> Result<()> {
    let dir = folders.shared();
    fs::create_dir_all(&dir)?;
    // Two concurrent runs would both start servers.
    let lock = File::create(dir.join("lock"))?;
    lock.lock().context("cannot lock .dev/test")?;
    let servers = Servers::start(folders, given, &dir, Life::Detached).await?;
    let found = programs(folders, given).await;
    if let Some(list) = found.list_of_missing() {
        terminal::warn(format_args!("tests that need these programs will fail:{list}"));
    }
    let programs: Vec<_> =
        found.env.iter().map(|(name, path)| format!("{name}='{}'", path.display())).collect();
    terminal::answer(format_args!(
        "export DATABASE_URL='{}' REDIS_URL='{}' {}",
        servers.database_url,
        servers.redis_url,
        programs.join(" ")
    ));
    Ok(())
}

pub(crate) async fn programs(folders: &Folders, given: &GivenServers) -> tools::Found {
    // First the programs that others are installed with.
    let mut found = tools::all(folders).await;
    let postgres = postgres::programs(folders).await.map(|programs| programs.bin_dir);
    found.add("Postgres", "DEV_POSTGRES_BIN_DIR", postgres);
    found.add("Redis", "DEV_REDIS_SERVER", redis::program(folders, given.valkey).await);
    found
}
