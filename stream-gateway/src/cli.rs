//! Runs the commands of the binary.

use anyhow::Context as _;
use service_kit::{healthcheck, lifecycle, telemetry};

use crate::{
    app::{self, Listeners},
    config::{Cli, Command},
    descriptors,
};

pub async fn execute(Cli { command, settings }: Cli) -> anyhow::Result<()> {
    match command.unwrap_or(Command::Serve) {
        Command::Serve => {
            let config = settings.check(descriptors::allowed())?;
            telemetry::start(config.log.parse().context("LOG was checked")?, config.log_format);
            descriptors::raise().context("cannot raise the number of open files")?;
            let listeners = Listeners::bind(&config)?;
            app::run(config, listeners, lifecycle::stop_on_signal()?).await
        }
        Command::CheckConfig => {
            settings.check(descriptors::allowed())?;
            eprintln!("stream-gateway: the configuration is valid");
            Ok(())
        }
        Command::Healthcheck { probe } => {
            eprintln!("stream-gateway: {}", healthcheck::ask(&settings.ops_listen, probe)?);
            Ok(())
        }
    }
}
