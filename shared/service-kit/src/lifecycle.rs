//! A service's process from its command line to its exit: SIGTERM or Ctrl-C begins an orderly stop, a second one ends the
//! process immediately.

use std::{fmt::Display, process::ExitCode};

use clap::{CommandFactory, FromArgMatches};
use tokio::{
    runtime::Builder,
    signal::unix::{Signal, SignalKind, signal},
};
use tokio_util::sync::CancellationToken;

use crate::settings::{Given, Setting};

/// The whole `main` of a service: parses the command line, runs it, and reports its failure on standard error, because
/// logging may not have started yet.
pub fn run_service<C: CommandFactory + FromArgMatches, E: Display>(
    name: &str,
    settings: &[Setting],
    execute: impl AsyncFnOnce(C, Given) -> Result<(), E>,
) -> ExitCode {
    let (command_line, given) =
        Given::parse(settings, std::env::args_os()).unwrap_or_else(|error| error.exit());
    let failure = match Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => match runtime.block_on(execute(command_line, given)) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => format!("{error:#}"),
        },
        Err(error) => format!("cannot start the runtime: {error}"),
    };
    eprintln!("{name}: {failure}");
    ExitCode::FAILURE
}

/// A token that is cancelled by the first SIGTERM or SIGINT. The second ends the process with status 130.
#[expect(clippy::disallowed_methods, reason = "its end stops the process")]
pub fn stop_on_signal() -> std::io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = CancellationToken::new();
    // Cancels also if this task dies: without it no signal would be noticed.
    let begin = stop.clone().drop_guard();
    tokio::spawn(async move {
        let name = next(&mut terminate, &mut interrupt).await;
        tracing::info!(signal = name, "process stopping");
        drop(begin);
        let name = next(&mut terminate, &mut interrupt).await;
        tracing::warn!(signal = name, "second signal; process exits immediately");
        std::process::exit(130);
    });
    Ok(stop)
}

async fn next(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}
