//! An external issuer of tokens, for tests: signs with ES256, can rotate its key, and publishes its keys at an address, or
//! fails to.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use http::StatusCode;
use jsonwebtoken::{
    Algorithm, EncodingKey, Header,
    jwk::{Jwk, JwkSet, PublicKeyUse, ThumbprintHash},
};
use serde_json::{Value, json};
use tokio_util::sync::DropGuard;
use warp::Filter;

use crate::http::serve;
use protocol::{
    external::{ExternalAlgorithm, ExternalIssuer},
    feed::ExternalKeysAnswer,
};

pub const ISSUER: &str = "https://login.example";
pub const AUDIENCE: &str = "messenger";

const PEMS: [&str; 2] = [
    "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgEd0BkH8/c6une+o+\ne0Vpe7/MQCJEpPmIq3mbXHaPWHehRANCAARWmEsyO0F537Tequa9SEJUaVXbwTCE\n5zgW/nTDaESisKM8az+enzTbSKjQpJOCMrkI0d/AJVyqt1E1kJX8KMSw\n-----END PRIVATE KEY-----\n",
    "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgez+AupqlvaS3PmQ2\nZp4y7IFlXXIMCqf9LgrU9++7bFehRANCAARzOxiQtqjQXMHm1qpP5Eatqki1LRP8\n8treYOnIWG5GxaCX8zqURz9IM9Hgak+ILItX+aChmNqj7ypzEnf4aJdi\n-----END PRIVATE KEY-----\n",
];

pub struct IssuerKey {
    key: EncodingKey,
    header: Header,
    jwk: Jwk,
}

impl IssuerKey {
    pub fn number(number: usize) -> Self {
        let key = EncodingKey::from_ec_pem(PEMS[number].as_bytes()).expect("a key of ours");
        let mut jwk = Jwk::from_encoding_key(&key, Algorithm::ES256).expect("a key of ours");
        jwk.common.key_id = Some(jwk.thumbprint(ThumbprintHash::SHA256).expect("a key of ours"));
        jwk.common.public_key_use = Some(PublicKeyUse::Signature);
        let header = Header { kid: jwk.common.key_id.clone(), ..Header::new(Algorithm::ES256) };
        Self { key, header, jwk }
    }

    pub fn sign(&self, claims: &Value) -> String {
        self.sign_with(&self.header, claims)
    }

    pub fn sign_nameless(&self, claims: &Value) -> String {
        self.sign_with(&Header { kid: None, ..self.header.clone() }, claims)
    }

    pub fn sign_critical(&self, claims: &Value) -> String {
        let crit = Some(vec!["https://login.example/x".into()]);
        self.sign_with(&Header { crit, ..self.header.clone() }, claims)
    }

    fn sign_with(&self, header: &Header, claims: &Value) -> String {
        jsonwebtoken::encode(header, claims, &self.key).expect("claims are JSON")
    }

    pub fn token(&self, subject: &str, exp: i64) -> String {
        self.sign(&json!({ "iss": ISSUER, "aud": AUDIENCE, "sub": subject, "exp": exp, "preferred_username": subject }))
    }

    pub fn jwks(&self) -> JwkSet {
        JwkSet { keys: vec![self.jwk.clone()] }
    }
}

pub fn issuer() -> ExternalIssuer {
    ExternalIssuer { issuer: ISSUER.into(), audience: AUDIENCE.into(), algorithm: ExternalAlgorithm::ES256 }
}

/// As `api` publishes it to gateways.
pub fn published(key: &IssuerKey) -> ExternalKeysAnswer {
    ExternalKeysAnswer { issuer: issuer(), jwks: Some(key.jwks()) }
}

pub struct TestIssuer {
    address: SocketAddr,
    /// None: it answers 503.
    keys: Arc<Mutex<Option<Value>>>,
    requests: Arc<AtomicUsize>,
    _stop: DropGuard,
}

impl TestIssuer {
    pub fn start(keys: Option<&IssuerKey>) -> Self {
        let published = Arc::new(Mutex::new(keys.map(|key| json!(key.jwks()))));
        let requests = Arc::new(AtomicUsize::new(0));
        let routes = warp::path("jwks").map({
            let (published, requests) = (published.clone(), requests.clone());
            move || {
                requests.fetch_add(1, Ordering::Relaxed);
                let keys = published.lock().expect("no holder panics").clone();
                let status = if keys.is_some() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
                warp::reply::with_status(warp::reply::json(&keys), status)
            }
        });
        let (address, stop) = serve(routes.boxed());
        Self { address, keys: published, requests, _stop: stop }
    }

    pub fn url(&self) -> String {
        format!("http://{}/jwks", self.address)
    }

    pub fn publish(&self, key: &IssuerKey) {
        self.publish_json(json!(key.jwks()));
    }

    pub fn publish_json(&self, keys: Value) {
        *self.keys.lock().expect("no holder panics") = Some(keys);
    }

    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }
}
