//! The REST API of the messenger, the only writer of Postgres. Each answered change is committed together with its events, which
//! are numbered without gaps in the feed of every user concerned. Events are then published to Redis, best effort: gateways get
//! the ones that they miss from the internal listener.

pub mod app;
pub mod cli;
pub mod commands;
pub mod config;
pub mod domain;
pub mod erasing;
pub mod explain;
pub mod external;
pub mod http;
pub mod last_used;
pub mod maintenance;
pub mod metrics;
pub mod oauth;
pub mod presence;
pub mod pruner;
pub mod publisher;
pub mod readiness;
pub mod relay;
pub mod request_context;
pub mod store;
