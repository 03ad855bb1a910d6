//! The public keys that verify tokens: `api`'s own and those of the external issuer, if there is one. `api` provides both.
//!
//! Missing keys are never mistaken for an invalid token or a removed key, and keys are up to date within seconds after a new
//! version is announced.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use form_urlencoded::byte_serialize;
use protocol::{
    claims::{Audience, Claims, KeyName, KeySet, TokenError},
    external::{self, ExternalClaims, ExternalIssuer, ExternalKeys},
    feed::{ExternalKeysAnswer, KEYS_PATH, KeysAnswer},
    keys_version::KeysVersion,
};
use service_kit::keyring::{KeyRing, Source};
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;
use url::form_urlencoded;

use crate::{
    api_client::ApiClient,
    metrics::Metrics,
    signatures::{NotVerified, Signatures},
};

#[derive(Debug, PartialEq, Eq)]
pub enum VerifyError {
    Token(TokenError),
    /// The token cannot be verified yet: there are no keys.
    NoKeys,
}

/// The claims of a token with valid signature, issuer, audience and times, and the key that signed it.
#[derive(Debug)]
pub struct VerifiedToken {
    pub claims: VerifiedClaims,
    pub key: KeyName,
}

#[derive(Debug)]
pub enum VerifiedClaims {
    Own(Claims),
    /// The user is looked up next.
    External(ExternalClaims),
}

/// During start-up, requests wait for the first keys instead of being rejected. Later, missing keys are an outage, and requests
/// do not wait.
const START_UP: Duration = Duration::from_secs(10);
const FIRST_KEYS_TIMEOUT: Duration = Duration::from_secs(2);

/// The configuration that was started last counts. If no replica has confirmed the one in use for this long, it was rolled back,
/// and any answer of `api` counts.
const STALE_AFTER: Duration = Duration::from_secs(30);
/// Between two attempts to fetch announced keys: each reaches a random replica, perhaps one with the earlier configuration.
const FETCH_RETRY_WAIT: Duration = Duration::from_millis(500);
/// After these, the replica that announced the keys has probably stopped. If not, it announces them again.
const FETCH_ATTEMPTS: usize = 20;

pub struct Keys {
    ring: KeyRing<FromApi>,
    /// An announced version that must be fetched.
    announced: watch::Sender<Option<KeysVersion>>,
    signatures: Signatures,
    started_at: Instant,
}

pub struct TrustedKeys {
    own: KeySet,
    external: Option<External>,
    version: KeysVersion,
}

struct External {
    issuer: ExternalIssuer,
    /// None: `api` has none yet.
    keys: Option<Arc<ExternalKeys>>,
}

struct FromApi {
    issuer: String,
    api: ApiClient,
    /// When a replica last confirmed the version in use.
    confirmed_at: Mutex<Instant>,
    metrics: Arc<Metrics>,
}

impl Source for FromApi {
    type Keys = TrustedKeys;
    type Error = anyhow::Error;

    fn name(&self) -> &'static str {
        "api"
    }

    async fn fetch(
        &self,
        kid: Option<&str>,
        in_use: Option<Arc<TrustedKeys>>,
    ) -> anyhow::Result<Arc<TrustedKeys>> {
        let query = kid.map_or_else(String::new, |kid| {
            format!("?kid={}", byte_serialize(kid.as_bytes()).collect::<String>())
        });
        let answer: KeysAnswer = self.api.get(&format!("{KEYS_PATH}{query}")).await?;
        let own = KeySet::from_jwks(&self.issuer, &answer.own);
        anyhow::ensure!(!own.is_empty(), "api publishes no usable key");
        if let Some(in_use) = &in_use {
            let agrees = answer.version.agrees_with(&in_use.version);
            if agrees {
                self.confirm_version();
            }
            if !answer.version.replaces(&in_use.version) && (agrees || !self.version_is_stale()) {
                return Ok(in_use.clone());
            }
        }
        self.confirm_version();
        self.metrics.public_keys.set(i64::try_from(answer.own.keys.len()).unwrap_or(i64::MAX));
        let trusted = Arc::new(TrustedKeys::new(own, answer.external, answer.version, in_use.as_deref()));
        if let Some(in_use) = in_use {
            let removed = in_use.names().filter(|name| !trusted.accepts(*name)).count();
            if removed > 0 {
                tracing::warn!(removed, "public keys removed; tokens that they signed are rejected");
            }
        }
        Ok(trusted)
    }
}

