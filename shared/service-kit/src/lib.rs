//! What both services run on: settings, logs, traces, the accept loop, the operators' listener, rate limits, Redis, cookies and
//! origins, and the life of a process. No product rules.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "tests notice the end of what they start"))]

pub mod backoff;
pub mod client_address;
pub mod config;
pub mod cookies;
pub mod ended;
pub mod explain;
pub mod healthcheck;
pub mod http;
pub mod keyring;
pub mod lifecycle;
pub mod limiter;
pub mod metrics;
pub mod ops;
pub mod origins;
pub mod outbound;
pub mod preference;
pub mod process_metrics;
pub mod redis_topology;
pub mod secrets;
pub mod server;
pub mod tasks;
pub mod telemetry;
pub mod traces;
