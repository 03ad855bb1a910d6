//! Users of a product with a login of its own: a token of its issuer is accepted like ours, and makes its user at first use.
//!
//! Keys are fetched from the issuer, kept fresh, and asked for once more when a token names one that is not known. While
//! none could be had, a token of the issuer is nobody's fault: 503, never 401.

use std::{collections::HashMap, io, sync::Arc, time::Duration};

use anyhow::Context as _;
use http::{Request, StatusCode, header};
use jsonwebtoken::jwk::JwkSet;
use moka::sync::Cache;
use protocol::{
    claims::TokenError,
    external::{self, ExternalClaims, ExternalIssuer, ExternalKeys},
    feed::{ExternalKeysAnswer, Identity},
    ids::UserId,
    jose,
    keys_version::Version,
};
use service_kit::{
    keyring::{KeyRing, Source},
    outbound::{Limits, Outbound},
};
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use crate::{
    commands::{Context, log_in::provision},
    domain::user::Profile,
    store::{StoreError, identities},
};

/// Subjects that are remembered, at some 200 bytes each.
const REMEMBERED: u64 = 100_000;
/// A user who was deleted and comes back is another one.
const REMEMBERED_FOR: Duration = Duration::from_mins(5);
/// For the issuer's keys to arrive.
const TIME_LIMIT: Duration = Duration::from_secs(5);

/// Whose tokens are accepted, and where their keys are.
#[derive(Debug, Clone)]
pub struct ExternalSettings {
    pub issuer: ExternalIssuer,
    pub jwks_url: String,
}

pub struct External {
    issuer: ExternalIssuer,
    ring: KeyRing<Issuer>,
    users: Cache<String, UserId>,
}

/// The issuer's keys, and the form in which gateways are told.
struct Published {
    keys: ExternalKeys,
    jwks: JwkSet,
    version: Version,
}

struct Issuer {
    settings: ExternalSettings,
    outbound: Outbound,
}

#[derive(Debug, Error)]
pub enum ExternalError {
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error("a subject of no usable form")]
    Subject,
    #[error("the issuer's keys cannot be had")]
    NoKeys,
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Source for Issuer {
    type Keys = Published;
    type Error = anyhow::Error;

    fn name(&self) -> &str {
        &self.settings.issuer.issuer
    }

    async fn fetch(
        &self,
        _kid: Option<&str>,
        _in_use: Option<Arc<Published>>,
    ) -> anyhow::Result<Arc<Published>> {
        let request = Request::get(&self.settings.jwks_url)
            .header(header::ACCEPT, "application/json")
            .body(Vec::new())
            .context("EXTERNAL_JWKS_URL")?;
        let answer = self.outbound.send(request).await?;
        anyhow::ensure!(answer.status() == StatusCode::OK, "the issuer answered {}", answer.status());
        let jwks = jose::read_key_set(answer.body()).context("this is no set of keys")?;
        let keys = ExternalKeys::from_jwks(&self.settings.issuer, &jwks);
        anyhow::ensure!(!keys.is_empty(), "no key of the issuer is for {:?}", self.settings.issuer.algorithm);
        let version = Version::of(&jwks);
        Ok(Arc::new(Published { keys, jwks, version }))
    }
}

impl External {
    pub fn new(settings: ExternalSettings) -> io::Result<Self> {
        Ok(Self {
            issuer: settings.issuer.clone(),
            ring: KeyRing::new(Issuer { settings, outbound: Outbound::new(Limits::external(TIME_LIMIT))? }),
            users: Cache::builder().max_capacity(REMEMBERED).time_to_live(REMEMBERED_FOR).build(),
        })
    }

    /// Keeps the issuer's keys fresh until `stop`.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        self.ring.follow(stop).await;
    }

    /// It says that it is the issuer's. Then nobody else's keys are tried on it.
    pub fn issued(&self, token: &str) -> bool {
        external::issuer_of(token).is_some_and(|issuer| issuer == self.issuer.issuer)
    }

    pub async fn verify(&self, token: &str) -> Result<ExternalClaims, ExternalError> {
        let seen = self.ring.current();
        let told = seen.as_ref().map(|seen| seen.keys.verify(token));
        let newest = match told {
            Some(Err(TokenError::UnknownKey)) | None => self.ring.ask_once(seen.as_ref(), None).await,
            Some(told) => return Ok(told?),
        };
        let current = self.ring.current().ok_or(ExternalError::NoKeys)?;
        match current.keys.verify(token) {
            Err(TokenError::UnknownKey) if !newest => Err(ExternalError::NoKeys),
            told => Ok(told?),
        }
    }

    /// Who this is here, made if need be.
    pub async fn user_of(&self, context: &Context, identity: &Identity) -> Result<UserId, ExternalError> {
        match self.users.get(&identity.subject) {
            Some(user) => Ok(user),
            None => Ok(self.users_of(context, std::slice::from_ref(identity)).await?[0]),
        }
    }

    /// Who these are here, in their order; those who are not there yet are made. Names and pictures are the issuer's wish: a
    /// name is for a new user only, a picture is taken over when there is one. Subjects come from tokens that were checked.
    pub async fn users_of(
        &self,
        context: &Context,
        asked: &[Identity],
    ) -> Result<Vec<UserId>, ExternalError> {
        let issuer = &self.issuer.issuer;
        let mut profiles = Vec::with_capacity(asked.len());
        for Identity { subject, username, picture } in asked {
            let name = username.as_deref().unwrap_or(subject);
            let profile = Profile::new(issuer, subject, Some(name), picture.as_deref());
            profiles.push(profile.ok_or(ExternalError::Subject)?);
        }
        let subjects: Vec<_> = asked.iter().map(|identity| identity.subject.clone()).collect();
        let known = async |connection: &mut _| identities::known(connection, issuer, &subjects).await;
        let known = context.database.run(known);
        let known: HashMap<_, _> =
            known.await?.into_iter().map(|known| (known.subject.clone(), known)).collect();
        let mut users = Vec::with_capacity(asked.len());
        for profile in profiles {
            let user = match known.get(&profile.subject) {
                Some(known) if profile.avatar_url.is_none() || profile.avatar_url == known.avatar_url => {
                    known.user
                }
                _ => {
                    let arrived = provision(context, profile.clone()).await?;
                    if arrived.created {
                        tracing::info!(user.id = %arrived.user, %issuer, "a user came with an external token");
                    }
                    arrived.user
                }
            };
            self.users.insert(profile.subject, user);
            users.push(user);
        }
        Ok(users)
    }

    pub fn issuer(&self) -> &ExternalIssuer {
        &self.issuer
    }

    /// The version of the keys that are there, if some are.
    pub fn version(&self) -> Option<Version> {
        self.ring.current().map(|current| current.version.clone())
    }

    /// What gateways are told, and its version. `kid`: a key that one of them misses.
    pub async fn published(&self, kid: Option<&str>) -> (ExternalKeysAnswer, Option<Version>) {
        let seen = self.ring.current();
        let missing = match (&seen, kid) {
            (None, _) => true,
            (Some(seen), Some(kid)) => !seen.keys.knows(kid),
            (Some(_), None) => false,
        };
        if missing {
            self.ring.ask_once(seen.as_ref(), kid).await;
        }
        let current = self.ring.current();
        let (jwks, version) = current.map(|current| (current.jwks.clone(), current.version.clone())).unzip();
        (ExternalKeysAnswer { issuer: self.issuer.clone(), jwks }, version)
    }
}
