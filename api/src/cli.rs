//! Runs the commands of the binary.

use service_kit::{healthcheck, lifecycle, telemetry};

use crate::{
    app::{self, Listeners},
    config::{Cli, Command, Logging},
    maintenance,
};

pub async fn execute(Cli { command, settings }: Cli) -> anyhow::Result<()> {
    match command.unwrap_or(Command::Serve) {
        Command::Serve => {
            let (config, addresses, logging) = settings.for_serving()?;
            log(logging);
            app::run(config, Listeners::bind(addresses)?, lifecycle::stop_on_signal()?).await
        }
        Command::Migrate => {
            let (postgres, logging) = settings.for_database()?;
            log(logging);
            maintenance::migrate(postgres).await
        }
        Command::NewEpoch => {
            let (postgres, logging) = settings.for_database()?;
            log(logging);
            maintenance::new_epoch(postgres).await
        }
        Command::Prune => {
            let (postgres, keep, logging) = settings.for_pruning()?;
            log(logging);
            maintenance::prune(postgres, keep).await
        }
        Command::CheckConfig => {
            let (config, ..) = settings.for_serving()?;
            if !maintenance::check_database(&config.database).await? {
                eprintln!("api: Postgres is unreachable; the database was not checked");
            }
            eprintln!("api: the configuration is valid");
            Ok(())
        }
        Command::Healthcheck { probe } => {
            eprintln!("api: {}", healthcheck::ask(&settings.ops_listen, probe)?);
            Ok(())
        }
    }
}

fn log(Logging { filter, format }: Logging) {
    telemetry::start(filter, format);
}
