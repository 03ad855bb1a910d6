//! Tokens of a foreign issuer: a product with a login of its own brings its users along. Algorithm, issuer and audience are
//! pinned by settings of `api`; a gateway learns them, and the keys, from `api`'s internal listener.
//!
//! A foreign token has no session here: it is good until it expires.

use std::{collections::HashMap, fmt};

use chrono::Utc;
use jsonwebtoken::{
    Algorithm, DecodingKey, Validation,
    errors::ErrorKind,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, PublicKeyUse},
};
use serde::{Deserialize, Serialize};

use crate::claims::{TokenError, ed25519};

/// A subject's longest form, as OpenID Connect has it.
const MAX_SUBJECT: usize = 255;
/// How far the issuer's clock may be ahead of ours: many issuers say "not before now".
const NOT_BEFORE_LEEWAY: i64 = 30;

/// What one must know to check an issuer's tokens.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ForeignIssuer {
    pub issuer: String,
    pub audience: String,
    pub algorithm: ForeignAlgorithm,
}

/// How the issuer signs: asymmetric algorithms only, so that no verifier could sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ForeignAlgorithm {
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

impl ForeignAlgorithm {
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

    /// A key of the kind that this algorithm needs; `None` for all others.
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

impl std::str::FromStr for ForeignAlgorithm {
    type Err = NotAnAlgorithm;

    fn from_str(text: &str) -> Result<Self, NotAnAlgorithm> {
        Self::ALL.iter().find(|(name, _)| *name == text).map(|(_, it)| *it).ok_or(NotAnAlgorithm)
    }
}

#[derive(Debug)]
pub struct NotAnAlgorithm;

impl fmt::Display for NotAnAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = ForeignAlgorithm::ALL.iter().map(|(name, _)| *name).collect();
        write!(f, "it must be one of {}", names.join(", "))
    }
}

/// What is believed of a foreign token. Names and pictures are texts from outside.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ForeignClaims {
    pub sub: String,
    pub exp: i64,
    #[serde(default)]
    nbf: Option<i64>,
    #[serde(default)]
    pub preferred_username: Option<String>,
    #[serde(default)]
    pub name: Option<String>,
    #[serde(default)]
    pub picture: Option<String>,
}

/// An issuer's public keys by `kid`.
pub struct ForeignKeys {
    algorithm: Algorithm,
    validation: Validation,
    keys: HashMap<String, DecodingKey>,
}

impl ForeignKeys {
    /// Keys of other kinds, for other uses, without a name, or malformed are passed over.
    pub fn from_jwks(issuer: &ForeignIssuer, jwks: &JwkSet) -> Self {
        let algorithm = issuer.algorithm.pinned();
        let mut validation = Validation::new(algorithm);
        validation.leeway = 0;
        validation.set_issuer(&[&issuer.issuer]);
        validation.set_audience(&[&issuer.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "sub", "aud"]);
        let signs =
            |jwk: &&Jwk| jwk.common.public_key_use.as_ref().is_none_or(|it| *it == PublicKeyUse::Signature);
        let named = |jwk: &Jwk| Some((jwk.common.key_id.clone()?, issuer.algorithm.key(jwk)?));
        Self { algorithm, validation, keys: jwks.keys.iter().filter(signs).filter_map(named).collect() }
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub fn knows(&self, kid: &str) -> bool {
        self.keys.contains_key(kid)
    }

    pub fn verify(&self, token: &str) -> Result<ForeignClaims, TokenError> {
        let header = jsonwebtoken::decode_header(token).map_err(|_| TokenError::Invalid)?;
        if header.alg != self.algorithm {
            return Err(TokenError::Invalid);
        }
        let key = header.kid.and_then(|kid| self.keys.get(&kid)).ok_or(TokenError::UnknownKey)?;
        let claims = jsonwebtoken::decode::<ForeignClaims>(token, key, &self.validation)
            .map_err(|error| match error.kind() {
                ErrorKind::ExpiredSignature => TokenError::Expired,
                ErrorKind::InvalidAudience => TokenError::Audience,
                _ => TokenError::Invalid,
            })?
            .claims;
        let begun = claims.nbf.is_none_or(|nbf| nbf <= Utc::now().timestamp() + NOT_BEFORE_LEEWAY);
        let named = (1..=MAX_SUBJECT).contains(&claims.sub.len()) && !claims.sub.contains(char::is_control);
        if begun && named { Ok(claims) } else { Err(TokenError::Invalid) }
    }
}

/// Whose token this says it is. Not believed: it only chooses by whose keys the token is checked.
pub fn issuer_of(token: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Issuer {
        iss: String,
    }
    let token = jsonwebtoken::dangerous::insecure_decode::<Issuer>(token).ok()?;
    Some(token.claims.iss)
}

/// The key that a token names.
pub fn kid_of(token: &str) -> Option<String> {
    jsonwebtoken::decode_header(token).ok()?.kid
}

#[cfg(all(test, feature = "test-support"))]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::test_support::issuer::{AUDIENCE, ISSUER, IssuerKey, issuer};

