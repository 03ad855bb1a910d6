//! What a gateway asks `api` on the internal listener: where feeds end, what follows a place, by which keys tokens are
//! checked, and who a external issuer's subjects are. Many users in one question; every answer comes from one snapshot of the
//! database, so a head and its rows agree.

use jsonwebtoken::jwk::JwkSet;
use serde::{Deserialize, Serialize};

use crate::{
    event::Envelope,
    external::{ExternalClaims, ExternalIssuer},
    ids::{SessionId, UserId},
    keys_version::KeysVersion,
    position::{Position, Seq},
};

/// The most users, logins, ranges or identities in one request. More is a 400.
pub const MAX_PAIRS: usize = 1_000;

pub const HEADS_PATH: &str = "/internal/feed/heads";
pub const RANGES_PATH: &str = "/internal/feed/ranges";
/// `GET`, answered by [`KeysAnswer`]; `?kid=` names a key that the asker misses.
pub const KEYS_PATH: &str = "/internal/keys";
pub const IDENTITY_PATH: &str = "/internal/identity";
/// Public: our own keys alone.
pub const JWKS_PATH: &str = "/.well-known/jwks.json";

/// The header that carries the shared secret of the internal listener: `Authorization: Bearer <secret>`.
pub fn authorization(secret: &str) -> String {
    format!("Bearer {secret}")
}

/// `POST /internal/feed/heads`: whose head is not what I have? And which of these logins have ended?
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HeadsRequest {
    pub users: Vec<KnownHead>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logins: Vec<Login>,
}

/// A user and a session as a token names them. That the session is the user's is part of the question whether it lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Login {
    pub user: UserId,
    pub session: SessionId,
}

/// What the asker has. `None`: nothing yet, so an answer always comes.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KnownHead {
    pub user: UserId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<Position>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HeadsAnswer {
    /// Only those that differ from what the asker has, in any order.
    pub heads: Vec<UserHead>,
    /// The logins in the request whose session is revoked, expired, unknown or another user's.
    pub ended_logins: Vec<Login>,
    /// The keys of the replica that answers.
    pub keys: KeysVersion,
}

/// `head: None`: there is no such user.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UserHead {
    pub user: UserId,
    pub head: Option<Position>,
}

/// `POST /internal/feed/ranges`: what follows these places?
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RangesRequest {
    pub ranges: Vec<RangeAfter>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RangeAfter {
    pub user: UserId,
    pub after: Seq,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RangesAnswer {
    /// One per pair of the question, in the same order.
    pub ranges: Vec<Range>,
}

/// What follows one place. The first event is not `after + 1` when older rows are no longer kept; a `head` below `after`
/// means that the place is from another history. The asker judges.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Range {
    pub user: UserId,
    pub after: Seq,
    /// `None`: there is no such user, and no events.
    pub head: Option<Position>,
    /// Ascending, without holes.
    pub events: Vec<Envelope>,
    /// The range was cut: ask again after the last event.
    #[serde(default)]
    pub more: bool,
}

/// By which keys tokens are checked.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeysAnswer {
    pub version: KeysVersion,
    pub own: JwkSet,
    /// Whose tokens are accepted besides our own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<ExternalKeysAnswer>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExternalKeysAnswer {
    pub issuer: ExternalIssuer,
    /// None: `api` could not get them yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwks: Option<JwkSet>,
}

/// `POST /internal/identity`: which users are these? Those who are not there yet are made.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IdentityRequest {
    pub identities: Vec<Identity>,
}

/// A subject of the external issuer, by a token that the asker has checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    pub subject: String,
    /// What the issuer calls them; a wish, not a name here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub picture: Option<String>,
}

impl From<&ExternalClaims> for Identity {
    fn from(claims: &ExternalClaims) -> Self {
        let person = &claims.person;
        let username = person.name().map(str::to_owned);
        Self { subject: claims.sub.clone(), username, picture: person.picture.clone() }
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IdentityAnswer {
    /// One per identity of the question, in the same order.
    pub users: Vec<UserId>,
}
