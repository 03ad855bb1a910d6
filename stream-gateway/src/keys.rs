//! By which keys tokens are checked: our own and, if one is trusted, a external issuer's, as `api` tells both.
//!
//! It promises that a lack of keys is never mistaken for a bad token or a removed key, and that keys are up to date within
//! seconds after somebody said that there are others.

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

use crate::{api_client::ApiClient, metrics::Metrics};

#[derive(Debug, PartialEq, Eq)]
pub enum VerifyError {
    /// The token is not good.
    Token(TokenError),
    /// It cannot be told yet: there are no keys.
    NoKeys,
}

/// A token whose signature, issuer, audience and time are good, and the key that signed it.
#[derive(Debug)]
pub struct VerifiedToken {
    pub claims: VerifiedClaims,
    pub key: KeyName,
}

#[derive(Debug)]
pub enum VerifiedClaims {
    Own(Claims),
    /// Who this is here is asked next.
    External(ExternalClaims),
}

/// Who comes in the moment in which a process starts waits for its first keys, instead of being sent away for minutes. Later, a
/// lack of keys is an outage, and nobody waits.
const START_UP: Duration = Duration::from_secs(10);
const FIRST_KEYS_TIMEOUT: Duration = Duration::from_secs(2);

/// Of two configurations the later one counts. If no replica has said for this long that it has the one in use, whatever `api`
/// answers counts: the later one was taken back.
const STALE_AFTER: Duration = Duration::from_secs(30);
/// Between two attempts to fetch keys of which somebody spoke: each asks a replica at random, perhaps one of the earlier
/// configuration.
const FETCH_RETRY_WAIT: Duration = Duration::from_millis(500);
/// Then the replica that spoke of them has probably gone. If not, it will speak again.
const FETCH_ATTEMPTS: usize = 20;

pub struct Keys {
    ring: KeyRing<FromApi>,
    /// Another version than the one in use, that somebody spoke of and that is to be fetched.
    announced: watch::Sender<Option<KeysVersion>>,
    started_at: Instant,
}

/// What `api` told.
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
    /// When a replica last said that it has the keys in use.
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
        Self { ring: KeyRing::new(source), announced: watch::Sender::default(), started_at }
    }

    pub fn known(&self) -> bool {
        self.ring.current().is_some()
    }

    /// Notified when other keys take the place of these.
    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<TrustedKeys>>> {
        self.ring.subscribe()
    }

    /// Whether this key is one of those in use.
    pub fn accepts(&self, key: KeyName) -> bool {
        self.ring.current().is_some_and(|trusted| trusted.accepts(key))
    }

    /// Keeps the keys fresh until `stop`.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let fetching = stop.run_until_cancelled(self.fetch_announced());
        tokio::join!(self.ring.follow(stop.clone()), fetching);
    }

    /// A replica of `api` has keys of this version. Returns immediately.
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
                let wanted = announced.borrow_and_update().clone();
                let current = self.ring.current();
                let mine = current.as_ref().map(|current| &current.version);
                let here = |wanted: &KeysVersion| {
                    mine.is_none_or(|mine| wanted.agrees_with(mine) || mine.replaces(wanted))
                };
                if wanted.as_ref().is_none_or(here) {
                    break;
                }
                sleep(FETCH_RETRY_WAIT.mul_f64(rand::random_range(0.8..1.2))).await;
            }
        }
    }

    /// The proofs of those tokens that are good for the stream: one at least. Newer keys are asked for only if none is.
    pub async fn verify(&self, tokens: &[String]) -> Result<Vec<VerifiedToken>, VerifyError> {
        let trusted = match self.ring.current() {
            None if self.started_at.elapsed() < START_UP => {
                self.ring.wait_for_first(FIRST_KEYS_TIMEOUT).await
            }
            current => current,
        };
        let trusted = trusted.ok_or(VerifyError::NoKeys)?;
        let (refused, unknown) = match trusted.verify_each(tokens) {
            Err((refused @ (VerifyError::Token(TokenError::UnknownKey) | VerifyError::NoKeys), token)) => {
                (refused, token)
            }
            told => return told.map_err(|(refused, _)| refused),
        };
        tracing::debug!(?refused, "token key unknown; fetching newer keys from api");
        // Without a name it misses a key all the same.
        let kid = external::kid_of(unknown).unwrap_or_default();
        let newest = self.ring.refresh_once(Some(&trusted), Some(&kid)).await;
        let trusted = self.ring.current().ok_or(VerifyError::NoKeys)?;
        trusted.verify_each(tokens).map_err(|(refused, _)| match refused {
            VerifyError::Token(TokenError::UnknownKey) if !newest => VerifyError::NoKeys,
            refused => refused,
        })
    }
}

impl TrustedKeys {
    /// If none is good: why not, and of which token; of one that newer keys could make good, if there is such a one.
    fn verify_each<'a>(&self, tokens: &'a [String]) -> Result<Vec<VerifiedToken>, (VerifyError, &'a str)> {
        let mut proofs = Vec::new();
        let mut refusal = (VerifyError::Token(TokenError::Invalid), "");
        for token in tokens {
            match self.verify(token) {
                Ok(proof) => proofs.push(proof),
                Err(refused @ (VerifyError::Token(TokenError::UnknownKey) | VerifyError::NoKeys)) => {
                    refusal = (refused, token);
                }
                Err(refused) if refusal.1.is_empty() => refusal = (refused, token),
                Err(_) => {}
            }
        }
        if proofs.is_empty() { Err(refusal) } else { Ok(proofs) }
    }

    /// What was answered. A replica without the issuer's keys says nothing about those that are in use.
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

    /// Whether this is one of the keys.
    pub fn accepts(&self, key: KeyName) -> bool {
        self.names().any(|name| name == key)
    }

    fn verify(&self, token: &str) -> Result<VerifiedToken, VerifyError> {
        if let Some(external) = &self.external
            && external::issuer_of(token).is_some_and(|issuer| issuer == external.issuer.issuer)
        {
            let keys = external.keys.as_ref().ok_or(VerifyError::NoKeys)?;
            let (claims, key) = keys.verify_by_key(token).map_err(VerifyError::Token)?;
            return Ok(VerifiedToken { claims: VerifiedClaims::External(claims), key });
        }
        let verified = self.own.verify_by_key(token, &[Audience::Api, Audience::Stream]);
        let (claims, key) = verified.map_err(VerifyError::Token)?;
        Ok(VerifiedToken { claims: VerifiedClaims::Own(claims), key })
    }
}
