//! Users of the external issuer, made and changed by the back end that has their accounts.

use api::config::{Config, ExternalSettings, RateLimits};
use chrono::Utc;
use futures_util::future::join_all;
use protocol::claims::Audience;
use serde_json::{Value, json};
use service_kit::limiter::Limit;
use sqlx::PgPool;
use testkit::{
    PATIENCE,
    http::{Answer, Call},
    issuer::{self, ISSUER, IssuerKey, TestIssuer},
};

use crate::{
    services::create,
    support::{
        App, LISTED, ORIGIN_NOT_ALLOWED, add_users, assert_problem, assert_unacceptable, keys, number, text,
    },
};

struct Host {
    app: App,
    token: String,
}

impl Host {
    async fn start(pool: &PgPool) -> Self {
        Self::with(pool, |config| config.external_issuer = Some(ISSUER.into())).await
    }

    async fn with(pool: &PgPool, change: impl FnOnce(&mut Config)) -> Self {
        let app = App::with(pool, change).await;
        Self { app, token: create(pool, "shop", "users") }
    }

    /// `subject` as it stands in the path.
    fn put(&self, subject: &str, body: &Value) -> Call {
        let path = format!("/api/users/by_subject/{subject}");
        self.app.call("PUT", &path).bearer(&self.token).json(body)
    }

    fn stream_token(&self, subject: &str) -> Call {
        self.app.post(&format!("/api/users/by_subject/{subject}/stream_token")).bearer(&self.token)
    }

