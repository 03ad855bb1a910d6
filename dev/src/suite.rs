//! `cargo dev test`: the whole test suite over real servers, which are started for it, fast and forgetful, and
//! stopped after it.

use std::num::NonZero;
use std::path::Path;
use std::process::{ExitCode, ExitStatus};
use std::thread::available_parallelism;

use anyhow::{Result, bail};
use nix::sys::signal::Signal;

use crate::cargo::cargo;
use crate::folders::Folders;
use crate::lifetime::Life;
use crate::servers::{GivenServers, Servers, programs};
use crate::stop::Stop;
use crate::{process, terminal};

const INTERRUPTED: u8 = 130;

pub(crate) async fn run(folders: &Folders, given: &GivenServers, args: &[String]) -> Result<ExitCode> {
    let mut stop = Stop::listen()?;
    let scratch = folders.scratch()?;
    let mut servers = None;
    let outcome = tokio::select! {
        outcome = build_and_test(folders, given, args, scratch.path(), &mut servers) => outcome,
        () = stop.requested() => Ok(ExitCode::from(INTERRUPTED)),
    };
    if let Some(servers) = servers {
        servers.stop().await;
    }
    outcome
}

async fn build_and_test(
    folders: &Folders,
    given: &GivenServers,
    args: &[String],
    scratch: &Path,
    servers: &mut Option<Servers>,
) -> Result<ExitCode> {
    let found = programs(folders, given).await;
    if let Some(list) = found.list_of_missing() {
        if args.is_empty() {
            bail!("the tests need programs that are missing; install them, or name the tests to run:{list}");
        }
        terminal::warn(format_args!("tests that need these programs will fail:{list}"));
    }
    let started = Servers::start(folders, given, scratch, Life::Forgetful).await?;
    let servers = servers.insert(started);
    // The end-to-end tests run the services' binaries, which cargo does not build for tests of another package.
    let build = cargo(folders, &["build", "--workspace", "--bins"]);
    let status = process::run_to_end(build, Signal::SIGTERM).await?;
    if !status.success() {
        return Ok(exit_code(status));
    }
    let mut test = cargo(folders, &["test", "--workspace", "--no-fail-fast"]);
    test.args(args)
        .env("DATABASE_URL", &servers.database_url)
        .env("REDIS_URL", &servers.redis_url)
        .env("SQLX_OFFLINE", "true")
        .envs(found.env);
    // Most tests wait most of the time.
    if std::env::var_os("RUST_TEST_THREADS").is_none() {
        let cores = available_parallelism().map_or(1, NonZero::get);
        test.env("RUST_TEST_THREADS", (2 * cores).to_string());
    }
    terminal::step("Testing", "the workspace");
    Ok(exit_code(process::run_to_end(test, Signal::SIGTERM).await?))
}

fn exit_code(status: ExitStatus) -> ExitCode {
    status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}
