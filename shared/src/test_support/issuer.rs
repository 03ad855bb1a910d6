//! A foreign issuer of tokens, for tests: signs with ES256 and can rotate its key.

use jsonwebtoken::{
    Algorithm, EncodingKey, Header,
    jwk::{Jwk, JwkSet, PublicKeyUse, ThumbprintHash},
};
use serde_json::Value;

use crate::{
    feed::ForeignKeysAnswer,
    foreign::{ForeignAlgorithm, ForeignIssuer},
};

pub const ISSUER: &str = "https://login.example";
pub const AUDIENCE: &str = "messenger";

// Made for tests alone.
const PEMS: [&str; 2] = [
    "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgEd0BkH8/c6une+o+\ne0Vpe7/MQCJEpPmIq3mbXHaPWHehRANCAARWmEsyO0F537Tequa9SEJUaVXbwTCE\n5zgW/nTDaESisKM8az+enzTbSKjQpJOCMrkI0d/AJVyqt1E1kJX8KMSw\n-----END PRIVATE KEY-----\n",
    "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgez+AupqlvaS3PmQ2\nZp4y7IFlXXIMCqf9LgrU9++7bFehRANCAARzOxiQtqjQXMHm1qpP5Eatqki1LRP8\n8treYOnIWG5GxaCX8zqURz9IM9Hgak+ILItX+aChmNqj7ypzEnf4aJdi\n-----END PRIVATE KEY-----\n",
];

/// One of the issuer's keys.
pub struct IssuerKey {
    key: EncodingKey,
    header: Header,
    jwk: Jwk,
}

impl IssuerKey {
    /// The first or the second.
    pub fn number(number: usize) -> Self {
        let key = EncodingKey::from_ec_pem(PEMS[number].as_bytes()).expect("a key of ours");
        let mut jwk = Jwk::from_encoding_key(&key, Algorithm::ES256).expect("a key of ours");
        jwk.common.key_id = Some(jwk.thumbprint(ThumbprintHash::SHA256).expect("a key of ours"));
        jwk.common.public_key_use = Some(PublicKeyUse::Signature);
        let header = Header { kid: jwk.common.key_id.clone(), ..Header::new(Algorithm::ES256) };
        Self { key, header, jwk }
    }

    pub fn sign(&self, claims: &Value) -> String {
        jsonwebtoken::encode(&self.header, claims, &self.key).expect("claims are JSON")
    }

    /// For this subject, until `exp`.
    pub fn token(&self, subject: &str, exp: i64) -> String {
        self.sign(&serde_json::json!({ "iss": ISSUER, "aud": AUDIENCE, "sub": subject, "exp": exp, "preferred_username": subject }))
    }

    pub fn jwks(&self) -> JwkSet {
        JwkSet { keys: vec![self.jwk.clone()] }
    }
}

/// How the issuer's tokens are checked.
pub fn issuer() -> ForeignIssuer {
    ForeignIssuer { issuer: ISSUER.into(), audience: AUDIENCE.into(), algorithm: ForeignAlgorithm::ES256 }
}

/// As `api` tells it to gateways.
pub fn published(key: &IssuerKey) -> ForeignKeysAnswer {
    ForeignKeysAnswer { issuer: issuer(), jwks: Some(key.jwks()) }
}
