//! By which keys tokens are checked: our own and, if one is trusted, a foreign issuer's, as `api` tells both.
//!
//! It promises that a lack of keys is never mistaken for a bad token.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use form_urlencoded::byte_serialize;
use shared::{
    claims::{Audience, Claims, KeySet, TokenError},
    feed::{KEYS_PATH, KeysAnswer},
    foreign::{self, ForeignClaims, ForeignKeys},
    keyring::{KeyRing, Source},
};
use tokio_util::sync::CancellationToken;
use url::form_urlencoded;

use crate::{backfill::Api, metrics::Metrics};

#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// The token is not good.
    Token(TokenError),
    /// It cannot be told yet: there are no keys.
    NoKeys,
}

/// A token whose signature, issuer, audience and time are good.
#[derive(Debug)]
pub enum Proof {
    Own(Claims),
    /// Who this is here is asked next.
    Foreign(ForeignClaims),
}

/// Who comes in the moment in which a process starts waits for its first keys, instead of being sent away for minutes. Later, a
/// lack of keys is an outage, and nobody waits.
const STARTING: Duration = Duration::from_secs(10);
const FIRST_KEYS_WITHIN: Duration = Duration::from_secs(2);

pub struct Keys {
    ring: KeyRing<FromApi>,
    began: Instant,
}

/// What `api` told.
struct Trusted {
    own: KeySet,
    foreign: Option<Foreign>,
}

struct Foreign {
    issuer: String,
    /// None: `api` has none yet.
    keys: Option<ForeignKeys>,
}

struct FromApi {
    issuer: String,
    api: Api,
    metrics: Arc<Metrics>,
}

impl Source for FromApi {
    type Keys = Trusted;
    type Error = anyhow::Error;

    fn name(&self) -> &str {
        "api"
    }

    async fn fetch(&self, kid: Option<&str>) -> anyhow::Result<Trusted> {
        let query = kid.map_or_else(String::new, |kid| {
            format!("?kid={}", byte_serialize(kid.as_bytes()).collect::<String>())
        });
        let answer: KeysAnswer = self.api.get(&format!("{KEYS_PATH}{query}")).await?;
        let own = KeySet::from_jwks(&self.issuer, &answer.own);
        anyhow::ensure!(!own.is_empty(), "api publishes no usable key");
        self.metrics.keys.set(i64::try_from(answer.own.keys.len()).unwrap_or(i64::MAX));
        let foreign = answer.foreign.map(|foreign| Foreign {
            keys: foreign.jwks.map(|jwks| ForeignKeys::from_jwks(&foreign.issuer, &jwks)),
            issuer: foreign.issuer.issuer,
        });
        Ok(Trusted { own, foreign })
    }
}

impl Keys {
    pub fn new(issuer: &str, api: Api, metrics: Arc<Metrics>) -> Self {
        Self { ring: KeyRing::new(FromApi { issuer: issuer.into(), api, metrics }), began: Instant::now() }
    }

    pub fn known(&self) -> bool {
        self.ring.current().is_some()
    }

    /// Keeps the keys fresh until `stop`.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        self.ring.follow(stop).await;
    }

    /// The proofs of those tokens that are good for the stream: one at least. Newer keys are asked for only if none is.
    pub async fn verify(&self, tokens: &[String]) -> Result<Vec<Proof>, Refused> {
        let trusted = match self.ring.current() {
            None if self.began.elapsed() < STARTING => self.ring.first_within(FIRST_KEYS_WITHIN).await,
            current => current,
        };
        let trusted = trusted.ok_or(Refused::NoKeys)?;
        let (refused, unknown) = match trusted.verify_each(tokens) {
            Err((refused @ (Refused::Token(TokenError::UnknownKey) | Refused::NoKeys), token)) => {
                (refused, token)
            }
            told => return told.map_err(|(refused, _)| refused),
        };
        tracing::debug!(?refused, "asking api for newer keys");
        // Without a name it misses a key all the same.
        let kid = foreign::kid_of(unknown).unwrap_or_default();
        let newest = self.ring.ask_once(Some(&trusted), Some(&kid)).await;
        let trusted = self.ring.current().ok_or(Refused::NoKeys)?;
        trusted.verify_each(tokens).map_err(|(refused, _)| match refused {
            Refused::Token(TokenError::UnknownKey) if !newest => Refused::NoKeys,
            refused => refused,
        })
    }
}

impl Trusted {
    /// If none is good: why not, and of which token; of one that newer keys could make good, if there is such a one.
    fn verify_each<'a>(&self, tokens: &'a [String]) -> Result<Vec<Proof>, (Refused, &'a str)> {
        let mut proofs = Vec::new();
        let mut refusal = (Refused::Token(TokenError::Invalid), "");
        for token in tokens {
            match self.verify(token) {
                Ok(proof) => proofs.push(proof),
                Err(refused @ (Refused::Token(TokenError::UnknownKey) | Refused::NoKeys)) => {
                    refusal = (refused, token)
                }
                Err(refused) if refusal.1.is_empty() => refusal = (refused, token),
                Err(_) => {}
            }
        }
        if proofs.is_empty() { Err(refusal) } else { Ok(proofs) }
    }

    fn verify(&self, token: &str) -> Result<Proof, Refused> {
        if let Some(foreign) = &self.foreign
            && foreign::issuer_of(token).is_some_and(|issuer| issuer == foreign.issuer)
        {
            let keys = foreign.keys.as_ref().ok_or(Refused::NoKeys)?;
            return keys.verify(token).map(Proof::Foreign).map_err(Refused::Token);
        }
        let claims = self.own.verify(token, &[Audience::Api, Audience::Stream]);
        claims.map(Proof::Own).map_err(Refused::Token)
    }
}