impl FromApi {
    fn confirm_version(&self) {
        *self.confirmed_at.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn version_is_stale(&self) -> bool {
        self.confirmed_at.lock().unwrap_or_else(PoisonError::into_inner).elapsed() > STALE_AFTER
    }
}

impl Keys {
    pub fn new(issuer: &str, api: ApiClient, metrics: Arc<Metrics>) -> Self {
        let started_at = Instant::now();
        let source = FromApi { issuer: issuer.into(), api, confirmed_at: Mutex::new(started_at), metrics };
        Self {
            ring: KeyRing::new(source),
            announced: watch::Sender::default(),
            signatures: Signatures::default(),
            started_at,
        }
    }

    pub fn known(&self) -> bool {
        self.ring.current().is_some()
    }

    /// Notified when the keys are replaced.
    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<TrustedKeys>>> {
        self.ring.subscribe()
    }

    pub fn accepts(&self, key: KeyName) -> bool {
        self.ring.current().is_some_and(|trusted| trusted.accepts(key))
    }

    /// Keeps the keys fresh until `stop`, which no fetch in progress delays.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let fetching = async { tokio::join!(self.ring.follow(stop.clone()), self.fetch_announced()) };
        stop.run_until_cancelled(fetching).await;
    }

    /// A replica of `api` has announced its version. Returns immediately.
    pub fn notice_version(&self, version: &KeysVersion) {
        let Some(in_use) = self.ring.current() else { return };
        let source = self.ring.source();
        if version.agrees_with(&in_use.version) {
            source.confirm_version();
        } else if version.replaces(&in_use.version) || source.version_is_stale() {
            self.announced.send_replace(Some(version.clone()));
        }
    }

    async fn fetch_announced(&self) {
        let mut announced = self.announced.subscribe();
        while announced.changed().await.is_ok() {
            for _ in 0..FETCH_ATTEMPTS {
                self.ring.renew().await;
                let version = announced.borrow_and_update().clone();
                let current = self.ring.current();
                let in_use = current.as_ref().map(|current| &current.version);
                let fetched = |version: &KeysVersion| {
                    in_use.is_none_or(|in_use| version.agrees_with(in_use) || in_use.replaces(version))
                };
                if version.as_ref().is_none_or(fetched) {
                    break;
                }
                sleep(FETCH_RETRY_WAIT.mul_f64(rand::random_range(0.8..1.2))).await;
            }
        }
    }

    /// Returns the tokens that are valid for the stream, at least one. Fetches newer keys only if none is.
    pub async fn verify(&self, tokens: &[String]) -> Result<Vec<VerifiedToken>, VerifyError> {
        let trusted = match self.ring.current() {
            None if self.started_at.elapsed() < START_UP => {
                self.ring.wait_for_first(FIRST_KEYS_TIMEOUT).await
            }
            current => current,
        };
        let trusted = trusted.ok_or(VerifyError::NoKeys)?;
        let (error, unknown) = match trusted.verify_each(tokens, &self.signatures).await {
            Err((error @ (VerifyError::Token(TokenError::UnknownKey) | VerifyError::NoKeys), token)) => {
                (error, token)
            }
            outcome => return outcome.map_err(|(error, _)| error),
        };
        tracing::debug!(?error, "token key unknown; fetching newer keys from api");
        // A token without a key id needs newer keys too.
        let kid = external::kid_of(unknown).unwrap_or_default();
        let newest = self.ring.refresh_once(Some(&trusted), Some(&kid)).await;
        let trusted = self.ring.current().ok_or(VerifyError::NoKeys)?;
        trusted.verify_each(tokens, &self.signatures).await.map_err(|(error, _)| match error {
            VerifyError::Token(TokenError::UnknownKey) if !newest => VerifyError::NoKeys,
            error => error,
        })
    }
}

