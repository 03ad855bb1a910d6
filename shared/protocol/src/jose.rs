//! Reads signed tokens (compact JWS), their claims, and key sets, in every form that the standards allow. The callers decide
//! which tokens to trust.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{
    Algorithm, DecodingKey, crypto,
    jwk::{Jwk, JwkSet, KeyOperations, PublicKeyUse},
};
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::{Map, Value};

/// A token whose signature was not checked: trust nothing in it.
pub struct Unverified<'t> {
    header: Header,
    claims: Map<String, Value>,
    signed: &'t str,
    signature: &'t str,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: Option<String>,
    #[serde(default)]
    crit: Option<Value>,
}

impl<'t> Unverified<'t> {
    /// `None`: malformed, or with a `crit` header (RFC 7515 4.1.11), of which none is supported.
    pub fn read(token: &'t str) -> Option<Self> {
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, claims) = signed.split_once('.')?;
        let header: Header = serde_json::from_value(Value::Object(object(header)?)).ok()?;
        let claims = object(claims)?;
        header.crit.is_none().then_some(Self { header, claims, signed, signature })
    }

    pub fn kid(&self) -> Option<&str> {
        self.header.kid.as_deref()
    }

    pub fn is_for(&self, algorithm: Algorithm) -> bool {
        self.header.alg.parse().is_ok_and(|named: Algorithm| named == algorithm)
    }

    pub fn is_signed_by(&self, key: &DecodingKey, algorithm: Algorithm) -> bool {
        crypto::verify(self.signature, self.signed.as_bytes(), key, algorithm).unwrap_or(false)
    }

    pub fn claims<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_value(Value::Object(self.claims.clone())).ok()
    }
}

fn object(part: &str) -> Option<Map<String, Value>> {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok()
}

/// The keys of a set, without malformed and unknown ones (RFC 7517 5). `None`: not a key set.
pub fn read_key_set(json: &[u8]) -> Option<JwkSet> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<Value>,
    }
    let set: Set = serde_json::from_slice(json).ok()?;
    Some(JwkSet { keys: set.keys.into_iter().filter_map(|key| serde_json::from_value(key).ok()).collect() })
}

pub fn verifies(jwk: &Jwk) -> bool {
    let common = &jwk.common;
    common.public_key_use.as_ref().is_none_or(|it| *it == PublicKeyUse::Signature)
        && common.key_operations.as_ref().is_none_or(|it| it.contains(&KeyOperations::Verify))
}

/// Seconds since 1970, possibly with a fraction (RFC 7519 2).
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Deserialize)]
pub struct NumericDate(f64);

impl NumericDate {
    pub fn second(self) -> i64 {
        self.0.floor() as i64 // One that is too large becomes the largest number.
    }
}

/// `aud`: one or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Audiences {
    One(String),
    Many(Vec<String>),
}

impl Audiences {
    pub fn as_slice(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

/// A subject: a string, or an integer, which some issuers write.
pub fn subject<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum StringOrNumber {
        Number(u64),
        Text(String),
    }
    Ok(match StringOrNumber::deserialize(deserializer)? {
        StringOrNumber::Number(number) => number.to_string(),
        StringOrNumber::Text(text) => text,
    })
}

/// Claims about the user besides the subject. A claim of another form counts as missing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Person {
    #[serde(default, deserialize_with = "text")]
    preferred_username: Option<String>,
    #[serde(default, deserialize_with = "text")]
    nickname: Option<String>,
    #[serde(default, deserialize_with = "text")]
    name: Option<String>,
    /// AD FS has none of the names above.
    #[serde(default, deserialize_with = "text")]
    unique_name: Option<String>,
    #[serde(default, deserialize_with = "text")]
    upn: Option<String>,
    #[serde(default, deserialize_with = "text")]
    pub picture: Option<String>,
}

impl Person {
    pub fn name(&self) -> Option<&str> {
        [&self.preferred_username, &self.nickname, &self.name, &self.unique_name, &self.upn]
            .into_iter()
            .find_map(Option::as_deref)
    }
}

fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(match Value::deserialize(deserializer)? {
        Value::String(text) if !text.trim().is_empty() => Some(text),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn token(header: &Value, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(serde_json::to_vec(value).unwrap());
        format!("{}.{}.c2ln", part(header), part(claims))
    }

    #[test]
    fn a_crit_header_is_rejected() {
        assert!(Unverified::read(&token(&json!({ "alg": "ES256" }), &json!({}))).is_some());
        for header in [
            json!({ "alg": "ES256", "crit": ["exp"], "exp": 1 }),
            json!({ "alg": "ES256", "crit": ["b64"], "b64": false }),
            json!({ "alg": "ES256", "crit": [] }),
            json!({ "kid": "1" }),
            json!([]),
        ] {
            assert!(Unverified::read(&token(&header, &json!({}))).is_none(), "{header}");
        }
        for odd in ["", ".", "..", "a.b.c", "e30.e30", "e30.e30.e30.e30"] {
            assert!(Unverified::read(odd).is_none(), "{odd}");
        }
    }

    #[test]
    fn a_malformed_key_does_not_invalidate_the_set() {
        let good =
            json!({ "kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo" });
        let set = json!({ "keys": [{ "kty": "RSA", "n": 5 }, 7, null, { "kty": "RSA", "use": 5 }, good], "more": 1 });
        let read = read_key_set(&serde_json::to_vec(&set).unwrap()).unwrap();
        assert_eq!(read.keys.iter().filter(|key| DecodingKey::from_jwk(key).is_ok()).count(), 1);
        for odd in ["", "[]", "{}", r#"{"keys":{}}"#, "<html>"] {
            assert!(read_key_set(odd.as_bytes()).is_none(), "{odd}");
        }
    }

    #[test]
    fn a_claim_of_another_type_is_ignored() {
        let person = |claims: Value| serde_json::from_value::<Person>(claims).unwrap();
        for odd in [json!(5), json!(null), json!(""), json!(" "), json!(["x"]), json!({})] {
            let claims = json!({ "preferred_username": odd, "name": "John", "picture": odd });
            assert_eq!(
                (person(claims.clone()).name(), person(claims).picture),
                (Some("John"), None),
                "{odd}"
            );
        }
        assert_eq!(
            person(json!({ "upn": "jo@corp.example", "unique_name": "CORP\\jo" })).name(),
            Some("CORP\\jo")
        );
        assert_eq!(person(json!({})).name(), None);
    }

    #[test]
    fn times_need_not_be_whole_seconds() {
        let date = |number: Value| serde_json::from_value::<NumericDate>(number).unwrap();
        assert_eq!(date(json!(1_700_000_000.9)).second(), 1_700_000_000);
        assert!(date(json!(1.5)) > date(json!(1)));
        assert!(serde_json::from_value::<NumericDate>(json!("soon")).is_err());
    }
}
