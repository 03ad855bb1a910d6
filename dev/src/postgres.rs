//! A private Postgres: programs found or installed, a data folder made, a server started on a free port of loopback.
//!
//! It listens on TCP only, with a password: a folder deep down cannot break a socket path that is too long, and
//! other accounts of the machine cannot get in.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use testkit::ports::free_ports;
use testkit::postmaster;
use testkit::process::Account;
use testkit::programs::{self, POSTGRES};

use crate::folders::{Folders, works_in};
use crate::lifetime::{Durability, Life, log_end, log_file};
use crate::process::{Child, command, run_as, run_quietly};
use crate::{install, secrets, terminal};

pub(crate) const DATABASE: &str = "messenger";
const OLDEST_VERSION: u32 = 14;
const START_DEADLINE: Duration = Duration::from_mins(1);
const STOP_PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Programs {
    pub(crate) bin_dir: PathBuf,
    version: u32,
}

/// Finds Postgres on the machine, else what was installed under `.dev`, else installs it.
pub(crate) async fn programs(folders: &Folders) -> Result<Programs> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = install::postgres_bin_dir(&folders.tools());
    let look = || {
        programs::dir_with(&path, &POSTGRES)
            .into_iter()
            .chain(programs::postgres_of_debian())
            .chain(programs::holds(&installed, &POSTGRES).then(|| installed.clone()))
            .collect::<Vec<_>>()
    };
    if let Some(programs) = first_usable(look()).await {
        return Ok(programs);
    }
    install::install_postgres(&folders.tools()).await?;
    first_usable(look()).await.context("Postgres was installed but does not start: set DATABASE_URL instead")
}

async fn first_usable(dirs: Vec<PathBuf>) -> Option<Programs> {
    for bin_dir in dirs {
        // A link on PATH leads to the folder where its libraries and extensions are found.
        let real = bin_dir.join("postgres").canonicalize().ok()?;
        let bin_dir =
            real.parent().filter(|dir| programs::holds(dir, &POSTGRES)).map_or(bin_dir, Path::to_owned);
        let output = command(bin_dir.join("postgres"), ["--version"]).output().await.ok()?;
        if let Some(version) = major_version(&String::from_utf8_lossy(&output.stdout))
            && version >= OLDEST_VERSION
        {
            return Some(Programs { bin_dir, version });
        }
    }
    None
}

/// `postgres (PostgreSQL) 15.9 (Debian …)` is 15.
fn major_version(said: &str) -> Option<u32> {
    let number = said.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
    number.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

pub(crate) struct DevPostgres {
    /// None when it was found running already.
    pub(crate) child: Option<Child>,
    pub(crate) port: u16,
    password: String,
}

impl DevPostgres {
    pub(crate) fn url(&self) -> String {
        format!("postgres://postgres:{}@127.0.0.1:{}/{DATABASE}", self.password, self.port)
    }
}

/// Where the data of a version lies; another version never touches it.
fn data_dir(dir: &Path, version: u32) -> PathBuf {
    dir.join(format!("postgres-{version}"))
}

/// Starts the server whose data is under `dir`, making the data first when there is none.
pub(crate) async fn start(
    programs: &Programs,
    dir: &Path,
    durability: Durability,
    life: Life,
) -> Result<DevPostgres> {
    let data = data_dir(dir, programs.version);
    let account = Account::for_data(&data)?;
    let password = password(dir)?;
    if let Some((_, port)) = ready(&data) {
        return Ok(DevPostgres { child: None, port, password });
    }
    if !data.join("PG_VERSION").exists() {
        initialise(programs, &data, account, &password, durability).await?;
    }
    let [port] = free_ports()?;
    terminal::step("Starting", format_args!("Postgres {} on 127.0.0.1:{port}", programs.version));
    let mut server = command(programs.bin_dir.join("postgres"), ["-D"]);
    server.arg(&data).args(["-p", &port.to_string()]);
    for setting in settings(durability) {
        server.args(["-c", setting]);
    }
    server.current_dir("/");
    run_as(&mut server, account);
    // SIGINT is Postgres' fast shutdown, and leaves nothing to recover.
    let child = Child::spawn("postgres", life.shape(server, Signal::SIGINT), log_file(dir, "postgres")?)?;
    let postgres = DevPostgres { child: Some(child), port, password };
    wait_until_ready(&postgres, &data).await.with_context(|| log_end(dir, "postgres"))?;
    create_database(&postgres).await?;
    Ok(postgres)
}

fn settings(durability: Durability) -> Vec<&'static str> {
    let mut settings = vec![
        "listen_addresses=127.0.0.1",
        "unix_socket_directories=",
        "max_connections=300",
        "log_line_prefix=%m ",
    ];
    if durability == Durability::Forgetful {
        settings.extend(["fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_wal_size=4GB"]);
    }
    settings
}

