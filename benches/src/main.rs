//! `cargo run --release -p benches -- <scenario>…`: measures, and prints figures.

#![allow(clippy::disallowed_methods, reason = "a tool, whose user notices")]

use std::process::{Command, ExitCode};

use anyhow::Context as _;
use benches::{
    load,
    scenarios::{self, Contender, GatewayBuild, Scenario, Sizes},
};
use clap::{Parser, ValueEnum};

/// Measures the release binaries of both services on a private, durable Postgres and Redis.
///
/// Load and servers share this machine; run nothing else on it.
#[derive(Debug, Parser)]
#[command(next_line_help = true)]
struct BenchCli {
    /// Scenarios to measure; all if none is named
    #[arg(value_enum)]
    scenarios: Vec<Scenario>,
    /// Use small numbers, to see that the bench works
    #[arg(long)]
    quick: bool,
    /// Streams on the gateway; of `million`, in all
    #[arg(long)]
    streams: Option<usize>,
    /// Events per second for each step of `fanout` after the first, separated by commas
    #[arg(long, value_delimiter = ',')]
    rates: Vec<u32>,
    /// For `opening` and `peers`: a gateway to measure, as NAME=FOLDER of its binary; may be repeated
    #[arg(long = "gateway", value_parser = GatewayBuild::in_folder)]
    gateways: Vec<GatewayBuild>,
    /// For `peers`: what to measure; all by default
    #[arg(long, value_enum, value_delimiter = ',')]
    contenders: Vec<Contender>,
    /// For `opening` and `peers`: how often everything is measured, in alternating order
    #[arg(long)]
    rounds: Option<usize>,
    /// For `publish`: events before the size of the table of staged events is looked at again
    #[arg(long)]
    events: Option<u64>,
    /// Use the service binaries next to this program without building them
    #[arg(long)]
    no_build: bool,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    // Load processes run this program, too.
    let arguments: Vec<String> = std::env::args().collect();
    match &arguments[1..] {
        [kind] if kind == load::STREAMS => return load::run_streams(),
        [kind, order] if kind == load::POSTS => return load::run_posts(order),
        [kind, order] if kind == load::HOSTS => return load::run_hosts(order),
        _ => {}
    }
    let cli = BenchCli::parse();
    if !cli.no_build {
        build()?;
    }
    let mut sizes = Sizes::new(cli.quick, cli.streams);
    if !cli.rates.is_empty() {
        sizes.ceiling_rates = cli.rates;
    }
    if !cli.gateways.is_empty() {
        sizes.gateways = cli.gateways;
    }
    if !cli.contenders.is_empty() {
        sizes.contenders = cli.contenders;
    }
    sizes.publishing.many = cli.events.unwrap_or(sizes.publishing.many);
    sizes.rounds = cli.rounds.unwrap_or(sizes.rounds);
    let scenarios = if cli.scenarios.is_empty() { Scenario::value_variants() } else { &cli.scenarios };
    benches::describe(cli.quick);
    // On this thread: children end with the thread that started them.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        for &scenario in scenarios {
            // Load processes are read without async: only a signal ends a scenario that hangs, and so its children.
            nix::unistd::alarm::set(scenario.longest().as_secs() as u32);
            tokio::select! {
                result = scenarios::run(scenario, &sizes) => result?,
                _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
            }
        }
        Ok(())
    })
}

/// Cargo puts the services beside this program.
fn build() -> anyhow::Result<()> {
    // The cargo that runs us.
    let Some(cargo) = testkit::programs::variable("CARGO") else { return Ok(()) };
    let mut command = Command::new(cargo);
    command.args(["build", "-p", "api", "-p", "stream-gateway"]);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    let status = command.status().context("cargo cannot be started")?;
    anyhow::ensure!(status.success(), "the services cannot be built");
    Ok(())
}
