//! The order of checks: 404 path / 405 → 415 → 401 → 403 → 429 (`limits`) → 413/400 → 422 → 404/403. A request that fails
//! several gets the first.

use sqlx::PgPool;

use crate::{
    raw,
    support::{App, ORIGIN, ORIGIN_NOT_ALLOWED, SECRET, assert_common_headers, assert_problem, execute},
};

const PATHS: &[(&str, &str)] = &[
    ("/api/login", "POST"),
    ("/api/login_options", "GET, HEAD"),
    ("/api/oauth/exchange", "POST"),
    ("/api/refresh_token", "POST"),
    ("/api/logout", "POST"),
    ("/api/sessions", "GET, HEAD, DELETE"),
    ("/api/sessions/{id}", "DELETE"),
    ("/api/stream_token", "POST"),
    ("/api/auth_user", "GET, HEAD, PATCH"),
    ("/api/users/by_subject/{id}", "PUT"),
    ("/api/users/by_subject/{id}/stream_token", "POST"),
    ("/api/events", "POST"),
    ("/api/users/{id}", "DELETE"),
    ("/api/users/{id}/export", "GET, HEAD"),
    ("/api/usernames", "GET, HEAD"),
    ("/api/blocks/{id}", "PUT, DELETE"),
    ("/api/conversations", "GET, HEAD, POST"),
    ("/api/conversations/{id}", "GET, HEAD, PATCH"),
    ("/api/conversations/{id}/participants", "GET, HEAD, POST"),
    ("/api/conversations/{id}/participants/{id}", "PATCH, DELETE"),
    ("/api/conversations/{id}/other_participant", "GET, HEAD"),
    ("/api/conversations/{id}/messages", "GET, HEAD, POST"),
    ("/api/conversations/{id}/messages/{id}", "PATCH, DELETE"),
    ("/api/conversations/{id}/read_messages", "POST"),
    ("/api/conversations/{id}/typing", "POST"),
    ("/api/openapi.json", "GET, HEAD"),
    ("/api/asyncapi.json", "GET, HEAD"),
    ("/.well-known/jwks.json", "GET, HEAD"),
];

