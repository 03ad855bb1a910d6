//! Logs: one line an event on standard output, for people or as JSON. Never a token, never the text of a message. What is
//! logged can be changed while the process runs.

use std::{str::FromStr, sync::OnceLock};

use thiserror::Error;
use tracing_subscriber::{EnvFilter, Registry, layer::SubscriberExt, reload, util::SubscriberInitExt};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Human,
    Json,
}

#[derive(Debug, Error)]
#[error("the log format is `human` or `json`")]
pub struct NotALogFormat;

impl FromStr for LogFormat {
    type Err = NotALogFormat;

    fn from_str(text: &str) -> Result<Self, NotALogFormat> {
        match text {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            _ => Err(NotALogFormat),
        }
    }
}

/// The filter in use: there is one for the process, as there is one log.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Starts logging for the process. `filter` has the form of `tracing`'s directives: `info`, `info,api=debug`.
pub fn start(filter: EnvFilter, format: LogFormat) {
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stdout);
    let registry = tracing_subscriber::registry().with(filter);
    match format {
        LogFormat::Human => registry.with(lines).init(),
        LogFormat::Json => {
            let lines = lines.json().flatten_event(true).with_current_span(true).with_span_list(false);
            registry.with(lines).init();
        }
    }
    let _ = FILTER.set(handle);
}

/// What is logged now, in the form of `start`. `None`: this process has no log.
pub fn filter() -> Option<String> {
    FILTER.get()?.with_current(ToString::to_string).ok()
}

/// Why the filter was left as it is.
#[derive(Debug, Error)]
pub enum FilterUnchanged {
    #[error("this process has no log")]
    NoLog,
    #[error("these are no directives like `info` or `info,api=debug`: {0}")]
    Unreadable(String),
}

/// Logs by these directives from now on.
pub fn change_filter(directives: &str) -> Result<(), FilterUnchanged> {
    let filter: EnvFilter =
        directives.parse().map_err(|error| FilterUnchanged::Unreadable(format!("{error}")))?;
    let handle = FILTER.get().ok_or(FilterUnchanged::NoLog)?;
    handle.reload(filter).map_err(|_| FilterUnchanged::NoLog)
}
