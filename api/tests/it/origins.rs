//! Credentials, origins and CORS: every rule of docs/api.md.

use api::config::Config;
use sqlx::PgPool;
use testkit::http::{Answer, Call};

use crate::support::{ApiUser, App, LISTED, ORIGIN, assert_common_headers, assert_problem, config, text};

const OTHER_SITE: &str = "https://evil.example";
const EXPOSED: &str = "Feed-Cursor, X-Request-Id, Retry-After, Idempotent-Replayed";

type Headers<'a> = &'a [(&'a str, &'a str)];

fn with(call: Call, headers: Headers) -> Call {
    headers.iter().fold(call, |call, (name, value)| call.header(name, value))
}

/// The status of a change and of a read with these headers.
async fn assert_statuses(app: &App, headers: Headers<'_>, changes: u16, reads: u16) {
    for (method, path, expected) in [
        ("POST", "/api/refresh_token", changes),
        ("DELETE", "/api/sessions/no-id", if changes == 200 { 404 } else { changes }),
        ("GET", "/api/auth_user", reads),
        ("HEAD", "/api/auth_user", reads),
    ] {
        let answer = with(app.call(method, path), headers).send().await.unwrap();
        assert_eq!(answer.status, expected, "{method} {path} {headers:?}");
        assert_common_headers(&answer);
    }
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn header_hides_cookie_even_if_it_is_invalid(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane) = (app.user(&pool, "john").await, app.user(&pool, "jane").await);
    let (bearer, basic) = (format!("Bearer {}", john.token), format!("Basic {}", john.token));
    let cookie = ("cookie", john.cookie.as_str());
    let ours = ("origin", ORIGIN);
    for (headers, changes, reads) in [
        (&[][..], 401, 401),
        (&[("authorization", bearer.as_str())], 200, 200),
        (&[cookie, ours], 200, 200),
        // Present but invalid, whatever else is there.
        (&[("authorization", "Bearer x"), cookie, ours], 401, 401),
        (&[("authorization", "Bearer "), cookie, ours], 401, 401),
        (&[("authorization", ""), cookie, ours], 401, 401),
        (&[("authorization", &basic), cookie, ours], 401, 401),
        (&[("authorization", &bearer), ("authorization", &bearer), cookie, ours], 401, 401),
        (&[("cookie", "messenger_session=x"), ours], 401, 401),
        (&[("cookie", "messenger_session="), ours], 401, 401),
        // 401 before 403.
        (&[("cookie", "messenger_session=x"), ("origin", OTHER_SITE)], 401, 401),
        (&[("authorization", "Bearer x"), cookie, ("origin", OTHER_SITE)], 401, 401),
        // A bearer token needs no origin, also beside a cookie.
        (&[("authorization", &bearer), cookie, ("origin", OTHER_SITE)], 200, 200),
        (&[("authorization", &bearer), ("sec-fetch-site", "cross-site")], 200, 200),
    ] {
        assert_statuses(&app, headers, changes, reads).await;
    }
    let both = app.get("/api/auth_user").bearer(&john.token).header("cookie", &jane.cookie);
    assert_eq!(text(&both.expect(200).await.json()["username"]), "john");
    // A token in the query is for the stream.
    let path = format!("/api/auth_user?token={}", john.token);
    assert_problem(&app.get(&path).send().await.unwrap(), 401, "Unauthorized");
    app.get(&path).header("cookie", &jane.cookie).expect(200).await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn cookie_needs_an_allowed_origin_to_change_something(pool: PgPool) {
    let app = App::start(&pool).await;
    let john = app.user(&pool, "john").await;
    let site = |site| ("sec-fetch-site", site);
    for (headers, changes, reads) in [
        (&[][..], 403, 200),
        (&[("origin", ORIGIN)], 200, 200),
        (&[("origin", LISTED)], 200, 200),
        (&[("origin", LISTED), site("cross-site")], 200, 200),
        (&[("origin", OTHER_SITE)], 403, 403),
        (&[("origin", "null")], 403, 403),
        (&[("origin", "")], 403, 403),
        (&[("origin", "https://shop.example")], 403, 403),
        (&[("origin", "https://shop.example:8443.evil.example")], 403, 403),
        (&[("origin", "http://shop.example:8443")], 403, 403),
        (&[("origin", ORIGIN), ("origin", OTHER_SITE)], 403, 403),
        (&[("origin", OTHER_SITE), site("same-origin")], 403, 403),
        (&[site("same-origin")], 200, 200),
        (&[site("same-site")], 403, 200),
        (&[site("cross-site")], 403, 200),
        (&[site("none")], 403, 200),
        // Referer does not count.
        (&[("referer", ORIGIN)], 403, 200),
    ] {
        let headers = [&[("cookie", john.cookie.as_str())], headers].concat();
        assert_statuses(&app, &headers, changes, reads).await;
    }
    let other_site = app.get("/api/auth_user").header("cookie", &john.cookie).header("origin", OTHER_SITE);
    let answer = other_site.send().await.unwrap();
    assert_problem(&answer, 403, &format!("Origin {OTHER_SITE} is not allowed; add it to ALLOWED_ORIGINS"));
    assert_eq!(answer.json()["code"], "origin_not_allowed");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn origin_with_its_default_port_is_allowed(pool: PgPool) {
    let app = App::start_with(Config {
        origin: "https://Chat.example:443".parse().unwrap(),
        allowed_origins: vec!["http://Bücher.example:80/".parse().unwrap()],
        ..config(&pool)
    })
    .await;
    let john = app.user(&pool, "john").await;
    for origin in ["https://chat.example", "http://xn--bcher-kva.example"] {
        let call = app.post("/api/refresh_token").header("cookie", &john.cookie).header("origin", origin);
        call.expect(200).await;
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn cookie_of_another_program_does_not_lock_out(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, ended, expired) =
        (app.user(&pool, "john").await, app.login("john").await, app.login("john").await);
    ended.call("POST", "/api/logout").expect(204).await;
    let revoked = app.login("john").await;
    revoked.set_session(&pool, "revoked_at = now()").await;
    let expired = format!("messenger_session={}", expired.forge(|claims| claims.exp = claims.iat - 1));
    // Another program's, and ones of our name: of another program, expired, or of ended sessions.
    let others = ["session=eyJ", "messenger_session=eyJ", "messenger_session=", &expired, &ended.cookie];
    let all = [&others[..], &[&revoked.cookie]].concat().join("; ");
    let before = format!("{all}; {}", john.cookie);
    let after = format!("{}; {all}", john.cookie);
    for cookie in [&before, &after] {
        assert_statuses(&app, &[("cookie", cookie), ("origin", ORIGIN)], 200, 200).await;
    }
    // None is valid; and the number of tries is bounded.
    let flood = format!("{}{}", "messenger_session=x; ".repeat(8), john.cookie);
    for cookie in [&all, &flood] {
        assert_statuses(&app, &[("cookie", cookie), ("origin", ORIGIN)], 401, 401).await;
    }
    app.post("/api/logout").header("cookie", &before).header("origin", ORIGIN).expect(204).await;
    assert_statuses(&app, &[("cookie", &before), ("origin", ORIGIN)], 401, 401).await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn prefetch_marks_nothing_read(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    john.say(&conversation, "hi").await;
    let unread = async || jane.conversation(&conversation).expect(200).await.json()["unreadCount"].clone();
    let path = format!("/api/conversations/{conversation}/messages");
    for headers in [
        &[("sec-purpose", "prefetch")][..],
        &[("sec-purpose", "prefetch;prerender")],
        &[("sec-purpose", "Prefetch; anonymous-client-ip"), ("sec-fetch-site", "same-origin")],
        &[("purpose", "prefetch")],
        &[("x-purpose", "preview")],
        &[("x-moz", "prefetch")],
    ] {
        for method in ["GET", "HEAD"] {
            for query in ["", "?markRead=true"] {
                with(jane.call(method, &format!("{path}{query}")), headers).expect(200).await;
                assert_eq!(unread().await, 1, "{method} {query} {headers:?}");
            }
        }
    }
    jane.call("HEAD", &format!("{path}?markRead=true")).expect(200).await;
    assert_eq!(unread().await, 1, "HEAD is no reading");
    with(jane.call("GET", &path), &[("sec-purpose", "")]).expect(200).await;
    assert_eq!(unread().await, 0);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn cross_site_request_marks_nothing_read(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    john.say(&conversation, "hi").await;
    let path = format!("/api/conversations/{conversation}/messages");
    let unread = async |user: &ApiUser| {
        user.conversation(&conversation).expect(200).await.json()["unreadCount"].as_i64().unwrap()
    };
    let bearer = format!("Bearer {}", jane.token);
    for credential in [("cookie", jane.cookie.as_str()), ("authorization", bearer.as_str())] {
        for headers in [
            &[("sec-fetch-site", "cross-site")][..],
            &[("sec-fetch-site", "cross-site"), ("origin", LISTED)],
            &[("sec-fetch-site", "cross-site"), ("sec-fetch-site", "same-origin")],
            &[("sec-fetch-site", "same-origin"), ("sec-fetch-site", "cross-site")],
        ] {
            let headers = [&[credential], headers].concat();
            let page = with(app.get(&path), &headers).expect(200).await.json();
            assert_eq!(page.as_array().unwrap().len(), 1);
            with(app.get(&format!("{path}?markRead=true")), &headers).expect(200).await;
            assert_eq!(unread(&jane).await, 1, "{headers:?}");
        }
    }
    with(app.get(&path), &[("cookie", &jane.cookie), ("origin", OTHER_SITE)]).expect(403).await;
    let read = || app.post(&format!("/api/conversations/{conversation}/read_messages"));
    for headers in [&[][..], &[("origin", OTHER_SITE)], &[("sec-fetch-site", "cross-site")]] {
        with(read().header("cookie", &jane.cookie), headers).expect(403).await;
    }
    assert_eq!(unread(&jane).await, 1);
    with(app.get(&path), &[("cookie", &jane.cookie), ("sec-fetch-site", "same-site")]).expect(200).await;
    assert_eq!(unread(&jane).await, 0);
    john.say(&conversation, "hi").await;
    with(read(), &[("cookie", &jane.cookie), ("origin", LISTED)]).expect(204).await;
    assert_eq!(unread(&jane).await, 0);
    app.stop().await;
}

#[track_caller]
fn assert_readable(answer: &Answer, by: Option<&str>) {
    assert_eq!(answer.header("access-control-allow-origin"), by);
    assert_eq!(answer.header("access-control-allow-credentials"), by.map(|_| "true"));
    assert_eq!(answer.header("vary"), Some("Origin"));
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn preflight_precedes_all_checks_and_favours_listed_origins(pool: PgPool) {
    let app = App::start(&pool).await;
    for path in ["/api/conversations", "/api/auth_user", "/api/nothing", "/"] {
        for (origin, known) in [
            (ORIGIN, true),
            (LISTED, true),
            (OTHER_SITE, false),
            ("null", false),
            ("https://shop.example", false),
        ] {
            let preflight = [
                ("origin", origin),
                ("access-control-request-method", "POST"),
                ("access-control-request-headers", "content-type, idempotency-key"),
                ("authorization", "Bearer bad"),
                ("content-type", "text/plain"),
            ];
            let answer = with(app.call("OPTIONS", path), &preflight).expect(204).await;
            assert_common_headers(&answer);
            assert!(answer.body.is_empty());
            assert_readable(&answer, known.then_some(origin));
            for (name, value) in [
                ("access-control-allow-methods", "GET, HEAD, POST, PUT, PATCH, DELETE"),
                (
                    "access-control-allow-headers",
                    "Authorization, Cache-Control, Content-Type, Idempotency-Key, Last-Event-ID, X-Request-Id",
                ),
                ("access-control-max-age", "600"),
            ] {
                assert_eq!(answer.header(name), known.then_some(value), "{origin}");
            }
        }
    }
    // OPTIONS without preflight headers is a method like others.
    for headers in [&[][..], &[("origin", LISTED)], &[("access-control-request-method", "GET")]] {
        let answer = with(app.call("OPTIONS", "/api/auth_user"), headers).send().await.unwrap();
        assert_problem(&answer, 405, "Method not allowed");
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn listed_origin_can_read_every_answer_including_errors(pool: PgPool) {
    let app = App::start(&pool).await;
    let john = app.user(&pool, "john").await;
    for (origin, by) in
        [(Some(LISTED), Some(LISTED)), (Some(ORIGIN), Some(ORIGIN)), (Some(OTHER_SITE), None), (None, None)]
    {
        let headers: Vec<_> = origin.into_iter().map(|origin| ("origin", origin)).collect();
        for (call, status) in [
            (john.auth_user(), 200),
            (app.get("/api/auth_user"), 401),
            (john.conversation("999"), 404),
            (app.get("/api/nothing"), 404),
            (app.call("DELETE", "/api/auth_user"), 405),
            (john.call("POST", "/api/conversations"), 415),
            (john.start_conversation(""), 422),
            (john.start_conversation("john"), 403),
            (app.get("/.well-known/jwks.json"), 200),
        ] {
            let answer = with(call, &headers).expect(status).await;
            assert_readable(&answer, by);
            assert_eq!(answer.header("access-control-expose-headers"), by.map(|_| EXPOSED));
        }
    }
    // A page that is not listed cannot read the reason.
    let refused = app.post("/api/logout").header("cookie", &john.cookie).header("origin", OTHER_SITE);
    assert_readable(&refused.expect(403).await, None);
    app.stop().await;
}
