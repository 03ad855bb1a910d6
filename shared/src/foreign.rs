//! Tokens of a foreign issuer: a product with a login of its own brings its users along. Algorithm, issuer and audience are
//! pinned by settings of `api`; a gateway learns them, and the keys, from `api`'s internal listener.
//!
//! A foreign token has no session here: it is good until it expires.

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

/// A subject's longest form, as OpenID Connect has it.
const MAX_SUBJECT: usize = 255;
/// How far the issuer's clock may be ahead of ours: many issuers say "not before now".
const NOT_BEFORE_LEEWAY: i64 = 30;
/// Keys that are tried on one token, at most.
const KEYS_TRIED: usize = 8;

/// What one must know to check an issuer's tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignClaims {
    pub sub: String,
    /// The whole second in which it ends.
    pub exp: i64,
    pub person: Person,
}

/// As an issuer writes them.
#[derive(Deserialize)]
struct Claims {
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

/// An issuer's public keys, with their names if they have any.
pub struct ForeignKeys {
    issuer: ForeignIssuer,
    algorithm: Algorithm,
    keys: Vec<(Option<String>, KeyName, DecodingKey)>,
}

impl ForeignKeys {
    /// Keys of other kinds or for other uses are passed over.
    pub fn from_jwks(issuer: &ForeignIssuer, jwks: &JwkSet) -> Self {
        let usable = jwks.keys.iter().filter(|jwk| jose::verifies(jwk));
        let key =
            |jwk: &Jwk| Some((jwk.common.key_id.clone(), KeyName::of(jwk)?, issuer.algorithm.key(jwk)?));
        let keys = usable.filter_map(key).collect();
        Self { issuer: issuer.clone(), algorithm: issuer.algorithm.pinned(), keys }
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The names of all keys.
    pub fn names(&self) -> impl Iterator<Item = KeyName> {
        self.keys.iter().map(|(_, name, _)| *name)
    }

    pub fn knows(&self, kid: &str) -> bool {
        self.keys.iter().any(|(name, ..)| name.as_deref() == Some(kid))
    }

    pub fn verify(&self, token: &str) -> Result<ForeignClaims, TokenError> {
        self.verify_by_key(token).map(|(claims, _)| claims)
    }

    /// The same, and which key signed the token.
    pub fn verify_by_key(&self, token: &str) -> Result<(ForeignClaims, KeyName), TokenError> {
        let token = Unverified::read(token).ok_or(TokenError::Invalid)?;
        if !token.is_for(self.algorithm) {
            return Err(TokenError::Invalid);
        }
        // The key that it names; where it names none, or keys have no names, those that may be meant.
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

    fn judge(&self, claims: Claims) -> Result<ForeignClaims, TokenError> {
        let Claims { iss, aud, sub, exp, nbf, person } = claims;
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
        let begun = nbf.is_none_or(|nbf| nbf.second() <= now + NOT_BEFORE_LEEWAY);
        let named = (1..=MAX_SUBJECT).contains(&sub.len()) && !sub.contains(char::is_control);
        if begun && named {
            Ok(ForeignClaims { sub, exp: exp.second(), person })
        } else {
            Err(TokenError::Invalid)
        }
    }
}

/// Whose token this says it is. Not believed: it only chooses by whose keys the token is checked.
pub fn issuer_of(token: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Issuer {
        iss: String,
    }
    Some(Unverified::read(token)?.claims::<Issuer>()?.iss)
}

/// The key that a token names.
pub fn kid_of(token: &str) -> Option<String> {
    Some(Unverified::read(token)?.kid()?.to_owned())
}

#[cfg(all(test, feature = "test-support"))]
mod tests {
    use jsonwebtoken::jwk::{KeyOperations, PublicKeyUse};
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
        assert_eq!(claims.person.name(), Some("jane|1"));
        for exp in [1, Utc::now().timestamp()] {
            assert_eq!(keys().verify(&key.token("jane|1", exp)), Err(TokenError::Expired));
        }
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
        let mut signs = jwks.clone();
        signs.keys[0].common.public_key_use = None;
        signs.keys[0].common.key_operations = Some(vec![KeyOperations::Encrypt]);
        assert!(ForeignKeys::from_jwks(&issuer(), &signs).is_empty());
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
    fn legal_forms_of_a_token_are_read() {
        let key = IssuerKey::number(0);
        let good = json!({ "iss": ISSUER, "aud": AUDIENCE, "sub": "s", "exp": FAR });
        let with = |more: serde_json::Value| {
            let mut claims = good.clone();
            claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            keys().verify(&key.sign(&claims))
        };
        let now = Utc::now().timestamp() as f64;
        let claims = with(json!({ "exp": now + 99.5, "nbf": now - 0.25, "iat": now - 0.25 })).unwrap();
        assert_eq!(claims.exp, now as i64 + 99);
        assert_eq!(with(json!({ "exp": now - 0.5 })), Err(TokenError::Expired));
        assert_eq!(with(json!({ "exp": now })), Err(TokenError::Expired), "on or after (RFC 7519 4.1.4)");
        assert_eq!(with(json!({ "sub": 42 })).unwrap().sub, "42");
        let odd = with(json!({ "preferred_username": 5, "name": "Jane", "picture": [] })).unwrap();
        assert_eq!((odd.person.name(), odd.person.picture.as_deref()), (Some("Jane"), None));
        assert_eq!(keys().verify(&key.sign_critical(&good)), Err(TokenError::Invalid));
    }

    #[test]
    fn keys_and_tokens_need_no_names() {
        let good = json!({ "iss": ISSUER, "aud": AUDIENCE, "sub": "s", "exp": FAR });
        let [first, second] = [0, 1].map(IssuerKey::number);
        let both = JwkSet { keys: [first.jwks().keys, second.jwks().keys].concat() };
        let mut nameless = both.clone();
        for key in &mut nameless.keys {
            key.common.key_id = None;
        }
        for (jwks, token) in [
            (&both, second.sign_nameless(&good)),
            (&nameless, second.sign_nameless(&good)),
            (&nameless, second.sign(&good)),
        ] {
            assert!(ForeignKeys::from_jwks(&issuer(), jwks).verify(&token).is_ok());
        }
        // Signed by a key that is not there yet: newer ones are asked for.
        for token in [second.sign_nameless(&good), second.sign(&good)] {
            assert_eq!(keys().verify(&token), Err(TokenError::UnknownKey));
        }
        // As many keys are tried as are promised, and no more.
        let mut many = JwkSet { keys: vec![first.jwks().keys[0].clone(); KEYS_TRIED] };
        many.keys.push(second.jwks().keys[0].clone());
        let many = ForeignKeys::from_jwks(&issuer(), &many);
        assert_eq!(many.verify(&second.sign_nameless(&good)), Err(TokenError::UnknownKey));
        assert!(many.verify(&second.sign(&good)).is_ok());
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
