//! `cargo dev prepare`: the query data in `api/.sqlx`, for builds without a database.
//!
//! The `query!` macros write it themselves while they are compiled against a live database. This makes that
//! database, with the tables and functions of api, and replaces the old data by the new.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use sqlx::migrate::Migrator;
use sqlx::{AssertSqlSafe, Connection, Executor};

use crate::cargo::cargo;
use crate::folders::Folders;
use crate::lifetime::Life;
use crate::servers::GivenServers;
use crate::{postgres, process, servers, terminal};

type QueryData = BTreeMap<String, Vec<u8>>;

pub(crate) async fn run(folders: &Folders, given: &GivenServers, check: bool) -> Result<()> {
    let scratch = folders.scratch()?;
    let (url, server) = servers::start_postgres(folders, given, scratch.path(), Life::Forgetful).await?;
    let fresh =
        with_scratch_database(&url, async |url| describe_queries(folders, url, scratch.path()).await).await;
    if let Some(server) = server {
        servers::stop(&server).await;
    }
    let fresh = fresh?;
    let committed_dir = folders.root.join("api/.sqlx");
    fs::create_dir_all(&committed_dir)?;
    let committed = read(&committed_dir)?;
    let differences = differences(&committed, &fresh);
    if differences.is_empty() {
        terminal::step("Finished", format_args!("{} queries, api/.sqlx is up to date", fresh.len()));
        return Ok(());
    }
    if check {
        bail!(
            "api/.sqlx is not what the queries need: run `cargo dev prepare` and commit it\n{}",
            differences.join("\n")
        );
    }
    write(&committed_dir, &committed, &fresh)?;
    terminal::step(
        "Finished",
        format_args!("{} queries, api/.sqlx renewed:\n{}", fresh.len(), differences.join("\n")),
    );
    Ok(())
}

async fn with_scratch_database<T>(url: &str, work: impl AsyncFnOnce(&str) -> Result<T>) -> Result<T> {
    let name = format!("prepare_{}", std::process::id());
    let mut admin = postgres::connect(url).await?;
    admin.execute(AssertSqlSafe(format!("CREATE DATABASE {name}"))).await?;
    let outcome = work(&postgres::in_database(url, &name)?).await;
    admin.execute(AssertSqlSafe(format!("DROP DATABASE {name} WITH (FORCE)"))).await?;
    admin.close().await?;
    outcome
}

async fn describe_queries(folders: &Folders, url: &str, scratch: &Path) -> Result<QueryData> {
    terminal::step("Migrating", "a scratch database");
    let mut connection = postgres::connect(url).await?;
    connection.execute("CREATE SCHEMA messenger").await?;
    let migrations = folders.root.join("api/migrations");
    let migrator = Migrator::new(migrations.as_path()).await.context("cannot read api/migrations")?;
    migrator.run(&mut connection).await.context("a migration failed")?;
    // The files come in no order, and a plain SQL function is otherwise checked against the functions that it calls.
    connection.execute("SET check_function_bodies = off").await?;
    for file in fs::read_dir(folders.root.join("api/sql")).context("cannot read api/sql")? {
        let path = file?.path();
        let function = fs::read_to_string(&path)?;
        connection
            .execute(AssertSqlSafe(function))
            .await
            .with_context(|| format!("{} failed", path.display()))?;
    }
    connection.close().await?;

    let fresh = scratch.join("queries");
    fs::create_dir(&fresh)?;
    expand_macros_again(folders)?;
    let mut check = cargo(folders, &["check", "--quiet", "--package", "api", "--all-targets"]);
    check.env("DATABASE_URL", url).env("SQLX_OFFLINE", "false").env("SQLX_OFFLINE_DIR", &fresh);
    terminal::step("Checking", "the queries of api against it");
    let status = process::run_to_end(check, Signal::SIGTERM).await?;
    if !status.success() {
        bail!("api does not compile against a database with its schema; api/.sqlx was left as it is");
    }
    let fresh = read(&fresh)?;
    if fresh.is_empty() {
        bail!("no query of api was seen, though it was compiled; api/.sqlx was left as it is");
    }
    Ok(fresh)
}

