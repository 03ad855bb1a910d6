//! Tokens of an external issuer: what is accepted, and what is not.

use chrono::Utc;
use jsonwebtoken::{
    Algorithm,
    jwk::{JwkSet, KeyOperations, PublicKeyUse},
};
use protocol::{
    claims::TokenError,
    external::{ExternalAlgorithm, ExternalIssuer, ExternalKeys, KEYS_TRIED, issuer_of},
};
use serde_json::json;
use testkit::issuer::{AUDIENCE, ISSUER, IssuerKey, issuer};

const FAR: i64 = 4_000_000_000;

fn keys() -> ExternalKeys {
    ExternalKeys::from_jwks(&issuer(), &IssuerKey::number(0).jwks())
}

#[test]
fn external_token_names_its_subject_until_it_expires() {
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
fn keys_for_other_algorithms_are_skipped() {
    let jwks = IssuerKey::number(0).jwks();
    for algorithm in [ExternalAlgorithm::RS256, ExternalAlgorithm::ES384, ExternalAlgorithm::EdDSA] {
        assert!(ExternalKeys::from_jwks(&ExternalIssuer { algorithm, ..issuer() }, &jwks).is_empty());
    }
    let mut signs = jwks.clone();
    signs.keys[0].common.public_key_use = None;
    signs.keys[0].common.key_operations = Some(vec![KeyOperations::Encrypt]);
    assert!(ExternalKeys::from_jwks(&issuer(), &signs).is_empty());
    let mut encrypts = jwks;
    encrypts.keys[0].common.public_key_use = Some(PublicKeyUse::Encryption);
    assert!(ExternalKeys::from_jwks(&issuer(), &encrypts).is_empty());
    let kid = IssuerKey::number(0).jwks().keys[0].common.key_id.clone().unwrap();
    let token = IssuerKey::number(0).token("s", FAR);
    for key in [
        r#""kty":"EC","crv":"P-256","x":"AA","y":"AA""#,
        r#""kty":"EC","crv":"P-256","x":"","y":"""#,
        r#""kty":"oct","k":"AAAA""#,
        r#""kty":"new","z":"AAAA""#,
    ] {
        let jwks = serde_json::from_str(&format!(r#"{{"keys":[{{{key},"kid":"{kid}"}}]}}"#)).unwrap();
        assert!(ExternalKeys::from_jwks(&issuer(), &jwks).verify(&token).is_err(), "{key}");
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
fn keys_and_tokens_may_lack_a_kid() {
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
        assert!(ExternalKeys::from_jwks(&issuer(), jwks).verify(&token).is_ok());
    }
    // Signed by a key that is not there yet: newer ones are asked for.
    for token in [second.sign_nameless(&good), second.sign(&good)] {
        assert_eq!(keys().verify(&token), Err(TokenError::UnknownKey));
    }
    // As many keys are tried as are promised, and no more.
    let mut many = JwkSet { keys: vec![first.jwks().keys[0].clone(); KEYS_TRIED] };
    many.keys.push(second.jwks().keys[0].clone());
    let many = ExternalKeys::from_jwks(&issuer(), &many);
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
    assert_eq!("RS256".parse::<ExternalAlgorithm>().unwrap(), ExternalAlgorithm::RS256);
    for bad in ["", "none", "HS256", "rs256"] {
        assert!(bad.parse::<ExternalAlgorithm>().is_err(), "{bad}");
    }
}