    const FAR: i64 = 4_000_000_000;

    fn keys() -> ForeignKeys {
        ForeignKeys::from_jwks(&issuer(), &IssuerKey::number(0).jwks())
    }

    #[test]
    fn a_foreign_token_names_its_subject_until_it_expires() {
        let key = IssuerKey::number(0);
        let claims = keys().verify(&key.token("jane|1", FAR)).unwrap();
        assert_eq!((claims.sub.as_str(), claims.exp), ("jane|1", FAR));
        assert_eq!(claims.preferred_username.as_deref(), Some("jane|1"));
        assert_eq!(keys().verify(&key.token("jane|1", 1)), Err(TokenError::Expired));
        let many = key.sign(&json!({ "iss": ISSUER, "aud": ["other", AUDIENCE], "sub": "s", "exp": FAR }));
        assert!(keys().verify(&many).is_ok());
    }

    #[test]
    fn issuer_audience_algorithm_key_and_times_are_pinned() {
        let key = IssuerKey::number(0);
        let good = json!({ "iss": ISSUER, "aud": AUDIENCE, "sub": "s", "exp": FAR });
        let with = |name: &str, value: serde_json::Value| {
            let mut claims = good.clone();
            claims[name] = value;
            key.sign(&claims)
        };
        let without = |name: &str| {
            let mut claims = good.clone();
            claims.as_object_mut().unwrap().remove(name);
            key.sign(&claims)
        };
        assert!(keys().verify(&key.sign(&good)).is_ok());
        assert!(
            keys().verify(&with("nbf", json!(Utc::now().timestamp() + 10))).is_ok(),
            "clocks differ a little"
        );
        for bad in [
            with("iss", json!("https://other.example")),
            with("aud", json!("another")),
            with("aud", json!([])),
            with("sub", json!("")),
            with("sub", json!("x".repeat(256))),
            with("sub", json!("a\0b")),
            with("nbf", json!(FAR)),
            with("exp", json!("soon")),
            without("iss"),
            without("aud"),
            without("sub"),
            without("exp"),
            String::new(),
            "a.b.c".into(),
        ] {
            assert!(keys().verify(&bad).is_err(), "{bad}");
        }
        assert_eq!(keys().verify(&IssuerKey::number(1).sign(&good)), Err(TokenError::UnknownKey));
        // The public key is no secret to sign with.
        let jwk = &key.jwks().keys[0];
        let header = jsonwebtoken::Header {
            kid: jwk.common.key_id.clone(),
            ..jsonwebtoken::Header::new(Algorithm::HS256)
        };
        let secret = jsonwebtoken::EncodingKey::from_secret(serde_json::to_string(jwk).unwrap().as_bytes());
        let forged = jsonwebtoken::encode(&header, &good, &secret).unwrap();
        assert_eq!(keys().verify(&forged), Err(TokenError::Invalid));
    }

    #[test]
    fn keys_that_are_not_for_the_algorithm_are_passed_over() {
        let jwks = IssuerKey::number(0).jwks();
        for algorithm in [ForeignAlgorithm::RS256, ForeignAlgorithm::ES384, ForeignAlgorithm::EdDSA] {
            assert!(ForeignKeys::from_jwks(&ForeignIssuer { algorithm, ..issuer() }, &jwks).is_empty());
        }
        let mut encrypts = jwks;
        encrypts.keys[0].common.public_key_use = Some(PublicKeyUse::Encryption);
        assert!(ForeignKeys::from_jwks(&issuer(), &encrypts).is_empty());
        let kid = IssuerKey::number(0).jwks().keys[0].common.key_id.clone().unwrap();
        let token = IssuerKey::number(0).token("s", FAR);
        for key in [
            r#""kty":"EC","crv":"P-256","x":"AA","y":"AA""#,
            r#""kty":"EC","crv":"P-256","x":"","y":"""#,
            r#""kty":"oct","k":"AAAA""#,
            r#""kty":"new","z":"AAAA""#,
        ] {
            let jwks = serde_json::from_str(&format!(r#"{{"keys":[{{{key},"kid":"{kid}"}}]}}"#)).unwrap();
            assert!(ForeignKeys::from_jwks(&issuer(), &jwks).verify(&token).is_err(), "{key}");
        }
    }

    #[test]
    fn a_token_says_whose_it_is() {
        assert_eq!(issuer_of(&IssuerKey::number(0).token("s", 1)).as_deref(), Some(ISSUER));
        for none in ["", "a.b.c", "a.e30.c"] {
            assert_eq!(issuer_of(none), None, "{none}");
        }
    }

    #[test]
    fn algorithms_are_named_as_in_rfc_7518() {
        assert_eq!("RS256".parse::<ForeignAlgorithm>().unwrap(), ForeignAlgorithm::RS256);
        for bad in ["", "none", "HS256", "rs256"] {
            assert!(bad.parse::<ForeignAlgorithm>().is_err(), "{bad}");
        }
    }
}
