//! The stream gateway: holds the live connections of browsers; all of its state may be lost.
//!
//! Each connection receives every event of its user's feed, once and in order, from its cursor on; a failure may delay events
//! but loses none. `docs/architecture.md` follows one message through the modules.

pub mod app;
pub mod cli;
pub mod config;
pub mod descriptors;
pub mod metrics;

mod api_client;
mod backfill;
mod core;
mod engine;
mod event;
mod explain;
mod frame;
mod http;
mod identities;
mod keys;
mod limits;
mod memory;
mod presence;
mod signatures;
mod subscriber;
mod trace;
