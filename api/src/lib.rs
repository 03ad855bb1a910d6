//! The API of the messenger: the only writer of Postgres. What it answers is committed; what is committed is in the feed of
//! everybody it concerns, numbered without holes; and it is announced in Redis, at best at once and otherwise never: gateways
//! ask the internal listener for what they have not heard.

pub mod app;
pub mod cli;
pub mod commands;
pub mod config;
pub mod domain;
pub mod explain;
pub mod external;
pub mod http;
pub mod last_used;
pub mod maintenance;
pub mod metrics;
pub mod oauth;
pub mod pruner;
pub mod publisher;
pub mod readiness;
pub mod request_context;
pub mod store;
