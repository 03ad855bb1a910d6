//! Runs the commands of the binary.

use anyhow::Context as _;
use service_kit::{descriptors, healthcheck, lifecycle, settings::Given, telemetry};

use crate::{
    app::{self, Listeners},
    config::{self, Cli, Command},
};

pub async fn execute(Cli { command }: Cli, given: Given) -> anyhow::Result<()> {
    match command.unwrap_or(Command::Serve) {
        Command::Serve => {
            let (config, logging) = config::for_serving(&given, descriptors::allowed())?;
            telemetry::start(logging);
            descriptors::raise().context("cannot raise the number of open files")?;
            let listeners = Listeners::bind(&config)?;
            app::run(config, listeners, lifecycle::stop_on_signal()?).await
        }
        Command::CheckConfig => {
            config::for_serving(&given, descriptors::allowed())?;
            eprintln!("stream-gateway: the configuration is valid");
            Ok(())
        }
        Command::Healthcheck { probe } => {
            eprintln!("stream-gateway: {}", healthcheck::ask(config::for_healthcheck(&given)?, probe).await?);
            Ok(())
        }
    }
}
