//! Postgres and Redis: the ones that were given, or private ones.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};

use crate::folders::Folders;
use crate::lifetime::{Durability, Life};
use crate::process::Child;
use crate::{postgres, redis, terminal, tools};

#[derive(clap::Args)]
pub(crate) struct Given {
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
    pub(crate) postgres: Option<postgres::DevPostgres>,
    pub(crate) redis: Option<redis::DevRedis>,
}

impl Servers {
    pub(crate) async fn start(
        folders: &Folders,
        given: &Given,
        dir: &Path,
        durability: Durability,
        life: Life,
    ) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let (postgres, database_url) = start_postgres(folders, given, dir, durability, life).await?;
        let (redis, redis_url) = if let Some(url) = &given.redis_url {
            (None, url.clone())
        } else {
            let redis = redis::start(&redis::program(folders, given.valkey).await?, dir, life).await?;
            let url = redis.url();
            (Some(redis), url)
        };
        Ok(Self { database_url, redis_url, postgres, redis })
    }

    pub(crate) fn children(&self) -> impl Iterator<Item = &Child> {
        let postgres = self.postgres.iter().filter_map(|postgres| postgres.child.as_ref());
        postgres.chain(self.redis.iter().filter_map(|redis| redis.child.as_ref()))
    }

    /// In reverse order. Servers that were given or already running stay.
    pub(crate) async fn stop(&self) {
        if let Some(redis) = &self.redis {
            redis::stop(redis).await;
        }
        if let Some(postgres) = &self.postgres {
            postgres::stop(postgres).await;
        }
    }
}

pub(crate) async fn start_postgres(
    folders: &Folders,
    given: &Given,
    dir: &Path,
    durability: Durability,
    life: Life,
) -> Result<(Option<postgres::DevPostgres>, String)> {
    if let Some(url) = &given.database_url {
        return Ok((None, url.clone()));
    }
    let programs = postgres::programs(folders).await?;
    let postgres = postgres::start(&programs, dir, durability, life).await?;
    let url = postgres.url();
    Ok((Some(postgres), url))
}

pub(crate) async fn print_env(folders: &Folders, given: &Given) -> Result<()> {
    let dir = folders.shared();
    fs::create_dir_all(&dir)?;
    // Two concurrent runs would both start servers.
    let lock = File::create(dir.join("lock"))?;
    lock.lock().context("cannot lock .dev/test")?;
    let servers = Servers::start(folders, given, &dir, Durability::Forgetful, Life::Detached).await?;
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

pub(crate) async fn programs(folders: &Folders, given: &Given) -> tools::Found {
    // First the programs that others are installed with.
    let mut found = tools::all(folders).await;
    let postgres = postgres::programs(folders).await.map(|programs| programs.bin_dir);
    found.add("Postgres", "DEV_POSTGRES_BIN_DIR", postgres);
    found.add("Redis", "DEV_REDIS_SERVER", redis::program(folders, given.valkey).await);
    found
}
