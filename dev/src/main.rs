//! `cargo dev`: runs the whole product from source, and its tests, on a machine where nothing is prepared.
//!
//! What it keeps is under `.dev/`; what it starts, it stops. It knows the services only by their settings.

#![allow(clippy::disallowed_methods, reason = "a tool, whose user notices")]

mod cargo;
mod demo;
mod find;
mod ingress;
mod install;
mod manage;
mod places;
mod postgres;
mod prepare;
mod process;
mod redis;
mod secrets;
mod servers;
mod state;
mod stop;
mod suite;
mod terminal;
mod tools;
mod up;

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
    /// Runs everything until Ctrl-C: databases, one api, two gateways, and one address in front of them
    Up(up::Options),
    /// Shows what runs
    Status,
    /// Stops everything that runs from this workspace
    Down,
    /// Stops everything and deletes the dev database, keys and secrets
    Reset,
    /// Opens a shell in the dev database
    Psql {
        /// For psql, for example: -c 'SELECT * FROM users'
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Runs the whole test suite over servers of its own
    Test {
        /// For `cargo test --workspace`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
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
        Command::Up(options) => return up::run(&places, &cli.given, &options).await,
        Command::Status => manage::status(&places)?,
        Command::Down => manage::down(&places).await?,
        Command::Reset => manage::reset(&places).await?,
        Command::Psql { args } => manage::psql(&places, &cli.given, &args).await?,
        Command::Test { args } => return suite::run(&places, &cli.given, &with_separator(args)).await,
        Command::Env => servers::print_env(&places, &cli.given).await?,
        Command::Prepare { check } => prepare::run(&places, &cli.given, check).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Clap takes a leading `--` for its own, but cargo must see it: what follows is for the test binaries.
fn with_separator(mut args: Vec<String>) -> Vec<String> {
    let separator = "--".to_owned();
    if std::env::args().any(|arg| arg == separator) && !args.contains(&separator) {
        args.insert(0, separator);
    }
    args
}