    /// The id of a new user.
    async fn user(&self, subject: &str, username: &str) -> String {
        text(&self.put(subject, &json!({ "username": username })).expect(201).await.json()["id"])
    }
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn host_makes_users_and_changes_what_it_gives(pool: PgPool) {
    let host = Host::start(&pool).await;
    let avatar = "https://a.example/1";
    for (subject, body, status, username, avatar_url) in [
        ("s1", json!({ "username": " Jane \t Doe " }), 201, "Jane Doe", json!(null)),
        ("s1", json!({}), 200, "Jane Doe", json!(null)),
        ("s1", json!({ "avatarURL": avatar, "sharesPresence": false }), 200, "Jane Doe", json!(avatar)),
        ("s1", json!({ "username": null }), 200, "Jane Doe", json!(avatar)),
        // Not only where USERNAMES_CHANGE lets users do so.
        ("s1", json!({ "username": "Mary" }), 200, "Mary", json!(avatar)),
        ("s1", json!({ "avatarURL": null }), 200, "Mary", json!(null)),
        ("s2", json!({ "username": "Jane Doe", "avatarURL": avatar }), 201, "Jane Doe", json!(avatar)),
    ] {
        let answer = host.put(subject, &body).expect(status).await.json();
        assert_eq!((&answer["username"], &answer["avatarURL"]), (&json!(username), &avatar_url), "{body}");
    }
    // Without a name, one that nobody else has.
    let mut names = Vec::new();
    for subject in ["n1", "n2"] {
        let made = host.put(subject, &json!({})).expect(201).await.json();
        let name = text(&made["username"]);
        assert!(name.starts_with("user-") && name.len() == 15, "{name}");
        assert_eq!(host.put(subject, &json!({})).expect(200).await.json(), made);
        names.push(name);
    }
    assert_ne!(names[0], names[1]);
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.users WHERE shares_presence").await, 4);
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn subject_is_percent_encoded_in_the_path(pool: PgPool) {
    let host = Host::start(&pool).await;
    let (longest, too_long) = ("%C3%A9".repeat(127) + "x", "%C3%A9".repeat(128));
    for (path, subject) in [
        ("auth0%7C1", "auth0|1"),
        ("auth0|2", "auth0|2"),
        ("a%2Fb%3Fc%23d%25e", "a/b?c#d%e"),
        ("%F0%9F%98%80", "\u{1f600}"),
        ("a+b%20c", "a+b c"),
        ("100%", "100%"),
        (&longest, &("\u{e9}".repeat(127) + "x")),
    ] {
        let made = host.put(path, &json!({})).expect(201).await.json();
        let stored: (String, i64) = sqlx::query_as(
            "SELECT subject, user_id FROM messenger.identities WHERE issuer = $1 ORDER BY user_id DESC",
        )
        .bind(ISSUER)
        .fetch_one(&pool)
        .await
        .unwrap();
        assert_eq!((stored.0.as_str(), stored.1.to_string()), (subject, text(&made["id"])), "{path}");
        host.stream_token(path).expect(200).await;
    }
    let sentence = "The subject must be UTF-8, percent-encoded, without NUL, 255 bytes max";
    for path in ["a%00b", "%ff", "%C3", &too_long, &"x".repeat(256)] {
        assert_unacceptable(&host.put(path, &json!({})).send().await.unwrap(), "subject", sentence);
        assert_unacceptable(&host.stream_token(path).send().await.unwrap(), "subject", sentence);
    }
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn unacceptable_users_are_not_made(pool: PgPool) {
    let host = Host::start(&pool).await;
    add_users(&pool, ["john"]).await;
    host.user("jane", "jane").await;
    let avatar = "Avatar must be an http or https URL, 2048 max";
    for (body, field, sentence) in [
        (json!({ "username": "" }), "username", "Username required"),
        (json!({ "username": "\u{200b}" }), "username", "Username required"),
        (json!({ "username": "x".repeat(65) }), "username", "Username too long. 64 max"),
        (json!({ "username": "john" }), "username", "Username taken"),
        (json!({ "username": " jo\u{200b}hn " }), "username", "Username taken"),
        (json!({ "username": "new", "avatarURL": "javascript:alert(1)" }), "avatarURL", avatar),
        (json!({ "username": "new", "avatarURL": "https://u:p@a.example/" }), "avatarURL", avatar),
    ] {
        for subject in ["jane", "mary"] {
            let answer = host.put(subject, &body).send().await.unwrap();
            assert_unacceptable(&answer, field, sentence);
        }
    }
    for body in [json!([]), json!({ "username": 7 }), json!({ "avatarURL": false })] {
        host.put("mary", &body).expect(400).await;
    }
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.users").await, 2);
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.identities").await, 1);
    assert_eq!(host.put("jane", &json!({})).expect(200).await.json()["username"], "jane");
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn users_are_made_by_service_tokens_with_the_scope_alone(pool: PgPool) {
    let host = Host::start(&pool).await;
    let john = host.app.user(&pool, "john").await;
    let gone = host.app.login("john").await;
    gone.call("POST", "/api/logout").expect(204).await;
    let lacking = create(&pool, "other", "publish,admin");
    let (put, post) = ("/api/users/by_subject/s", "/api/users/by_subject/s/stream_token");
    let body = json!({ "username": 7 });
    for (method, path) in [("PUT", put), ("POST", post)] {
        let call = |token: &str| host.app.call(method, path).json(&body).bearer(token);
        for (token, status, code) in [
            (john.token.as_str(), 403, "service_token_required"),
            (&lacking, 403, "scope_required"),
            (&gone.token, 401, "unauthorized"),
            (&format!("msk_{}", "A".repeat(43)), 401, "unauthorized"),
            ("bad", 401, "unauthorized"),
        ] {
            let answer = call(token).send().await.unwrap();
            assert_eq!((answer.status, &answer.json()["code"]), (status, &json!(code)), "{method} {token}");
        }
        let by_cookie = |origin: &str| {
            host.app.call(method, path).json(&body).header("cookie", &john.cookie).header("origin", origin)
        };
        let evil = by_cookie("http://evil.example").send().await.unwrap();
        assert_problem(&evil, 403, ORIGIN_NOT_ALLOWED);
        assert_eq!(by_cookie(LISTED).send().await.unwrap().json()["code"], "service_token_required");
        assert_problem(&host.app.call(method, path).json(&body).send().await.unwrap(), 401, "Unauthorized");
        for other in ["GET", "PATCH", "DELETE"] {
            let answer = host.app.call(other, path).bearer("bad").send().await.unwrap();
            assert_eq!((answer.status, answer.header("allow")), (405, Some(method)));
        }
    }
    // 415 before 401, 401 before 413.
    let send = async |content_type: &str, token: &str| {
        let call = host.app.call("PUT", put).header("content-type", content_type).bearer(token);
        call.body("x".repeat(17 * 1024)).send().await.unwrap().status
    };
    assert_eq!(send("text/plain", "bad").await, 415);
    assert_eq!(send("application/json", "bad").await, 401);
    assert_eq!(send("application/json", &host.token).await, 413);
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.users").await, 1);
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn each_service_token_has_a_limit_of_its_own(pool: PgPool) {
    let limits =
        RateLimits { requests_per_service: Limit::new(2, PATIENCE), patience: PATIENCE, ..RateLimits::OFF };
    let host = Host::with(&pool, |config| {
        config.external_issuer = Some(ISSUER.into());
        config.limits = limits;
    })
    .await;
    host.user("s", "jane").await;
    // It precedes the body and the user.
    host.stream_token("unknown").expect(404).await;
    for call in [host.stream_token("s"), host.put("s", &json!([]))] {
        let answer = call.send().await.unwrap();
        assert_eq!((answer.status, answer.header("retry-after").is_some()), (429, true));
    }
    let other = Host { token: create(&pool, "other", "users"), ..host };
    other.stream_token("s").expect(200).await;
    other.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn without_an_external_issuer_there_are_no_subjects(pool: PgPool) {
    let host = Host::with(&pool, |_| {}).await;
    for call in [host.put("s", &json!({})), host.stream_token("s")] {
        let answer = call.send().await.unwrap();
        assert_problem(&answer, 404, "There are no subjects here: EXTERNAL_ISSUER is not set");
        assert_eq!(answer.json()["code"], "no_external_issuer");
    }
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn partners_receive_what_the_host_changes(pool: PgPool) {
    let host = Host::start(&pool).await;
    let john = host.app.user(&pool, "john").await;
    let jane = host.user("jane", "jane").await;
    let group = john.group("Team", &["jane"]).await;
    for body in [
        json!({ "username": "Jane" }),
        json!({ "username": "Jane" }),
        json!({ "avatarURL": "https://a.example/" }),
    ] {
        host.put("jane", &body).expect(200).await;
    }
    let told = host.app.feed(john.id).await.into_iter().filter(|(name, _)| name == "user.updated");
    let now = json!({ "id": jane, "username": "Jane", "avatarURL": "https://a.example/" });
    assert_eq!(told.map(|(_, data)| data).collect::<Vec<_>>(), [now.clone(), now.clone()]);
    let members = john.participants(&group, "").expect(200).await.json();
    assert_eq!(members[1]["user"], now);
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn of_many_requests_for_a_subject_one_makes_the_user(pool: PgPool) {
    let host = Host::start(&pool).await;
    let bodies = [json!({}), json!({ "username": "jane" }), json!({ "username": "mary" })];
    let calls =
        (0..24).map(|nth| host.put(if nth % 8 == 7 { "other" } else { "s" }, &bodies[nth % 3]).send());
    let answers: Vec<Answer> = join_all(calls).await.into_iter().map(Result::unwrap).collect();
    let count = |status| answers.iter().filter(|answer| answer.status == status).count();
    assert_eq!(count(201), 2, "one for each subject");
    assert_eq!(count(200) + count(201) + count(422), 24);
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.users").await, 2);
    assert_eq!(number(&pool, "SELECT count(DISTINCT user_id) FROM messenger.identities").await, 2);
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn stream_token_of_the_host_is_a_session_of_a_day(pool: PgPool) {
    let key = IssuerKey::number(0);
    let issuer = TestIssuer::start(Some(&key));
    let settings = ExternalSettings { issuer: issuer::issuer(), jwks_url: issuer.url() };
    let host = Host::with(&pool, |config| {
        config.external_issuer = Some(ISSUER.into());
        config.external = Some(settings);
    })
    .await;
    let answer = host.stream_token("jane").send().await.unwrap();
    assert_problem(&answer, 404, "User not found");
    let jane = host.user("jane", "jane").await;

    let answer = host.stream_token("jane").expect(200).await.json();
    let token = text(&answer["token"]);
    let claims = keys().verifier().verify(&token, &[Audience::Stream]).unwrap();
    let now = Utc::now().timestamp();
    assert_eq!(claims.sub.to_string(), jane);
    assert!((now + 50..=now + 60).contains(&claims.exp), "it opens streams for a minute");
    let day = 24 * 60 * 60;
    assert!((now + day - 60..=now + day).contains(&claims.session_exp.unwrap()));
    // It is good for nothing else.
    let rest = host.app.get("/api/auth_user").bearer(&token).send().await.unwrap();
    assert_problem(&rest, 401, "Unauthorized");

    // The same user as by a token of the issuer, who sees the session and can end it.
    let own = key.token("jane", now + 600);
    assert_eq!(host.app.get("/api/auth_user").bearer(&own).expect(200).await.json()["id"], jane);
    host.stream_token("jane").expect(200).await;
    let sessions = host.app.get("/api/sessions").bearer(&own).expect(200).await.json();
    let sessions: Vec<_> =
        sessions.as_array().unwrap().iter().map(|one| (&one["device"], text(&one["id"]))).collect();
    assert_eq!(sessions.len(), 2, "each call is a session of its own");
    assert!(sessions.iter().all(|(device, _)| **device == json!("shop")));
    assert!(sessions.iter().any(|(_, id)| *id == claims.sid.unwrap().to_string()));
    host.app.stop().await;
}
