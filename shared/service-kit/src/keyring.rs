//! Public keys that somebody else publishes: fetched at the start, renewed now and then, and asked for once more when a
//! token names a key that is not known here, or somebody says that there are newer ones.
//!
//! It promises that strangers' tokens are no load on the source, and that whoever needs newer keys learns whether these are
//! the newest there are.

use std::{fmt::Display, sync::Arc, time::Duration};

use tokio::{
    sync::{Mutex, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;

/// Where keys come from.
pub trait Source: Send + Sync {
    type Keys: Send + Sync;
    type Error: Display + Send;

    /// Whose keys, for the log.
    fn name(&self) -> &str;

    /// The newest keys; those that are in use, if they are. `kid`: the key that a token names and that is not known here.
    fn fetch(
        &self,
        kid: Option<&str>,
        in_use: Option<Arc<Self::Keys>>,
    ) -> impl Future<Output = Result<Arc<Self::Keys>, Self::Error>> + Send;
}

const RENEW_EVERY: Duration = Duration::from_secs(300);
/// After a failure, while there are keys to go on with.
const RENEW_AGAIN: Duration = Duration::from_secs(30);
/// After a failure, while there are none: the first delay and the longest.
const RETRY: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(2)];
/// Between two questions about unknown keys.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(5);

pub struct KeyRing<S: Source> {
    source: S,
    current: watch::Sender<Option<Arc<S::Keys>>>,
    /// When an unknown key was last asked about, and whether an answer came.
    last_asked: Mutex<Option<(Instant, bool)>>,
    /// One at a time: of two answers the later one must know the earlier.
    fetching: Mutex<()>,
}

impl<S: Source> KeyRing<S> {
    pub fn new(source: S) -> Self {
        Self {
            source,
            current: watch::Sender::default(),
            last_asked: Mutex::default(),
            fetching: Mutex::default(),
        }
    }

    pub fn source(&self) -> &S {
        &self.source
    }

    /// `None`: none were had yet.
    pub fn current(&self) -> Option<Arc<S::Keys>> {
        self.current.borrow().clone()
    }

    /// Notified when others take their place.
    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<S::Keys>>> {
        self.current.subscribe()
    }

    /// The present ones, and if there are none yet, waits for the first ones for this long.
    pub async fn first_within(&self, patience: Duration) -> Option<Arc<S::Keys>> {
        let mut changes = self.current.subscribe();
        let first = timeout(patience, changes.wait_for(Option::is_some)).await;
        first.ok()?.ok()?.clone()
    }

    /// Keeps the keys fresh until `stop`.
    pub async fn follow(&self, stop: CancellationToken) {
        let mut backoff = Backoff::new(RETRY[0], RETRY[1]);
        loop {
            let wait = match self.fetch(None).await {
                Ok(()) => RENEW_EVERY.mul_f64(jitter()),
                Err(error) => {
                    let have = self.current().is_some();
                    tracing::warn!(of = self.source.name(), %error, have, "cannot get public keys; trying again");
                    if have { RENEW_AGAIN.mul_f64(jitter()) } else { backoff.next_delay() }
                }
            };
            tokio::select! {
                () = sleep(wait) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Asks for newer keys than those that were `seen`; whether the present ones are now the newest there are. Whoever waits
    /// here while another asks gets that answer.
    pub async fn ask_once(&self, seen: Option<&Arc<S::Keys>>, kid: Option<&str>) -> bool {
        let mut last = self.last_asked.lock().await;
        let is_seen = |current: &Arc<S::Keys>| seen.is_some_and(|seen| Arc::ptr_eq(current, seen));
        if self.current().is_some_and(|current| !is_seen(&current)) {
            return true;
        }
        if let Some((at, answered)) = *last
            && at.elapsed() < ASK_AGAIN_AFTER
        {
            return answered;
        }
        let result = self.fetch(kid).await;
        if let Err(error) = &result {
            tracing::warn!(of = self.source.name(), %error, "cannot ask for a key that a token names");
        }
        *last = Some((Instant::now(), result.is_ok()));
        result.is_ok()
    }

    /// Fetches now.
    pub async fn renew(&self) {
        if let Err(error) = self.fetch(None).await {
            tracing::warn!(of = self.source.name(), %error, "cannot get newer public keys");
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

/// So that replicas do not march in step.
fn jitter() -> f64 {
    rand::random_range(0.8..1.2)
}
