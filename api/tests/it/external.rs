//! Tokens of an external issuer, whose keys come from a server that can fail.

use api::config::ExternalSettings;
use chrono::Utc;
use futures_util::future::join_all;
use protocol::{
    claims::Audience,
    feed::{IDENTITY_PATH, Identity, IdentityAnswer, IdentityRequest, KEYS_PATH, KeysAnswer, authorization},
};
use serde_json::json;
use sqlx::PgPool;
use testkit::{
    http::Answer,
    issuer::{self, AUDIENCE, ISSUER, IssuerKey, TestIssuer},
    until,
};

use crate::support::{App, ORIGIN, SECRET, assert_problem, execute, keys, number, once_not_busy, text};

/// A service that trusts this issuer.
pub(crate) async fn start(pool: &PgPool, issuer: &TestIssuer) -> App {
    let settings = ExternalSettings { issuer: issuer::issuer(), jwks_url: issuer.url() };
    App::with(pool, |config| config.external = Some(settings)).await
}

fn soon() -> i64 {
    Utc::now().timestamp() + 600
}

impl App {
    async fn whoami(&self, token: &str) -> Answer {
        self.get("/api/auth_user").bearer(token).send().await.unwrap()
    }
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn external_token_creates_its_user_and_works_everywhere(pool: PgPool) {
    let key = IssuerKey::number(0);
    let issuer = TestIssuer::start(Some(&key));
    let (app, replica) = tokio::join!(start(&pool, &issuer), start(&pool, &issuer));
    let john = app.user(&pool, "john").await;
    let token = key.token("jane", soon());
    // Twenty simultaneous first uses over two replicas.
    let answers = join_all((0..20).map(|number| {
        let app = if number % 2 == 0 { &app } else { &replica };
        once_not_busy(|| app.get("/api/auth_user").bearer(&token))
    }))
    .await;
    let me = answers[0].json();
    assert_eq!(me["username"], "jane");
    for answer in &answers {
        assert_eq!((answer.status, answer.json()), (200, me.clone()));
    }
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.users").await, 2);

    let conversation = john.start("jane").await;
    john.say(&conversation, "hello").await;
    let messages = format!("/api/conversations/{conversation}/messages");
    let page = app.call("GET", &messages).bearer(&token).expect(200).await.json();
    assert_eq!(page[0]["content"], "hello");
    assert_eq!(page[0]["mine"], false);
    let sent = app.call("POST", &messages).bearer(&token).json(&json!({ "content": "hi" })).expect(201).await;
    assert_eq!(sent.json()["mine"], true);
    app.call("POST", &format!("/api/conversations/{conversation}/read_messages"))
        .bearer(&token)
        .expect(204)
        .await;
    let names: Vec<_> = app.feed(text(&me["id"]).parse().unwrap()).await;
    let names: Vec<_> = names.iter().map(|(name, _)| name.as_str()).collect();
    let expected =
        ["conversation.created", "message", "conversation.read", "message.sent", "conversation.read"];
    assert_eq!(names, expected);

    // A stream token's stream ends with the external token.
    let exp = soon();
    let stream =
        app.call("POST", "/api/stream_token").bearer(&key.token("jane", exp)).expect(200).await.json();
    let claims = keys().verifier().verify(stream["token"].as_str().unwrap(), &[Audience::Stream]).unwrap();
    assert_eq!((json!(claims.sub), claims.sid, claims.session_exp), (me["id"].clone(), None, Some(exp)));

    // Without a session there is nothing to refresh.
    let refreshed = app.call("POST", "/api/refresh_token").bearer(&token).send().await.unwrap();
    assert_problem(&refreshed, 401, "Unauthorized");

    // The same name is another user.
    let other = key.sign(&json!({
        "iss": ISSUER, "aud": AUDIENCE, "sub": "another", "exp": soon(), "preferred_username": "john",
    }));
    let other = app.whoami(&other).await.json();
    assert_eq!(other["username"], "john-2");
    assert_ne!(other["id"], json!(john.id));
    app.stop().await;
    replica.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn external_token_has_no_session_to_list_or_end(pool: PgPool) {
    let key = IssuerKey::number(0);
    let issuer = TestIssuer::start(Some(&key));
    let app = start(&pool, &issuer).await;
    let token = key.token("jane", soon());
    app.whoami(&token).await;
    let phone = app.login("jane").await;
    let listed = app.call("GET", "/api/sessions").bearer(&token).expect(200).await.json();
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(listed[0]["current"], false);
    let answer = app.call("POST", "/api/logout").bearer(&token).expect(204).await;
    assert!(answer.header("set-cookie").is_some_and(|cookie| cookie.contains("Max-Age=0")));
    phone.auth_user().expect(200).await;
    assert_eq!(app.whoami(&token).await.status, 200);
    app.call("DELETE", "/api/sessions").bearer(&token).expect(204).await;
    assert_problem(&phone.auth_user().send().await.unwrap(), 401, "Unauthorized");
    app.call("DELETE", "/api/sessions").bearer(&token).expect(204).await;
    let one = format!("/api/sessions/{}", text(&listed[0]["id"]));
    assert_problem(&app.call("DELETE", &one).bearer(&token).send().await.unwrap(), 404, "Not found");
    assert_eq!(app.call("GET", "/api/sessions").bearer(&token).expect(200).await.json(), json!([]));
    assert_eq!(app.whoami(&token).await.status, 200);

    // A deleted user's token is rejected for a while, then creates a new user.
    execute(&pool, "DELETE FROM messenger.users").await;
    for (method, path) in [("GET", "/api/auth_user"), ("POST", "/api/stream_token"), ("POST", "/api/logout")]
    {
        let answer = app.call(method, path).bearer(&token).send().await.unwrap();
        assert_problem(&answer, 401, "Unauthorized");
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn external_picture_is_updated_missing_claims_change_nothing(pool: PgPool) {
    let key = IssuerKey::number(0);
    let issuer = TestIssuer::start(Some(&key));
    let app = start(&pool, &issuer).await;
    let claims = json!({ "iss": ISSUER, "aud": AUDIENCE, "sub": "s", "exp": soon(), "name": "Jane D." });
    let with = |picture: &str| {
        let mut claims = claims.clone();
        claims["picture"] = picture.into();
        key.sign(&claims)
    };
    let me = app.whoami(&with("https://pictures.example/1")).await.json();
    assert_eq!(
        (&me["username"], &me["avatarURL"]),
        (&json!("Jane D."), &json!("https://pictures.example/1"))
    );
    app.stop().await;
    // Another replica, with an empty cache.
    let app = start(&pool, &issuer).await;
    let picture = async |token: &str| app.whoami(token).await.json()["avatarURL"].clone();
    assert_eq!(picture(&key.sign(&claims)).await, "https://pictures.example/1");
    app.stop().await;
    let app = start(&pool, &issuer).await;
    let me = app.whoami(&with("https://pictures.example/2")).await.json();
    assert_eq!(me["avatarURL"], "https://pictures.example/2");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn tokens_not_exactly_of_the_issuer_are_rejected(pool: PgPool) {
    let key = IssuerKey::number(0);
    let issuer = TestIssuer::start(Some(&key));
    let app = start(&pool, &issuer).await;
    let john = app.user(&pool, "john").await;
    let claims = |iss: &str, aud: &str, exp: i64| json!({ "iss": iss, "aud": aud, "sub": "s", "exp": exp });
    for bad in [
        key.sign(&claims("https://other.example", AUDIENCE, soon())),
        key.sign(&claims(ISSUER, "another", soon())),
        key.sign(&claims(ISSUER, AUDIENCE, Utc::now().timestamp() - 1)),
        IssuerKey::number(1).sign(&claims(ISSUER, AUDIENCE, soon())),
        // Our claims, signed by the issuer's key.
        key.sign(&claims(ORIGIN, "api", soon())),
        // The issuer's claims, signed by our key.
        john.forge(|claims| claims.iss = ISSUER.into()),
        // One of ours without a session.
        john.forge(|claims| claims.sid = None),
        john.forge(|claims| (claims.sid, claims.aud) = (None, Audience::Stream)),
    ] {
        assert_problem(&app.whoami(&bad).await, 401, "Unauthorized");
    }
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.users").await, 1, "no user was created");
    app.stop().await;

    let app = App::start(&pool).await;
    assert_problem(&app.whoami(&key.token("s", soon())).await, 401, "Unauthorized");
    let request = IdentityRequest::default();
    assert_problem(&app.internal(IDENTITY_PATH, &request).send().await.unwrap(), 404, "Not found");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn unreachable_issuer_makes_no_token_invalid(pool: PgPool) {
    let key = IssuerKey::number(0);
    let issuer = TestIssuer::start(None);
    let app = start(&pool, &issuer).await;
    let john = app.user(&pool, "john").await;
    let token = key.token("jane", soon());
    let answer = app.whoami(&token).await;
    assert_problem(&answer, 503, "Service unavailable, try again soon");
    assert_eq!(answer.header("retry-after"), Some("5"));
    john.auth_user().expect(200).await;
    issuer.publish(&key);
    until("the issuer's keys are available", || async { app.whoami(&token).await.status == 200 }).await;

    // A new key is fetched once; unknown keys put no load on the issuer.
    let before = issuer.requests();
    let rotated = IssuerKey::number(1);
    issuer.publish(&rotated);
    let token = rotated.token("jane", soon());
    // After a failed fetch there is none for a few seconds: still 503.
    until("the new key is fetched", || async {
        let status = app.whoami(&token).await.status;
        assert!([200, 503].contains(&status), "{status}");
        status == 200
    })
    .await;
    assert_eq!(issuer.requests(), before + 1);
    for _ in 0..20 {
        assert_eq!(app.whoami(&key.token("jane", soon())).await.status, 401);
    }
    assert_eq!(issuer.requests(), before + 1);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn gateways_get_the_issuers_keys_and_users_of_subjects(pool: PgPool) {
    let key = IssuerKey::number(0);
    let issuer = TestIssuer::start(Some(&key));
    let app = start(&pool, &issuer).await;
    let keys = |query: &str| app.client.get(format!("{}{KEYS_PATH}{query}", app.internal));
    assert_problem(&keys("").send().await.unwrap(), 401, "Unauthorized");
    let authorized = async |query: &str| {
        let answer = keys(query).header("authorization", &authorization(SECRET)).expect(200).await;
        serde_json::from_value::<KeysAnswer>(answer.json()).unwrap()
    };
    let keys = authorized("").await;
    assert!(!keys.own.keys.is_empty());
    let external = keys.external.unwrap();
    assert_eq!((external.issuer.issuer.as_str(), external.issuer.audience.as_str()), (ISSUER, AUDIENCE));
    assert_eq!(external.jwks.unwrap(), key.jwks());
    // A gateway's unknown key makes api fetch.
    let rotated = IssuerKey::number(1);
    issuer.publish(&rotated);
    let kid = rotated.jwks().keys[0].common.key_id.clone().unwrap();
    assert_eq!(authorized(&format!("?kid={kid}")).await.external.unwrap().jwks.unwrap(), rotated.jwks());

    let identity = |subject: &str| Identity { subject: subject.into(), username: None, picture: None };
    let identities = (0..50).map(|number| identity(&format!("s{}", number % 30))).collect();
    let request = IdentityRequest { identities };
    let identify = async || {
        let answer = app.internal(IDENTITY_PATH, &request).expect(200).await.json();
        serde_json::from_value::<IdentityAnswer>(answer).unwrap().users
    };
    let users = identify().await;
    assert_eq!(users.len(), 50);
    assert_eq!(users[..20], users[30..]);
    assert_eq!(identify().await, users);
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.users").await, 30);
    let many = IdentityRequest { identities: vec![identity("x"); 1_001] };
    assert_eq!(app.internal(IDENTITY_PATH, &many).send().await.unwrap().status, 400);
    app.stop().await;
}
