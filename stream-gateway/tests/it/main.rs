//! The gateway alone: real sockets, a real Redis (`REDIS_URL`, a channel prefix per test) behind a network that fails when a
//! test wants it, and an `api` that answers what a test says. What the whole product cannot be steered into is shown here.
//! Names say what is promised.

#![allow(clippy::disallowed_methods, reason = "tests notice the end of what they start")]
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod api;
mod drain;
mod events;
mod explain;
mod external;
mod joining;
mod keys;
mod lifetimes;
mod limits;
mod origins;
mod process;
mod questions;
mod readers;
mod sessions;
mod support;
mod tls;
mod wire;
