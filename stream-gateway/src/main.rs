//! The gateway's process: settings, logs, listeners, until a signal.

use anyhow::Context as _;
use clap::Parser as _;
use service_kit::{healthcheck, lifecycle, telemetry};
use stream_gateway::{
    app::{self, Listeners},
    config::{Cli, Command},
    descriptors,
};

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    if let Some(Command::Healthcheck { probe }) = cli.command {
        let note = healthcheck::ask(&cli.settings.ops_listen, probe)?;
        eprintln!("stream-gateway: {note}");
        return Ok(());
    }
    let config = cli.settings.check(descriptors::allowed())?;
    if let Some(Command::CheckConfig) = cli.command {
        eprintln!("stream-gateway: the settings are good");
        return Ok(());
    }
    telemetry::start(config.log.parse().context("LOG was checked")?, config.log_format);
    descriptors::raise().context("cannot raise the number of open files")?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let stop = lifecycle::stop_on_signal()?;
        let listeners = Listeners::bind(&config)?;
        app::run(config, listeners, stop).await
    })
}