async fn initialise(
    programs: &Programs,
    data: &Path,
    account: Option<Account>,
    password: &str,
    durability: Durability,
) -> Result<()> {
    terminal::step("Creating", format_args!("a Postgres {} data folder", programs.version));
    // Made aside, so that one which was interrupted is never taken for whole.
    let begun = data.with_extension("new");
    if begun.exists() {
        fs::remove_dir_all(&begun)?;
    }
    fs::create_dir_all(&begun)?;
    let password_file = data.with_extension("initdb");
    let _ = fs::remove_file(&password_file);
    secrets::kept(&password_file, || Ok(password.to_owned()))?;
    if let Some(account) = account {
        account.own(&begun)?;
        account.own(&password_file)?;
    }
    let mut initdb =
        command(programs.bin_dir.join("initdb"), ["-U", "postgres", "--auth=scram-sha-256", "-D"]);
    initdb.arg(&begun).args(["--encoding=UTF8", "--locale=C.UTF-8", "--pwfile"]).arg(&password_file);
    if durability == Durability::Forgetful {
        initdb.arg("--no-sync");
    }
    initdb.current_dir("/");
    run_as(&mut initdb, account);
    let outcome = run_quietly(initdb).await;
    fs::remove_file(&password_file)?;
    outcome.context("a Postgres data folder could not be made")?;
    fs::rename(&begun, data)?;
    Ok(())
}

/// The pid and port of the server that takes connections on this data.
fn ready(data: &Path) -> Option<(u32, u16)> {
    postmaster::ready(data).filter(|(pid, _)| works_in(*pid, data))
}

pub(crate) fn running(dir: &Path) -> Option<(u32, u16)> {
    fs::read_dir(dir).ok()?.flatten().find_map(|entry| ready(&entry.path()))
}

pub(crate) fn password(dir: &Path) -> Result<String> {
    secrets::kept(&dir.join("postgres.password"), secrets::random_password)
}

async fn wait_until_ready(postgres: &DevPostgres, data: &Path) -> Result<()> {
    let wait = async {
        while ready(data).is_none() {
            if postgres.child.as_ref().is_some_and(Child::has_ended) {
                bail!("Postgres ended while starting");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    };
    tokio::time::timeout(START_DEADLINE, wait).await.context("Postgres did not become ready")?
}

async fn create_database(postgres: &DevPostgres) -> Result<()> {
    let mut connection = connect(&in_database(&postgres.url(), "postgres")?).await?;
    let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
        .bind(DATABASE)
        .fetch_one(&mut connection)
        .await?;
    if !exists {
        sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {DATABASE}"))).execute(&mut connection).await?;
    }
    connection.close().await?;
    Ok(())
}

/// Connects, or says in one sentence that it does not answer.
pub(crate) async fn connect(url: &str) -> Result<PgConnection> {
    tokio::time::timeout(Duration::from_secs(10), PgConnection::connect(url))
        .await
        .map_err(anyhow::Error::from)
        .and_then(|connected| connected.map_err(anyhow::Error::from))
        .context(
            "Postgres does not answer at DATABASE_URL: start it, or unset the variable to get a private one",
        )
}

pub(crate) fn in_database(url: &str, database: &str) -> Result<String> {
    let scheme = url.find("://").context("DATABASE_URL is no URL")? + 3;
    let path = url[scheme..].find(['/', '?']).map_or(url.len(), |at| scheme + at);
    let query = url[path..].find('?').map_or(url.len(), |at| path + at);
    Ok(format!("{}/{database}{}", &url[..path], &url[query..]))
}

pub(crate) async fn stop(postgres: &DevPostgres) {
    if let Some(child) = &postgres.child {
        child.stop(Signal::SIGINT, STOP_PATIENCE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read_whatever_follows() {
        assert_eq!(major_version("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)"), Some(15));
        assert_eq!(major_version("postgres (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(major_version("who knows"), None);
    }

    #[test]
    fn only_the_database_of_a_url_is_replaced() {
        let cases = [
            ("postgres://u:p@h:1/a", "postgres://u:p@h:1/b"),
            ("postgres://h", "postgres://h/b"),
            ("postgres://h?sslmode=require", "postgres://h/b?sslmode=require"),
            ("postgres://h/a?sslmode=require", "postgres://h/b?sslmode=require"),
        ];
        for (url, expected) in cases {
            assert_eq!(in_database(url, "b").unwrap(), expected);
        }
    }
}
