//! Public keys of a token issuer: fetched at start-up, refreshed regularly, and once more when a token names an unknown key.
//!
//! Refreshes for unknown keys are rate limited, so invalid tokens do not load the issuer. The caller learns whether the current
//! keys are the newest.

use std::{fmt::Display, sync::Arc, time::Duration};

use tokio::{
    sync::{Mutex, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;

pub trait Source: Send + Sync {
    type Keys: Send + Sync;
    type Error: Display + Send;

    /// For the log.
    fn name(&self) -> &str;

    /// The newest keys, or `in_use` if those are the newest. `kid`: the unknown key that a token names.
    fn fetch(
        &self,
        kid: Option<&str>,
        in_use: Option<Arc<Self::Keys>>,
    ) -> impl Future<Output = Result<Arc<Self::Keys>, Self::Error>> + Send;
}

const REFRESH_EVERY: Duration = Duration::from_secs(300);
const REFRESH_RETRY: Duration = Duration::from_secs(30);
/// After a failure, while there are no keys: the first delay and the longest.
const FIRST_FETCH_RETRY: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(2)];
const UNKNOWN_KEY_INTERVAL: Duration = Duration::from_secs(5);

pub struct KeyRing<S: Source> {
    source: S,
    current: watch::Sender<Option<Arc<S::Keys>>>,
    last_refresh: Mutex<Option<(Instant, bool)>>,
    /// One fetch at a time, so that an older answer cannot replace a newer one.
    fetching: Mutex<()>,
}

impl<S: Source> KeyRing<S> {
    pub fn new(source: S) -> Self {
        Self {
            source,
            current: watch::Sender::default(),
            last_refresh: Mutex::default(),
            fetching: Mutex::default(),
        }
    }

    pub fn source(&self) -> &S {
        &self.source
    }

    pub fn current(&self) -> Option<Arc<S::Keys>> {
        self.current.borrow().clone()
    }

    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<S::Keys>>> {
        self.current.subscribe()
    }

    /// The current keys. Waits for the first ones if there are none yet.
    pub async fn wait_for_first(&self, limit: Duration) -> Option<Arc<S::Keys>> {
        let mut changes = self.current.subscribe();
        let first = timeout(limit, changes.wait_for(Option::is_some)).await;
        first.ok()?.ok()?.clone()
    }

    pub async fn follow(&self, stop: CancellationToken) {
        let mut backoff = Backoff::new(FIRST_FETCH_RETRY[0], FIRST_FETCH_RETRY[1]);
        loop {
            let wait = match self.fetch(None).await {
                Ok(()) => REFRESH_EVERY.mul_f64(jitter()),
                Err(error) => {
                    let has_keys = self.current().is_some();
                    tracing::warn!(issuer = self.source.name(), %error, has_keys, "public key fetch failed; retrying");
                    if has_keys { REFRESH_RETRY.mul_f64(jitter()) } else { backoff.next_delay() }
                }
            };
            tokio::select! {
                () = sleep(wait) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Refreshes the keys if they are still the ones in `seen`. Returns whether the current keys are the newest. Concurrent
    /// callers share one refresh.
    pub async fn refresh_once(&self, seen: Option<&Arc<S::Keys>>, kid: Option<&str>) -> bool {
        let mut last = self.last_refresh.lock().await;
        let is_seen = |current: &Arc<S::Keys>| seen.is_some_and(|seen| Arc::ptr_eq(current, seen));
        if self.current().is_some_and(|current| !is_seen(&current)) {
            return true;
        }
        if let Some((at, succeeded)) = *last
            && at.elapsed() < UNKNOWN_KEY_INTERVAL
        {
            return succeeded;
        }
        let result = self.fetch(kid).await;
        if let Err(error) = &result {
            tracing::warn!(issuer = self.source.name(), %error, "public key refresh for an unknown key failed");
        }
        *last = Some((Instant::now(), result.is_ok()));
        result.is_ok()
    }

    pub async fn renew(&self) {
        if let Err(error) = self.fetch(None).await {
            tracing::warn!(issuer = self.source.name(), %error, "public key refresh failed");
        }
    }

    async fn fetch(&self, kid: Option<&str>) -> Result<(), S::Error> {
        let _one = self.fetching.lock().await;
        let keys = self.source.fetch(kid, self.current()).await?;
        self.current.send_if_modified(|current| {
            let changes = current.as_ref().is_none_or(|current| !Arc::ptr_eq(current, &keys));
            *current = Some(keys);
            changes
        });
        Ok(())
    }
}

/// So that replicas do not refresh in step.
fn jitter() -> f64 {
    rand::random_range(0.8..1.2)
}
