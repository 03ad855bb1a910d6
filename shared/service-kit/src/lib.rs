//! The parts that both services share: configuration, telemetry, the accept loop, the operations listener, rate limits, the Redis topology,
//! cookies, origins and the process lifecycle. No endpoints and no SQL.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "tests notice the end of their tasks"))]

pub mod backoff;
pub mod client_address;
pub mod config;
pub mod cookies;
pub mod descriptors;
pub mod ended_sessions;
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
pub mod process_metrics;
pub mod quality_values;
pub mod redis_topology;
pub mod secrets;
pub mod server;
pub mod settings;
pub mod tasks;
pub mod telemetry;
pub mod traces;
pub mod verified_tokens;
