//! The gateway alone: real sockets, a real Redis (`REDIS_URL`, a channel prefix per test) behind a fault proxy, and a fake `api`.
//! These tests show states that the whole product cannot be steered into.

#![allow(clippy::disallowed_methods, reason = "a test fails if a task of its own does")]
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod api;
mod backfill_requests;
mod drain;
mod ephemeral;
mod events;
mod explain;
mod external;
mod joining;
mod keys;
mod lifetimes;
mod limits;
mod origins;
mod process;
mod sessions;
mod slow_consumers;
mod support;
mod tls;
mod wire;
