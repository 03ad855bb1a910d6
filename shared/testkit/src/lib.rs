//! What tests of several crates share: a browser's view of the stream, a plain HTTP client, a faulty network, servers
//! that may be killed, and TLS in front of them. Everything here fails by a panic with a sentence, because only tests use it.

#![allow(clippy::disallowed_methods, reason = "tests notice the end of what they start")]

pub mod cluster;
pub mod documented;
pub mod http;
pub mod issuer;
pub mod node;
pub mod panics;
pub mod process;
pub mod proxy;
pub mod servers;
pub mod sse;
#[cfg(test)]
mod tests;
pub mod tls;

use std::{future::Future, time::Duration};

/// How long a test waits for what must come. Generous: it only tells "late" from "never".
pub const PATIENCE: Duration = Duration::from_mins(1);

/// Awaits what must happen; a panic says what did not.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited {PATIENCE:?} in vain: {what}"),
    }
}

/// Asks again and again until the answer is yes.
pub async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    soon(what, async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}
