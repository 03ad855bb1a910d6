//! Usernames of users from providers and external issuers.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::Utc;
use serde_json::{Value, json};
use sqlx::PgPool;
use testkit::issuer::{AUDIENCE, ISSUER, IssuerKey, TestIssuer};

use crate::{
    external::start,
    providers::{CLIENT_ID, Fake, LoginBrowser, Say, code_in, oidc_at, ours, parameter},
    support::{App, ORIGIN},
};

/// Names that look like `john`, `José` or nothing, and their normal form.
const ALIKE: [(&str, &str); 8] = [
    ("john", "john"),
    ("john\u{fe0f}", "john-2"),
    ("jo\u{34f}hn", "john-3"),
    ("\u{3164}", "user"),
    ("\u{2800}", "user-2"),
    ("Jose\u{301}", "Jos\u{e9}"),
    ("Jos\u{e9}", "Jos\u{e9}-2"),
    ("خانه\u{200c}ها", "خانه\u{200c}ها"),
];

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn external_name_cannot_look_like_another(pool: PgPool) {
    let key = IssuerKey::number(0);
    let issuer = TestIssuer::start(Some(&key));
    let app = start(&pool, &issuer).await;
    for (number, (name, shown)) in ALIKE.into_iter().enumerate() {
        let claims = json!({
            "iss": ISSUER, "aud": AUDIENCE, "sub": number.to_string(), "preferred_username": name,
            "exp": Utc::now().timestamp() + 600,
        });
        let me = app.get("/api/auth_user").bearer(&key.sign(&claims)).expect(200).await.json();
        assert_eq!(me["username"], shown, "{name:?}");
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn every_legal_form_of_an_issuer_is_accepted(pool: PgPool) {
    let key = IssuerKey::number(0);
    let issuer = TestIssuer::start(None);
    // One entry is malformed, one of an unknown kind, and ours has no name.
    let mut own = serde_json::to_value(&key.jwks().keys[0]).unwrap();
    own.as_object_mut().unwrap().remove("kid");
    issuer
        .publish_json(json!({ "keys": [{ "kty": "RSA", "n": 5 }, { "kty": "new" }, { "use": 5 }, 7, own] }));
    let app = start(&pool, &issuer).await;
    let now = Utc::now().timestamp() as f64;
    let claims = json!({
        "iss": ISSUER, "aud": [AUDIENCE, "another"], "sub": 42, "preferred_username": 5, "name": "Jane", "picture": {},
        "iat": now - 0.5, "nbf": now - 0.5, "exp": now + 600.5,
    });
    for token in [key.sign(&claims), key.sign_nameless(&claims)] {
        let me = app.get("/api/auth_user").bearer(&token).expect(200).await.json();
        assert_eq!((&me["username"], &me["avatarURL"]), (&json!("Jane"), &Value::Null));
    }
    let refused = app.get("/api/auth_user").bearer(&key.sign_critical(&claims)).send().await.unwrap();
    assert_eq!(refused.status, 401);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn name_comes_from_the_id_token_if_userinfo_has_none(pool: PgPool) {
    let fake = Fake::start().await;
    let app = App::with_providers(&pool, [oidc_at(&fake.url)]).await;
    fake.say("/me", Say::Json(200, json!({ "sub": "1" })));
    let mut browser = LoginBrowser::default();
    let there = browser.follow(&app, ours("/api/oauth/oidc"), |url| !url.as_str().starts_with(ORIGIN)).await;
    let claims = json!({
        "iss": fake.url, "sub": "1", "aud": CLIENT_ID, "exp": Utc::now().timestamp() as f64 + 600.5,
        "nonce": parameter(&there, "nonce"), "unique_name": "CORP\\jose\u{301}", "upn": "jose@corp.example",
    });
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let id_token = format!("{}.{}.c2ln", part(&json!({ "alg": "RS256" })), part(&claims));
    let answer = json!({ "access_token": "a secret", "token_type": "Bearer", "id_token": id_token });
    fake.say("/token", Say::Json(200, answer));
    let state = parameter(&there, "state").unwrap();
    let callback = ours(&format!("/api/oauth/oidc/callback?code=x&state={state}"));
    let code = code_in(&browser.finish(&app, callback).await);
    let me = browser.exchange(&app, &code).await.json();
    assert_eq!(me["authUser"]["username"], "CORP\\jos\u{e9}");
    app.stop().await;
}