/// Cargo compiles a crate again, and with it all that depends on it, when its root file is newer than the last result.
fn expand_macros_again(folders: &Folders) -> Result<()> {
    for root in ["api/src/lib.rs", "api/src/main.rs"] {
        let root = folders.root.join(root);
        if root.exists() {
            File::options().append(true).open(root)?.set_modified(SystemTime::now())?;
        }
    }
    Ok(())
}

fn read(dir: &Path) -> Result<QueryData> {
    let mut data = QueryData::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if let Some(name) = path.file_name().and_then(|name| name.to_str())
            && name.starts_with("query-")
        {
            data.insert(name.to_owned(), fs::read(&path)?);
        }
    }
    Ok(data)
}

fn write(dir: &Path, committed: &QueryData, fresh: &QueryData) -> Result<()> {
    for (name, content) in fresh.iter().filter(|(name, content)| committed.get(*name) != Some(content)) {
        fs::write(dir.join(name), content)?;
    }
    for name in committed.keys().filter(|name| !fresh.contains_key(*name)) {
        fs::remove_file(dir.join(name))?;
    }
    Ok(())
}

fn differences(committed: &QueryData, fresh: &QueryData) -> Vec<String> {
    let names: BTreeSet<_> = committed.keys().chain(fresh.keys()).collect();
    let line = |name| {
        let (what, content) = match (committed.get(name), fresh.get(name)) {
            (None, Some(new)) => ("new", new),
            (Some(old), Some(new)) if old != new => ("changed", new),
            (Some(old), None) => ("unused", old),
            _ => return None,
        };
        Some(format!("  {what}: {}", beginning_of_query(content)))
    };
    names.into_iter().filter_map(line).collect()
}

fn beginning_of_query(content: &[u8]) -> String {
    let content = String::from_utf8_lossy(content);
    let sql =
        content.split_once("\"query\": \"").map_or("", |(_, rest)| rest).lines().next().unwrap_or_default();
    let words: Vec<&str> = sql.split("\\n").flat_map(str::split_whitespace).take(12).collect();
    words.join(" ").trim_end_matches("\",").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(queries: &[(&str, &str)]) -> QueryData {
        let content =
            |sql: &str| format!("{{\n  \"query\": \"{sql}\",\n  \"describe\": {{}}\n}}\n").into_bytes();
        queries.iter().map(|(name, sql)| (format!("query-{name}.json"), content(sql))).collect()
    }

    #[test]
    fn equal_data_has_no_differences() {
        let queries = data(&[("1", "SELECT 1"), ("2", "SELECT 2")]);
        assert!(differences(&queries, &queries).is_empty());
    }

    #[test]
    fn what_differs_is_named_by_its_sql() {
        let committed = data(&[("1", "SELECT 1"), ("2", "SELECT old\\n  FROM t"), ("3", "SELECT 3")]);
        let fresh = data(&[("2", "SELECT new\\n  FROM t"), ("3", "SELECT 3"), ("4", "SELECT 4")]);
        let expected = ["  unused: SELECT 1", "  changed: SELECT new FROM t", "  new: SELECT 4"];
        assert_eq!(differences(&committed, &fresh), expected);
    }

    #[test]
    fn writing_leaves_exactly_the_fresh_data() {
        let dir = std::env::temp_dir().join(format!("prepare-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let committed = data(&[("1", "SELECT 1"), ("2", "SELECT 2")]);
        let fresh = data(&[("2", "SELECT two"), ("3", "SELECT 3")]);
        write(&dir, &QueryData::new(), &committed).unwrap();
        write(&dir, &committed, &fresh).unwrap();
        let left = read(&dir);
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(left.unwrap(), fresh);
    }
}