const METHODS: &[&str] = &["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"];

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn known_path_with_another_method_is_405_with_allow(pool: PgPool) {
    let app = App::start(&pool).await;
    for (path, allow) in PATHS {
        for id in ["1", "no-id"] {
            let path = path.replace("{id}", id);
            for method in METHODS {
                // Wrong in every other way too.
                let call = app.call(method, &path).header("content-type", "text/plain").bearer("bad");
                let answer = call.send().await.unwrap();
                assert_common_headers(&answer);
                if allow.split(", ").any(|allowed| allowed == *method) {
                    assert_ne!(answer.status, 405, "{method} {path}");
                } else {
                    assert_eq!(answer.header("allow"), Some(*allow), "{method} {path}");
                    if *method != "HEAD" {
                        assert_problem(&answer, 405, "Method not allowed");
                    }
                    assert_eq!(answer.status, 405);
                }
            }
        }
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn unknown_path_is_404_whatever_else_is_wrong(pool: PgPool) {
    let app = App::start(&pool).await;
    for path in [
        "/api",
        "/api/",
        "/api/nothing",
        "/api/auth_user/x",
        "/api/conversations/1/nothing",
        "/api/conversations/1/messages/1/1",
        "/api//auth_user",
    ] {
        for method in METHODS {
            let call = app.call(method, path).header("content-type", "text/plain").bearer("bad");
            let answer = call.send().await.unwrap();
            assert_eq!(answer.status, 404, "{method} {path}");
            if *method != "HEAD" {
                assert_problem(&answer, 404, "Not found");
            }
        }
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn head_answers_the_head_of_get(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, _, conversation) = app.pair(&pool).await;
    john.say(&conversation, "hi").await;
    for (path, allow) in PATHS {
        // The export is for a service token, and has a test of its own.
        if !allow.contains("HEAD") || path.ends_with("/export") {
            continue;
        }
        let path = path.replace("{id}", &conversation) + "?search=j";
        let get = john.call("GET", &path).expect(200).await;
        let head = john.call("HEAD", &path).expect(200).await;
        assert!(head.body.is_empty());
        for name in ["content-type", "content-length"] {
            assert_eq!(head.header(name), get.header(name), "{path}");
        }
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn checks_run_in_the_contracts_order(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, _, conversation) = app.pair(&pool).await;
    let (revoked, gone) = (app.user(&pool, "revoked").await, app.user(&pool, "gone").await);
    revoked.set_session(&pool, "revoked_at = now()").await;
    execute(&pool, format!("DELETE FROM messenger.users WHERE id = {}", gone.id)).await;

    let huge = format!(r#"{{"content":"{}","username":"x"}}"#, "x".repeat(300 * 1024));
    let bodies = [
        ("huge", huge.as_str(), 413),
        ("not JSON", "{", 400),
        ("wrong shape", r#"{"content":1,"username":1}"#, 400),
        ("nothing said", "{}", 422),
    ];
    let messages = |id: &str| format!("/api/conversations/{id}/messages");
    let ours = ("origin", ORIGIN);
    let other_site = ("origin", "http://evil.example");
    for path in ["/api/conversations".to_owned(), messages(&conversation), messages("999"), messages("no-id")]
    {
        let post = async |content_type: &str, body: &str, more: &[(&str, &str)]| {
            raw::post(&app, &path, &[&[("content-type", content_type)], more].concat(), body).await
        };
        let bearer = |token: &str| format!("Bearer {token}");
        for (what, body, then) in bodies {
            // 415 before 401.
            for content_type in
                ["application", "text/plain", "application/jsonp", "application/x-www-form-urlencoded"]
            {
                let answer = post(content_type, body, &[("authorization", "Bearer bad")]).await;
                assert_problem(&answer, 415, "Content type of application/json required");
            }
            // 401 before 403 and the body, for every invalid credential.
            for token in ["bad", &revoked.token, &gone.token] {
                let answer = post("application/json", body, &[("authorization", &bearer(token))]).await;
                assert_problem(&answer, 401, "Unauthorized");
                let cookie = format!("messenger_session={token}");
                let answer = post("application/json", body, &[("cookie", &cookie), other_site]).await;
                assert_problem(&answer, 401, "Unauthorized");
            }
            let answer = post("application/json", body, &[("cookie", &john.cookie), other_site]).await;
            assert_problem(&answer, 403, ORIGIN_NOT_ALLOWED);
            // 413, 400, 422, all before 404.
            for content_type in ["application/json", "Application/JSON ; charset=utf-8"] {
                for who in [
                    &[("authorization", bearer(&john.token).as_str())][..],
                    &[("cookie", &john.cookie), ours],
                ] {
                    let answer = post(content_type, body, who).await;
                    assert_eq!(answer.status, then, "{what} at {path}: {}", answer.text());
                }
            }
        }
    }
    let none = raw::post(&app, "/api/conversations", &[], "{}").await;
    assert_problem(&none, 415, "Content type of application/json required");
    // 422 for a parameter before 404 for the conversation.
    assert_eq!(john.messages("999", "?limit=0").send().await.unwrap().status, 422);
    assert_eq!(john.messages("no-id", "?limit=0").send().await.unwrap().status, 422);
    let key = john.post_message("999", "hi").header("idempotency-key", "a b");
    assert_eq!(key.send().await.unwrap().status, 422);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn internal_listener_requires_the_shared_secret(pool: PgPool) {
    let app = App::start(&pool).await;
    for path in ["/internal/feed/heads", "/internal/feed/ranges"] {
        let url = format!("{}{path}", app.internal);
        for method in ["GET", "PUT", "DELETE"] {
            let answer = app.client.call(method, &url).send().await.unwrap();
            assert_problem(&answer, 405, "Method not allowed");
        }
        for secret in ["", "wrong", &SECRET[1..], &format!("{SECRET}x")] {
            let answer = app.client.post(&url).bearer(secret).send().await.unwrap();
            assert_problem(&answer, 401, "Unauthorized");
        }
        assert_problem(&app.client.post(&url).send().await.unwrap(), 401, "Unauthorized");
        assert_eq!(app.internal(path, &"no object").send().await.unwrap().status, 400);
    }
    for path in ["/api/auth_user", "/api/login", "/internal/feed", "/"] {
        let answer = app.client.get(format!("{}{path}", app.internal)).send().await.unwrap();
        assert_problem(&answer, 404, "Not found");
    }
    app.stop().await;
}
