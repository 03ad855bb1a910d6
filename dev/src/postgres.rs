//! A private Postgres: programs found or installed, a data folder made, a server started on a free port of loopback.
//!
//! It listens on TCP only, with a password: a folder deep down cannot break a socket path that is too long, and
//! other accounts of the machine cannot get in.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use testkit::ports::free_ports;
use testkit::postmaster;
use testkit::process::Account;
use testkit::programs::{self, POSTGRES};

use crate::folders::{Folders, works_in};
use crate::lifetime::{self, Life};
use crate::process::{Child, command, run_quietly};
use crate::{install, secrets, terminal};

pub(crate) const DATABASE: &str = "messenger";
/// As in docs/deploy.md.
const OLDEST_VERSION: u32 = 15;

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

/// The URL of the database whose data is under `dir`, and its server unless it was already running. Makes the data if there is
/// none.
pub(crate) async fn start(programs: &Programs, dir: &Path, life: Life) -> Result<(String, Option<Child>)> {
    // Another version never touches it.
    let data = dir.join(format!("postgres-{}", programs.version));
    let account = Account::for_data(&data)?;
    let password = password(dir)?;
    let url = |port: u16| format!("postgres://postgres:{password}@127.0.0.1:{port}/{DATABASE}");
    if let Some((_, port)) = ready(&data) {
        return Ok((url(port), None));
    }
    if !data.join("PG_VERSION").exists() {
        initialise(programs, &data, account, &password, life).await?;
    }
    let [port] = free_ports()?;
    terminal::step("Starting", format_args!("Postgres {} on 127.0.0.1:{port}", programs.version));
    let mut server = command(programs.bin_dir.join("postgres"), ["-D"]);
    server.arg(&data).args(["-p", &port.to_string()]);
    for setting in settings(life) {
        server.args(["-c", setting]);
    }
    let ready = async || ready(&data).is_some();
    let child = lifetime::start("postgres", server, account, dir, life, ready).await?;
    create_database(&url(port)).await?;
    Ok((url(port), Some(child)))
}

fn settings(life: Life) -> Vec<&'static str> {
    let mut settings = vec![
        "listen_addresses=127.0.0.1",
        "unix_socket_directories=",
        "max_connections=300",
        // Hosts that publish may use them, and tests do.
        "max_prepared_transactions=20",
        "log_line_prefix=%m ",
    ];
    if life != Life::Durable {
        settings.extend(["fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_wal_size=4GB"]);
    }
    settings
}

async fn initialise(
    programs: &Programs,
    data: &Path,
    account: Account,
    password: &str,
    life: Life,
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
    account.own(&begun)?;
    account.own(&password_file)?;
    let mut initdb =
        command(programs.bin_dir.join("initdb"), ["-U", "postgres", "--auth=scram-sha-256", "-D"]);
    initdb.arg(&begun).args(["--encoding=UTF8", "--locale=C.UTF-8", "--pwfile"]).arg(&password_file);
    if life != Life::Durable {
        initdb.arg("--no-sync");
    }
    initdb.current_dir("/");
    account.run(initdb.as_std_mut());
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

async fn create_database(url: &str) -> Result<()> {
    let mut connection = connect(&in_database(url, "postgres")?).await?;
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