impl TrustedKeys {
    /// The error names its token, by preference one that newer keys could verify.
    async fn verify_each<'a>(
        &self,
        tokens: &'a [String],
        signatures: &Signatures,
    ) -> Result<Vec<VerifiedToken>, (VerifyError, &'a str)> {
        let mut verified = Vec::new();
        let mut failure = (VerifyError::Token(TokenError::Invalid), "");
        for token in tokens {
            match self.verify(token, signatures).await {
                Ok(token) => verified.push(token),
                Err(error @ (VerifyError::Token(TokenError::UnknownKey) | VerifyError::NoKeys)) => {
                    failure = (error, token);
                }
                Err(error) if failure.1.is_empty() => failure = (error, token),
                Err(_) => {}
            }
        }
        if verified.is_empty() { Err(failure) } else { Ok(verified) }
    }

    /// From `api`'s answer. If it has no keys of the external issuer yet, those in use stay.
    fn new(
        own: KeySet,
        external: Option<ExternalKeysAnswer>,
        version: KeysVersion,
        in_use: Option<&Self>,
    ) -> Self {
        let Some(ExternalKeysAnswer { issuer, jwks }) = external else {
            return Self { own, external: None, version };
        };
        let keys = jwks.map(|jwks| Arc::new(ExternalKeys::from_jwks(&issuer, &jwks)));
        let before = in_use.filter(|_| keys.is_none()).and_then(|in_use| {
            let in_use_external = in_use.external.as_ref().filter(|external| external.issuer == issuer)?;
            let external = in_use.version.external.clone();
            Some((in_use_external.keys.clone()?, external))
        });
        let (keys, version) = match before {
            Some((keys, external)) => (Some(keys), KeysVersion { external, ..version }),
            None => (keys, version),
        };
        Self { own, external: Some(External { issuer, keys }), version }
    }

    fn names(&self) -> impl Iterator<Item = KeyName> {
        let external = self.external.as_ref().and_then(|external| external.keys.as_ref());
        self.own.names().chain(external.into_iter().flat_map(|keys| keys.names()))
    }

    pub fn accepts(&self, key: KeyName) -> bool {
        self.names().any(|name| name == key)
    }

    async fn verify(&self, token: &str, signatures: &Signatures) -> Result<VerifiedToken, VerifyError> {
        if let Some(external) = &self.external
            && external::issuer_of(token).is_some_and(|issuer| issuer == external.issuer.issuer)
        {
            let keys = external.keys.as_ref().ok_or(VerifyError::NoKeys)?;
            let (claims, key) = keys.verify_by_key(token).map_err(VerifyError::Token)?;
            return Ok(VerifiedToken { claims: VerifiedClaims::External(claims), key });
        }
        let signed = self.own.read(token).map_err(VerifyError::Token)?;
        if !signatures.verify(signed.signature()).await.map_err(|NotVerified| VerifyError::NoKeys)? {
            return Err(VerifyError::Token(TokenError::Invalid));
        }
        let claims = signed.claims().map_err(VerifyError::Token)?;
        claims.judge(&[Audience::Api, Audience::Stream]).map_err(VerifyError::Token)?;
        Ok(VerifiedToken { claims: VerifiedClaims::Own(claims), key: signed.key() })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::api_client::tests::listen;

    #[tokio::test]
    async fn a_fetch_in_progress_does_not_delay_the_stop() {
        let (listener, api) = listen().await;
        let stop = CancellationToken::new();
        let keys = Arc::new(Keys::new("http://localhost", api, Arc::new(Metrics::of_service().0)));
        let mut following = Box::pin(keys.follow(stop.clone()));
        let _unanswered = tokio::select! {
            () = &mut following => panic!("it ends before its stop"),
            socket = listener.accept() => socket,
        };
        stop.cancel();
        assert_eq!(following.now_or_never(), Some(()));
    }
}
