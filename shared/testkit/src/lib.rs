//! Shared by tests, benches and `cargo dev`. `cargo dev` uses the first group of modules only, because it is compiled before
//! anything else can run; the feature `full` adds the rest. Helpers of tests panic with a sentence.

#![allow(clippy::disallowed_methods, reason = "a test fails if a task of its own does")]

pub mod ports;
pub mod postmaster;
pub mod process;
pub mod programs;
pub mod secrets;

#[cfg(feature = "full")]
pub mod cluster;
#[cfg(feature = "full")]
pub mod documented;
#[cfg(feature = "full")]
pub mod http;
#[cfg(feature = "full")]
pub mod issuer;
#[cfg(feature = "full")]
pub mod ledger;
#[cfg(feature = "full")]
pub mod nginx;
#[cfg(feature = "full")]
pub mod node;
#[cfg(feature = "full")]
pub mod panics;
#[cfg(feature = "full")]
pub mod proxy;
#[cfg(feature = "full")]
pub mod raw;
#[cfg(feature = "full")]
pub mod servers;
#[cfg(feature = "full")]
pub mod service;
#[cfg(feature = "full")]
pub mod sse;
#[cfg(test)]
#[cfg(feature = "full")]
mod tests;
#[cfg(feature = "full")]
pub mod tls;
#[cfg(feature = "full")]
pub mod usage;
#[cfg(feature = "full")]
pub mod user;
#[cfg(feature = "full")]
pub mod world;

use std::{future::Future, time::Duration};

/// How long a test waits. Generous: it only separates "late" from "never".
pub const PATIENCE: Duration = Duration::from_mins(1);

/// Awaits what must happen, or panics with `what`.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(PATIENCE, future).await;
    done.unwrap_or_else(|_| panic!("waited {PATIENCE:?} in vain: {what}"))
}

/// Polls until the condition holds.
pub async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    soon(what, async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}
