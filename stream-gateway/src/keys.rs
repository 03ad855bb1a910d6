//! The public keys that tokens are checked with, as `api` publishes them: fetched at the start, renewed now and then, and
//! asked for once more when a token names a key that is not known here.
//!
//! It promises that a lack of keys is never mistaken for a bad token.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use jsonwebtoken::jwk::JwkSet;
use rand::RngExt;
use shared::{
    claims::{Audience, Claims, KeySet, TokenError},
    feed,
};
use tokio::{
    sync::Mutex,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{backfill::Api, metrics::Metrics};

const RENEW_EVERY: Duration = Duration::from_secs(300);
/// A stranger's tokens must not become a load on `api`.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(5);
const RETRY: std::ops::RangeInclusive<u64> = 200..=2_000;

#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// The token is not good.
    Token(TokenError),
    /// It cannot be told yet: there are no keys.
    NoKeys,
}

pub struct Keys {
    issuer: String,
    api: Api,
    metrics: Arc<Metrics>,
    current: RwLock<Option<Arc<KeySet>>>,
    /// When a token's unknown key was last asked about, and whether an answer came.
    last_asked: Mutex<Option<(Instant, bool)>>,
}

impl Keys {
    pub fn new(issuer: &str, api: Api, metrics: Arc<Metrics>) -> Self {
        Self { issuer: issuer.into(), api, metrics, current: RwLock::new(None), last_asked: Mutex::new(None) }
    }

    pub fn known(&self) -> bool {
        self.current().is_some()
    }

    /// Checks a token for the stream.
    pub async fn verify(&self, token: &str) -> Result<Claims, Refused> {
        const ACCEPTED: &[Audience] = &[Audience::Api, Audience::Stream];
        let keys = self.current().ok_or(Refused::NoKeys)?;
        match keys.verify(token, ACCEPTED) {
            Err(TokenError::UnknownKey) => {
                let newest = self.ask_once(&keys).await;
                let keys = self.current().ok_or(Refused::NoKeys)?;
                keys.verify(token, ACCEPTED).map_err(|error| match error {
                    TokenError::UnknownKey if !newest => Refused::NoKeys,
                    error => Refused::Token(error),
                })
            }
            result => result.map_err(Refused::Token),
        }
    }

    /// Keeps the keys fresh until `stop`.
    pub async fn follow(&self, stop: CancellationToken) {
        loop {
            let wait = match self.fetch().await {
                Ok(()) => RENEW_EVERY.mul_f64(rand::rng().random_range(0.8..1.2)),
                Err(error) => {
                    let have = self.known();
                    tracing::warn!(%error, have, "cannot get the public keys from api; trying again");
                    if have {
                        RENEW_EVERY / 10
                    } else {
                        Duration::from_millis(rand::rng().random_range(RETRY))
                    }
                }
            };
            tokio::select! {
                () = sleep(wait) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Whether the keys are now the newest there are. Whoever waits here while another asks gets that answer.
    async fn ask_once(&self, seen: &Arc<KeySet>) -> bool {
        let mut last = self.last_asked.lock().await;
        if self.current().is_some_and(|current| !Arc::ptr_eq(&current, seen)) {
            return true;
        }
        if let Some((at, answered)) = *last
            && at.elapsed() < ASK_AGAIN_AFTER
        {
            return answered;
        }
        let result = self.fetch().await;
        if let Err(error) = &result {
            tracing::warn!(%error, "cannot ask api for a key that a token names");
        }
        *last = Some((Instant::now(), result.is_ok()));
        result.is_ok()
    }

    async fn fetch(&self) -> anyhow::Result<()> {
        let jwks: JwkSet = self.api.get(feed::JWKS_PATH).await?;
        let keys = KeySet::from_jwks(&self.issuer, &jwks);
        anyhow::ensure!(!keys.is_empty(), "api publishes no usable key");
        self.metrics.keys.set(i64::try_from(jwks.keys.len()).unwrap_or(i64::MAX));
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(keys));
        Ok(())
    }

    fn current(&self) -> Option<Arc<KeySet>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
