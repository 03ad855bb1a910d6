//! The end of a process: SIGTERM or Ctrl-C begins an orderly stop, a second one ends it at once.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A token that is cancelled by the first SIGTERM or SIGINT. The second ends the process with status 130.
#[expect(clippy::disallowed_methods, reason = "its end stops the process")]
pub fn stop_on_signal() -> std::io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = CancellationToken::new();
    // Also when this task should die, after which no signal would be heeded.
    let begin = stop.clone().drop_guard();
    tokio::spawn(async move {
        let name = next(&mut terminate, &mut interrupt).await;
        tracing::info!(signal = name, "stopping");
        drop(begin);
        let name = next(&mut terminate, &mut interrupt).await;
        tracing::warn!(signal = name, "asked again: ending at once");
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
