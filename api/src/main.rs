//! Settings, logs, run: nothing to test.

use std::process::ExitCode;

use api::{
    app::{self, Listeners},
    config::{Cli, Command},
};
use clap::Parser;
use service_kit::{
    healthcheck::{self, Probe},
    lifecycle, telemetry,
};
use sqlx::postgres::PgConnectOptions;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command.unwrap_or(Command::Serve) {
        Command::Serve => serve(&cli).await,
        Command::Migrate => with_database(&cli, app::migrate).await,
        Command::NewEpoch => with_database(&cli, app::new_epoch).await,
        Command::Prune => prune(&cli).await,
        Command::CheckConfig => check_config(&cli).await,
        Command::Healthcheck { probe } => check_health(&cli, probe),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Logging may not have started yet, and whoever starts a service looks here first.
            eprintln!("api: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(cli: &Cli) -> anyhow::Result<()> {
    let (config, addresses, logging) = cli.settings.for_serving()?;
    telemetry::start(logging.filter, logging.format);
    let stop = lifecycle::stop_on_signal()?;
    app::run(config, Listeners::bind(addresses)?, stop).await
}

async fn with_database(
    cli: &Cli,
    work: impl AsyncFnOnce(PgConnectOptions) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (postgres, logging) = cli.settings.for_database()?;
    telemetry::start(logging.filter, logging.format);
    work(postgres).await
}

async fn prune(cli: &Cli) -> anyhow::Result<()> {
    let (postgres, keep, logging) = cli.settings.for_pruning()?;
    telemetry::start(logging.filter, logging.format);
    app::prune(postgres, keep).await
}

async fn check_config(cli: &Cli) -> anyhow::Result<()> {
    let (config, ..) = cli.settings.for_serving()?;
    if !app::check_database(&config.database).await? {
        eprintln!("api: Postgres cannot be reached from here, so the database was not checked");
    }
    eprintln!("api: the settings are good");
    Ok(())
}

fn check_health(cli: &Cli, probe: Probe) -> anyhow::Result<()> {
    let note = healthcheck::ask(&cli.settings.ops_listen, probe)?;
    eprintln!("api: {note}");
    Ok(())
}
