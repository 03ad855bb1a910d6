//! Starts the process; the library does the rest.

use std::process::ExitCode;

use service_kit::lifecycle::run_service;

fn main() -> ExitCode {
    run_service("stream-gateway", &stream_gateway::config::rows(), stream_gateway::cli::execute)
}
