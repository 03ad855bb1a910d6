//! `cargo dev`: runs the whole product from source, and its tests, on a machine where nothing is prepared.
//!
//! What it keeps is under `.dev/`; what it starts, it stops. It knows the services only by their settings.

mod cargo;
mod find;
mod install;
mod places;
mod postgres;
mod prepare;
mod process;
mod redis;
mod secrets;
mod servers;
mod terminal;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use nix::sys::stat::{Mode, umask};

use crate::places::Places;

/// Runs everything from source: databases, api, gateways, and one address in front of them.
#[derive(Parser)]
#[command(name = "cargo dev", bin_name = "cargo dev")]
struct Cli {
    #[command(flatten)]
    given: servers::Given,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Starts databases for hand-run tests, leaves them running, and prints the `export` line to use them
    ///
    /// For example: eval "$(cargo dev env)" && cargo test -p api
    Env,
    /// Renews `api/.sqlx`, the query data that builds without a database are checked against
    Prepare {
        /// Changes nothing; fails when the committed data is not what the queries need
        #[arg(long)]
        check: bool,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if nix::unistd::geteuid().is_root() {
        // Servers run as another account then, and must be able to read what was installed for them.
        umask(Mode::S_IWGRP | Mode::S_IWOTH);
    }
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run(cli)));
    outcome.unwrap_or_else(|error| {
        terminal::fail(format_args!("{error:#}"));
        ExitCode::FAILURE
    })
}

async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let places = Places::open()?;
    match cli.command {
        Command::Env => servers::print_env(&places, &cli.given).await?,
        Command::Prepare { check } => prepare::run(&places, &cli.given, check).await?,
    }
    Ok(ExitCode::SUCCESS)
}
