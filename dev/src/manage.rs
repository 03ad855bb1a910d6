//! `cargo dev status`, `down`, `reset` and `psql`.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::programs;

use crate::folders::Folders;
use crate::servers::{self, GivenServers};
use crate::state::{Lock, RunState};
use crate::{lifetime, postgres, terminal};

const STOP_DEADLINE: Duration = Duration::from_secs(45);

pub(crate) fn status(folders: &Folders) -> Result<()> {
    match RunState::read(&folders.up())? {
        None => terminal::answer("not running (`cargo dev up` starts it)"),
        Some(state) => {
            let address = if state.address.is_empty() { "starting" } else { &state.address };
            terminal::answer(format_args!("{:<10} pid {:<8} {address}", "runner", state.runner));
            for process in &state.processes {
                let ended = if is_alive(process.pid) { "" } else { " ended" };
                terminal::answer(format_args!(
                    "{:<10} pid {:<8} {}{ended}",
                    process.name, process.pid, process.address
                ));
            }
        }
    }
    for (dir, what) in [(folders.up(), ""), (folders.shared(), " (of `cargo dev env`)")] {
        for (name, pid, port) in servers::running(&dir) {
            terminal::answer(format_args!("{name:<10} pid {pid:<8} 127.0.0.1:{port}{what}"));
        }
    }
    Ok(())
}

pub(crate) async fn down(folders: &Folders) -> Result<()> {
    let mut stopped = false;
    if let Some(state) = RunState::read(&folders.up())? {
        terminal::step("Stopping", format_args!("`cargo dev up`, process {}", state.runner));
        end(state.runner.cast_signed(), Signal::SIGTERM, || Ok(!Lock::is_free(&folders.up())?)).await?;
        stopped = true;
    }
    for dir in [folders.up(), folders.shared()] {
        for (name, pid, port) in servers::running(&dir).rev() {
            terminal::step("Stopping", format_args!("{name} on 127.0.0.1:{port}, process {pid}"));
            let pid = pid.cast_signed();
            end(pid, lifetime::STOP, || Ok(is_alive(pid))).await?;
            stopped = true;
        }
    }
    if !stopped {
        terminal::step("Finished", "nothing was running");
    }
    Ok(())
}

pub(crate) async fn reset(folders: &Folders) -> Result<()> {
    down(folders).await?;
    terminal::step("Deleting", "the dev database, keys and secrets under .dev (installed servers are kept)");
    for dir in [folders.up(), folders.shared()] {
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot delete {}", dir.display()))?;
        }
    }
    Ok(())
}

pub(crate) async fn psql(folders: &Folders, given: &GivenServers, args: &[String]) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let program = if let Some(program) = programs::on_path(&path, &["psql"]) {
        program
    } else {
        let beside = postgres::programs(folders).await?.bin_dir.join("psql");
        if !beside.exists() {
            bail!("no psql is installed (Debian: apt install postgresql-client)");
        }
        beside
    };
    let mut psql = Command::new(program);
    if let Some(url) = &given.database_url {
        psql.arg(url)
    } else {
        let Some((_, port)) = postgres::running(&folders.up()) else {
            bail!("the dev database is not running; start it with `cargo dev up`");
        };
        // Not on the command line, where every account could read it.
        psql.env("PGPASSWORD", postgres::password(&folders.up())?)
            .arg(format!("postgres://postgres@127.0.0.1:{port}/{}", postgres::DATABASE))
    };
    Err(psql.args(args).exec()).context("cannot start psql")
}

async fn end(pid: i32, signal: Signal, runs: impl Fn() -> Result<bool>) -> Result<()> {
    let pid = Pid::from_raw(pid);
    for (signal, patience) in [(signal, STOP_DEADLINE), (Signal::SIGKILL, Duration::from_secs(5))] {
        kill(pid, signal).with_context(|| format!("cannot signal process {pid}"))?;
        let gone = async {
            while runs()? {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok(())
        };
        if let Ok(outcome) = tokio::time::timeout(patience, gone).await {
            return outcome;
        }
    }
    bail!("process {pid} did not end, not even by SIGKILL")
}

fn is_alive(pid: i32) -> bool {
    // A zombie has ended.
    fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"))
        .is_ok_and(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z')))
}
