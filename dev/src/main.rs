//! `cargo dev`: runs the whole product from source, and its tests, on a machine where nothing is prepared.
//!
//! Its data is under `.dev/`. It stops what it starts, and knows the services only by their settings.

#![allow(clippy::disallowed_methods, reason = "a tool, whose user notices")]

mod cargo;
mod demo;
mod folders;
mod ingress;
mod install;
mod lifetime;
mod manage;
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

use crate::folders::Folders;

/// Runs everything from source: databases, api, gateways, and a proxy with one address in front.
#[derive(Parser)]
#[command(name = "cargo dev", bin_name = "cargo dev")]
struct DevCli {
    #[command(flatten)]
    given: servers::GivenServers,
    #[command(subcommand)]
    command: DevCommand,
}

#[derive(Subcommand)]
enum DevCommand {
    /// Run everything until Ctrl-C: databases, one api, two gateways, and a proxy in front of them
    Up(up::Options),
    /// Show what is running
    Status,
    /// Stop everything that runs from this workspace
    Down,
    /// Stop everything and delete the dev database, keys and secrets
    Reset,
    /// Open psql on the dev database
    Psql {
        /// Arguments of psql, for example: -c 'SELECT * FROM messenger.users'
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run the whole test suite on its own servers
    Test {
        /// Arguments of `cargo test --workspace`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Start databases for tests that you run yourself, leave them running, and print the `export` line to use them
    ///
    /// For example: eval "$(cargo dev env)" && cargo test -p api
    Env,
    /// Renew `api/.sqlx`, the query data that builds without a database use
    Prepare {
        /// Change nothing, and fail if the committed data is out of date
        #[arg(long)]
        check: bool,
    },
}

fn main() -> ExitCode {
    let cli = DevCli::parse();
    if nix::unistd::geteuid().is_root() {
        // Servers run as another account, which must be able to read what is installed for them.
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

async fn run(cli: DevCli) -> anyhow::Result<ExitCode> {
    let folders = Folders::open()?;
    match cli.command {
        DevCommand::Up(options) => return up::run(&folders, &cli.given, &options).await,
        DevCommand::Status => manage::status(&folders)?,
        DevCommand::Down => manage::down(&folders).await?,
        DevCommand::Reset => manage::reset(&folders).await?,
        DevCommand::Psql { args } => manage::psql(&folders, &cli.given, &args).await?,
        DevCommand::Test { args } => return suite::run(&folders, &cli.given, &with_separator(args)).await,
        DevCommand::Env => servers::print_env(&folders, &cli.given).await?,
        DevCommand::Prepare { check } => prepare::run(&folders, &cli.given, check).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Clap consumes a leading `--`, which cargo must see: what follows is for the test binaries.
fn with_separator(mut args: Vec<String>) -> Vec<String> {
    let separator = "--".to_owned();
    if std::env::args().any(|arg| arg == separator) && !args.contains(&separator) {
        args.insert(0, separator);
    }
    args
}
