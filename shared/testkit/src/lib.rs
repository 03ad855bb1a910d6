//! Shared by tests, benches and `cargo dev`. `cargo dev` uses the first group of modules only, because it is compiled before
//! anything else can run; the feature `full` adds the rest. Helpers of tests panic with a sentence.

#![allow(clippy::disallowed_methods, reason = "a test fails if a task of its own does")]

pub mod ports;
pub mod postmaster;
pub mod process;
pub mod programs;
pub mod secrets;

#[cfg(feature = "full")]
#[path = "."]
mod full {
    pub mod cluster;
    pub mod documented;
    pub mod http;
    pub mod issuer;
    pub mod ledger;
    pub mod nginx;
    pub mod node;
    pub mod panics;
    pub mod proxy;
    pub mod raw;
    pub mod servers;
    pub mod service;
    pub mod sse;
    #[cfg(test)]
    mod tests;
    pub mod tls;
    pub mod usage;
    pub mod user;
    pub mod world;
}
#[cfg(feature = "full")]
pub use full::*;

use std::{future::Future, time::Duration};

/// Limit of every wait in tests. Generous: it only separates "late" from "never".
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
