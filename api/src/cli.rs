//! Runs the commands of the binary.

use std::io::Write;

use anyhow::Context as _;
use service_kit::{descriptors, healthcheck, lifecycle, settings::Given, telemetry};

use crate::{
    app::{self, Listeners},
    config::{self, Cli, Command},
    maintenance,
};

pub async fn execute(Cli { command }: Cli, given: Given) -> anyhow::Result<()> {
    match command.unwrap_or(Command::Serve) {
        Command::Serve => {
            let (config, addresses, logging) = config::for_serving(&given)?;
            telemetry::start(logging);
            descriptors::raise().context("cannot raise the number of open files")?;
            app::run(config, Listeners::bind(addresses)?, lifecycle::stop_on_signal()?).await
        }
        Command::Migrate => {
            let (postgres, logging) = config::for_database(&given)?;
            telemetry::start(logging);
            maintenance::migrate(postgres).await
        }
        Command::NewEpoch => {
            let (postgres, logging) = config::for_database(&given)?;
            telemetry::start(logging);
            maintenance::new_epoch(postgres).await
        }
        Command::Prune => {
            let (postgres, keep, logging) = config::for_pruning(&given)?;
            telemetry::start(logging);
            maintenance::prune(postgres, keep).await
        }
        Command::CheckConfig => {
            let (config, ..) = config::for_serving(&given)?;
            if !maintenance::check_database(&config.database).await? {
                eprintln!("api: Postgres is unreachable; the database was not checked");
            }
            eprintln!("api: the configuration is valid");
            Ok(())
        }
        // Nothing is logged: what is printed is the answer alone.
        Command::ServiceToken(command) => {
            let (postgres, _) = config::for_database(&given)?;
            let answer = maintenance::service_tokens(postgres, command).await?;
            Ok(std::io::stdout().write_all(answer.as_bytes())?)
        }
        Command::Healthcheck { probe } => {
            eprintln!("api: {}", healthcheck::ask(config::for_healthcheck(&given)?, probe).await?);
            Ok(())
        }
    }
}
