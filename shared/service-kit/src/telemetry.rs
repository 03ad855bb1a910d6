//! Logs on standard output, one line per event, human-readable or as JSON. The filter can be changed while the process runs.

use std::{str::FromStr, sync::OnceLock};

use thiserror::Error;
use tracing_subscriber::{EnvFilter, Registry, layer::SubscriberExt, reload, util::SubscriberInitExt};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Human,
    Json,
}

#[derive(Debug, Error)]
#[error("it must be human or json")]
pub struct UnknownLogFormat;

impl FromStr for LogFormat {
    type Err = UnknownLogFormat;

    fn from_str(text: &str) -> Result<Self, UnknownLogFormat> {
        match text {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            _ => Err(UnknownLogFormat),
        }
    }
}

/// One per process, as there is one log.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

#[derive(Debug)]
pub struct Logging {
    pub filter: EnvFilter,
    pub format: LogFormat,
}

pub fn start(Logging { filter, format }: Logging) {
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

/// The current directives. `None`: logging was not started.
pub fn filter() -> Option<String> {
    FILTER.get()?.with_current(ToString::to_string).ok()
}

#[derive(Debug, Error)]
pub enum FilterUnchanged {
    #[error("logging was not started")]
    NoLog,
    #[error("invalid directives, expected for example `info` or `info,api=debug`: {0}")]
    Unreadable(String),
}

pub fn change_filter(directives: &str) -> Result<(), FilterUnchanged> {
    let filter: EnvFilter =
        directives.parse().map_err(|error| FilterUnchanged::Unreadable(format!("{error}")))?;
    let handle = FILTER.get().ok_or(FilterUnchanged::NoLog)?;
    handle.reload(filter).map_err(|_| FilterUnchanged::NoLog)
}
