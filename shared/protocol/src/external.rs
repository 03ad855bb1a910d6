//! Tokens of an external issuer, for products with a login of their own. Settings of `api` pin algorithm, issuer and audience;
//! gateways receive them, with the keys, from the internal listener. External tokens have no session: they are valid until they
//! expire.

use std::fmt;

use chrono::Utc;
use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet},
};
use serde::{Deserialize, Serialize};

use crate::{
    claims::{self, KeyName, TokenError, ed25519},
    jose::{self, Audiences, NumericDate, Person, Unverified},
};

const MAX_SUBJECT: usize = 255;
/// The issuer's clock may be ahead by this, because many issuers set `nbf` to now.
const NOT_BEFORE_LEEWAY: i64 = 30;
pub const KEYS_TRIED: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExternalIssuer {
    pub issuer: String,
    pub audience: String,
    pub algorithm: ExternalAlgorithm,
}

/// Asymmetric algorithms only, so that a verifier cannot sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExternalAlgorithm {
    RS256,
    RS384,
    RS512,
    PS256,
    PS384,
    PS512,
    ES256,
    ES384,
    EdDSA,
}

impl ExternalAlgorithm {
    const ALL: [(&'static str, Self); 9] = [
        ("RS256", Self::RS256),
        ("RS384", Self::RS384),
        ("RS512", Self::RS512),
        ("PS256", Self::PS256),
        ("PS384", Self::PS384),
        ("PS512", Self::PS512),
        ("ES256", Self::ES256),
        ("ES384", Self::ES384),
        ("EdDSA", Self::EdDSA),
    ];

    fn pinned(self) -> Algorithm {
        match self {
            Self::RS256 => Algorithm::RS256,
            Self::RS384 => Algorithm::RS384,
            Self::RS512 => Algorithm::RS512,
            Self::PS256 => Algorithm::PS256,
            Self::PS384 => Algorithm::PS384,
            Self::PS512 => Algorithm::PS512,
            Self::ES256 => Algorithm::ES256,
            Self::ES384 => Algorithm::ES384,
            Self::EdDSA => Algorithm::EdDSA,
        }
    }

    fn key(self, jwk: &Jwk) -> Option<DecodingKey> {
        let curve = match &jwk.algorithm {
            AlgorithmParameters::EllipticCurve(key) => Some(&key.curve),
            _ => None,
        };
        match self {
            Self::ES256 => (curve == Some(&EllipticCurve::P256)).then(|| DecodingKey::from_jwk(jwk).ok())?,
            Self::ES384 => (curve == Some(&EllipticCurve::P384)).then(|| DecodingKey::from_jwk(jwk).ok())?,
            Self::EdDSA => ed25519(jwk),
            _ => matches!(jwk.algorithm, AlgorithmParameters::RSA(_))
                .then(|| DecodingKey::from_jwk(jwk).ok())?,
        }
    }
}

impl std::str::FromStr for ExternalAlgorithm {
    type Err = UnknownAlgorithm;

    fn from_str(text: &str) -> Result<Self, UnknownAlgorithm> {
        Self::ALL.iter().find(|(name, _)| *name == text).map(|(_, it)| *it).ok_or(UnknownAlgorithm)
    }
}

#[derive(Debug)]
pub struct UnknownAlgorithm;

impl fmt::Display for UnknownAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = ExternalAlgorithm::ALL.iter().map(|(name, _)| *name).collect();
        write!(f, "it must be one of {}", names.join(", "))
    }
}

/// A verified external token. Names and pictures are untrusted texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalClaims {
    pub sub: String,
    /// In whole seconds.
    pub exp: i64,
    pub person: Person,
}

#[derive(Deserialize)]
struct UncheckedClaims {
    iss: String,
    aud: Audiences,
    #[serde(deserialize_with = "jose::subject")]
    sub: String,
    exp: NumericDate,
    #[serde(default)]
    nbf: Option<NumericDate>,
    #[serde(flatten)]
    person: Person,
}

pub struct ExternalKeys {
    issuer: ExternalIssuer,
    algorithm: Algorithm,
    keys: Vec<(Option<String>, KeyName, DecodingKey)>,
}

impl ExternalKeys {
    /// Skips keys of other kinds and for other uses.
    pub fn from_jwks(issuer: &ExternalIssuer, jwks: &JwkSet) -> Self {
        let usable = jwks.keys.iter().filter(|jwk| jose::verifies(jwk));
        let key =
            |jwk: &Jwk| Some((jwk.common.key_id.clone(), KeyName::of(jwk)?, issuer.algorithm.key(jwk)?));
        let keys = usable.filter_map(key).collect();
        Self { issuer: issuer.clone(), algorithm: issuer.algorithm.pinned(), keys }
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub fn names(&self) -> impl Iterator<Item = KeyName> {
        self.keys.iter().map(|(_, name, _)| *name)
    }

    pub fn knows(&self, kid: &str) -> bool {
        self.keys.iter().any(|(name, ..)| name.as_deref() == Some(kid))
    }

    pub fn verify(&self, token: &str) -> Result<ExternalClaims, TokenError> {
        self.verify_by_key(token).map(|(claims, _)| claims)
    }

    pub fn verify_by_key(&self, token: &str) -> Result<(ExternalClaims, KeyName), TokenError> {
        let token = Unverified::read(token).ok_or(TokenError::Invalid)?;
        if !token.is_for(self.algorithm) {
            return Err(TokenError::Invalid);
        }
        // The key that it names; without names, every candidate.
        let named = token.kid().filter(|kid| self.knows(kid));
        let fits = |kid: &Option<String>| match named {
            Some(named) => kid.as_deref() == Some(named),
            None => kid.is_none() || token.kid().is_none(),
        };
        let mut fitting = self.keys.iter().filter(|(kid, ..)| fits(kid)).take(KEYS_TRIED);
        let Some((_, name, _)) = fitting.find(|(.., key)| token.is_signed_by(key, self.algorithm)) else {
            // A newer key may fit.
            return Err(if named.is_some() { TokenError::Invalid } else { TokenError::UnknownKey });
        };
        Ok((self.judge(token.claims().ok_or(TokenError::Invalid)?)?, *name))
    }

    fn judge(&self, claims: UncheckedClaims) -> Result<ExternalClaims, TokenError> {
        let UncheckedClaims { iss, aud, sub, exp, nbf, person } = claims;
        let now = Utc::now().timestamp();
        if iss != self.issuer.issuer {
            return Err(TokenError::Invalid);
        }
        if !aud.as_slice().contains(&self.issuer.audience) {
            return Err(TokenError::Audience);
        }
        if claims::has_ended(exp.second()) {
            return Err(TokenError::Expired);
        }
        let started = nbf.is_none_or(|nbf| nbf.second() <= now + NOT_BEFORE_LEEWAY);
        let named = (1..=MAX_SUBJECT).contains(&sub.len()) && !sub.contains(char::is_control);
        if started && named {
            Ok(ExternalClaims { sub, exp: exp.second(), person })
        } else {
            Err(TokenError::Invalid)
        }
    }
}

/// The token's unverified `iss`, which only selects the keys that check it.
pub fn issuer_of(token: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Issuer {
        iss: String,
    }
    Some(Unverified::read(token)?.claims::<Issuer>()?.iss)
}

pub fn kid_of(token: &str) -> Option<String> {
    Some(Unverified::read(token)?.kid()?.to_owned())
}
