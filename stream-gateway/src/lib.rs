//! The stream gateway: holds the live connections of browsers and keeps nothing that cannot be lost.
//!
//! It promises each connection of a user every event of that user's feed, once, in order, from its cursor on; whatever
//! fails in between costs time, never an event. `docs/architecture.md` walks one message through the modules.

pub mod app;
pub mod cli;
pub mod config;
pub mod descriptors;
pub mod metrics;

mod api_client;
mod backfill;
mod drain;
mod engine;
mod event;
mod explain;
mod frame;
mod http;
mod hub;
mod identities;
mod keys;
mod limits;
mod sequencer;
mod subscriber;
mod trace;
