//! The gateway's process: settings, logs, listeners, until a signal.

use anyhow::Context as _;
use clap::Parser as _;
use shared::{lifecycle, telemetry};
use stream_gateway::{
    app::{self, Listeners},
    config::Settings,
    descriptors,
};

fn main() -> anyhow::Result<()> {
    let config = Settings::parse().check()?;
    telemetry::start(config.log.parse().context("LOG was checked")?, config.log_format);
    descriptors::raise(config.admission.streams)?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let stop = lifecycle::stop_on_signal()?;
        let listeners = Listeners::bind(&config)?;
        app::run(config, listeners, stop).await
    })
}
