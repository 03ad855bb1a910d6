//! Requests of gateways to `api`'s internal listener: heads, ranges, public keys, and the users of external subjects. One request has
//! many users; each range comes from one snapshot of the database, so a head and its rows agree.

use jsonwebtoken::jwk::JwkSet;
use serde::{Deserialize, Serialize};

use crate::{
    event::Envelope,
    external::{ExternalClaims, ExternalIssuer},
    ids::{SessionId, UserId},
    keys_version::KeysVersion,
    position::{Position, Seq},
};

/// Users, sessions, ranges or identities in one request. More is a 400.
pub const MAX_PAIRS: usize = 1_000;

pub const HEADS_PATH: &str = "/internal/feed/heads";
pub const RANGES_PATH: &str = "/internal/feed/ranges";
/// `GET`, answered by [`KeysAnswer`]; `?kid=` names a key that the requester lacks.
pub const KEYS_PATH: &str = "/internal/keys";
pub const IDENTITY_PATH: &str = "/internal/identity";
/// Public: our own keys alone.
pub const JWKS_PATH: &str = "/.well-known/jwks.json";

/// The header that carries the shared secret of the internal listener: `Authorization: Bearer <secret>`.
pub fn authorization(secret: &str) -> String {
    format!("Bearer {secret}")
}

/// `POST /internal/feed/heads`: which heads differ from mine, and which of these sessions have ended?
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HeadsRequest {
    pub users: Vec<KnownHead>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logins: Vec<Login>,
}

/// A user and a session as a token names them. A session of another user counts as ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Login {
    pub user: UserId,
    pub session: SessionId,
}

/// The requester's position. `None`: nothing yet, so an answer always comes.
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
    /// Only heads that differ from the requester's, in any order.
    pub heads: Vec<UserHead>,
    /// Sessions of the request that are revoked, expired, unknown or another user's.
    pub ended_logins: Vec<Login>,
    pub keys: KeysVersion,
}

/// `head: None`: no such user.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UserHead {
    pub user: UserId,
    pub head: Option<Position>,
}

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
    /// One per pair of the request, in the same order.
    pub ranges: Vec<Range>,
}

/// The events after a position. The first one is not `after + 1` when older rows were pruned; a `head` below `after` means another
/// history. The requester decides.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Range {
    pub user: UserId,
    pub after: Seq,
    /// `None`: no such user, and no events.
    pub head: Option<Position>,
    /// Ascending, without gaps.
    pub events: Vec<Envelope>,
    /// The range was cut: request the rest after the last event.
    #[serde(default)]
    pub more: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeysAnswer {
    pub version: KeysVersion,
    pub own: JwkSet,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<ExternalKeysAnswer>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExternalKeysAnswer {
    pub issuer: ExternalIssuer,
    /// `None`: `api` does not have them yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwks: Option<JwkSet>,
}

/// `POST /internal/identity`: the users of these subjects, created where missing.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IdentityRequest {
    pub identities: Vec<Identity>,
}

/// A subject of the external issuer, from a verified token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    pub subject: String,
    /// The issuer's name for them; the user's name may differ.
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
    /// One per identity of the request, in the same order.
    pub users: Vec<UserId>,
}
