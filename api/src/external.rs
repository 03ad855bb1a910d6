//! Users of a product with a login of its own: a token of its issuer is accepted like ours and creates its user at first use.
//!
//! Keys are fetched from the issuer, refreshed regularly, and once more for an unknown key. Until the first fetch succeeds, such a
//! token gets 503, not 401.

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
    outbound::{Outbound, OutboundLimits},
};
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use crate::{
    commands::{CommandContext, log_in::provision},
    config::ExternalSettings,
    domain::user::Profile,
    store::{StoreError, identities},
};

/// Cached subjects, about 200 bytes each.
const CACHED_SUBJECTS: u64 = 100_000;
/// A user who was deleted and returns is a new one, so entries expire.
const CACHED_FOR: Duration = Duration::from_mins(5);
const TIME_LIMIT: Duration = Duration::from_secs(5);

pub struct ExternalUsers {
    issuer: ExternalIssuer,
    keyring: KeyRing<IssuerSource>,
    users: Cache<String, UserId>,
}

struct Published {
    keys: ExternalKeys,
    jwks: JwkSet,
    version: Version,
}

struct IssuerSource {
    settings: ExternalSettings,
    outbound: Outbound,
}

#[derive(Debug, Error)]
pub enum ExternalError {
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error("the subject is empty, too long or has control characters")]
    Subject,
    #[error("the keys of the issuer are not available")]
    NoKeys,
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Source for IssuerSource {
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
        let jwks = jose::read_key_set(answer.body()).context("the answer is not a JSON Web Key Set")?;
        let keys = ExternalKeys::from_jwks(&self.settings.issuer, &jwks);
        anyhow::ensure!(!keys.is_empty(), "no key of the issuer is for {:?}", self.settings.issuer.algorithm);
        let version = Version::of(&jwks);
        Ok(Arc::new(Published { keys, jwks, version }))
    }
}

impl ExternalUsers {
    pub fn new(settings: ExternalSettings) -> io::Result<Self> {
        Ok(Self {
            issuer: settings.issuer.clone(),
            keyring: KeyRing::new(IssuerSource {
                settings,
                outbound: Outbound::new(OutboundLimits::external(TIME_LIMIT))?,
            }),
            users: Cache::builder().max_capacity(CACHED_SUBJECTS).time_to_live(CACHED_FOR).build(),
        })
    }

    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        self.keyring.follow(stop).await;
    }

    /// Whether the token names the issuer. If so, only its keys are tried.
    pub fn issued(&self, token: &str) -> bool {
        external::issuer_of(token).is_some_and(|issuer| issuer == self.issuer.issuer)
    }

    pub async fn verify(&self, token: &str) -> Result<ExternalClaims, ExternalError> {
        let seen = self.keyring.current();
        let verified = seen.as_ref().map(|seen| seen.keys.verify(token));
        let newest = match verified {
            Some(Err(TokenError::UnknownKey)) | None => self.keyring.refresh_once(seen.as_ref(), None).await,
            Some(result) => return Ok(result?),
        };
        let current = self.keyring.current().ok_or(ExternalError::NoKeys)?;
        match current.keys.verify(token) {
            Err(TokenError::UnknownKey) if !newest => Err(ExternalError::NoKeys),
            result => Ok(result?),
        }
    }

    /// The user of an identity, created if missing.
    pub async fn user_of(
        &self,
        context: &CommandContext,
        identity: &Identity,
    ) -> Result<UserId, ExternalError> {
        match self.users.get(&identity.subject) {
            Some(user) => Ok(user),
            None => Ok(self.users_of(context, std::slice::from_ref(identity)).await?[0]),
        }
    }

    /// The users of these identities, in the same order; missing ones are created. The name is used for a new user only, a picture
    /// is always taken over. The subjects must come from checked tokens.
    pub async fn users_of(
        &self,
        context: &CommandContext,
        requested: &[Identity],
    ) -> Result<Vec<UserId>, ExternalError> {
        let issuer = &self.issuer.issuer;
        let mut profiles = Vec::with_capacity(requested.len());
        for Identity { subject, username, picture } in requested {
            let name = username.as_deref().unwrap_or(subject);
            let profile = Profile::new(issuer, subject, Some(name), picture.as_deref());
            profiles.push(profile.ok_or(ExternalError::Subject)?);
        }
        let subjects: Vec<_> = requested.iter().map(|identity| identity.subject.clone()).collect();
        let known = async |connection: &mut _| identities::find_subjects(connection, issuer, &subjects).await;
        let known = context.database.run(known);
        let known: HashMap<_, _> =
            known.await?.into_iter().map(|known| (known.subject.clone(), known)).collect();
        let mut users = Vec::with_capacity(requested.len());
        for profile in profiles {
            let user = match known.get(&profile.subject) {
                Some(known) if profile.avatar_url.is_none() || profile.avatar_url == known.avatar_url => {
                    known.user
                }
                _ => {
                    let arrived = provision(context, profile.clone()).await?;
                    if arrived.created {
                        tracing::info!(user.id = %arrived.user, %issuer, "user created from an external token");
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

    pub fn version(&self) -> Option<Version> {
        self.keyring.current().map(|current| current.version.clone())
    }

    /// The keys for gateways and their version. `kid`: a key that a gateway does not have.
    pub async fn published(&self, kid: Option<&str>) -> (ExternalKeysAnswer, Option<Version>) {
        let seen = self.keyring.current();
        let missing = match (&seen, kid) {
            (None, _) => true,
            (Some(seen), Some(kid)) => !seen.keys.knows(kid),
            (Some(_), None) => false,
        };
        if missing {
            self.keyring.refresh_once(seen.as_ref(), kid).await;
        }
        let current = self.keyring.current();
        let (jwks, version) = current.map(|current| (current.jwks.clone(), current.version.clone())).unzip();
        (ExternalKeysAnswer { issuer: self.issuer.clone(), jwks }, version)
    }
}
