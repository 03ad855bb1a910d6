//! What `api` and `stream-gateway` must agree on, and no product rules: typed ids, the feed's cursor and envelope, the
//! internal protocol, tokens, cookies, Redis names, whose pages may ask; and the plumbing both run on: settings, logs, the accept loop, the operators'
//! listener, the end of a process.

pub mod bus;
pub mod channels;
pub mod claims;
pub mod client_address;
pub mod config;
pub mod cookies;
pub mod cursor;
pub mod ended;
pub mod event;
pub mod explain;
pub mod feed;
pub mod foreign;
pub mod healthcheck;
pub mod ids;
pub mod jose;
pub mod keyring;
pub mod keys_version;
pub mod lifecycle;
pub mod limiter;
pub mod ops;
pub mod origins;
pub mod outbound;
pub mod preference;
pub mod problem;
pub mod process_metrics;
pub mod secrets;
pub mod server;
pub mod tasks;
pub mod telemetry;
#[cfg(feature = "test-support")]
pub mod test_support;
pub mod traces;
