//! Rate limits: shared by all replicas, by user and by address, with an exact `Retry-After`; sends do not depend on Redis.

use std::time::Duration;

use api::config::{Config, RateLimits};
use protocol::channels::Channels;
use serde_json::json;
use service_kit::{limiter::Limit, redis_topology::RedisTopology};
use sqlx::PgPool;
use testkit::{PATIENCE, http::Answer, servers::Redis, until};

use crate::{
    failures::metric,
    providers::{Fake, LoginBrowser, begin, github_at, parameter},
    raw,
    support::{
        ApiUser, App, ORIGIN, ORIGIN_NOT_ALLOWED, ROUTES, add_users, assert_problem, channel_prefix, config,
    },
};

const HOUR: Duration = Duration::from_hours(1);

/// Tests of shared limits wait for Redis as long as it takes.
const OFF: RateLimits = RateLimits { patience: PATIENCE, ..RateLimits::OFF };

fn limited(pool: &PgPool, limits: &RateLimits) -> Config {
    Config { limits: *limits, ..config(pool) }
}

/// Two replicas.
async fn start_two(pool: &PgPool, limits: &RateLimits) -> (App, App) {
    let channels = Channels::new(channel_prefix());
    let config = || Config { channels: channels.clone(), ..limited(pool, limits) };
    (start(config()).await, start(config()).await)
}

async fn decided_locally(app: &App, reason: &str) -> u64 {
    let series = format!("messenger_api_rate_limit_local_decisions_total{{reason=\"{reason}\"}}");
    metric(app, &series).await.unwrap_or_default()
}

async fn start(config: Config) -> App {
    let app = App::start_with(config).await;
    until_shared(&app, 1).await;
    app
}

async fn until_shared(app: &App, value: u64) {
    until("limits are shared as wanted", || async {
        metric(app, "messenger_api_rate_limits_shared").await == Some(value)
    })
    .await;
}

/// A complete 429; returns the seconds to wait.
#[track_caller]
fn assert_limited(answer: &Answer) -> u64 {
    let seconds = answer.header("retry-after").and_then(|seconds| seconds.parse().ok()).unwrap_or_default();
    let sentence = match seconds {
        1 => "Too many requests, try again in a second".to_owned(),
        seconds => format!("Too many requests, try again in {seconds} seconds"),
    };
    assert_problem(answer, 429, &sentence);
    assert_eq!(answer.json()["code"], "rate_limited");
    assert!(seconds >= 1);
    seconds
}

/// Sends messages; returns how many were accepted. The others got 429.
async fn send(user: &ApiUser, conversation: &str, times: u32) -> u32 {
    let mut taken = 0;
    for _ in 0..times {
        let answer = user.post_message(conversation, "hi").send().await.unwrap();
        if answer.status == 201 {
            taken += 1;
        } else {
            assert_limited(&answer);
        }
    }
    taken
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn replicas_share_each_users_limit(pool: PgPool) {
    let (one, two) = start_two(&pool, &RateLimits { send_per_user: Limit::new(10, HOUR), ..OFF }).await;
    let (john, jane, conversation) = one.pair(&pool).await;
    let there = john.at(&two);
    assert_eq!((send(&john, &conversation, 4).await, send(&there, &conversation, 4).await), (4, 4));
    let phone = one.login("john").await;
    assert_eq!((send(&phone, &conversation, 4).await, send(&there, &conversation, 2).await), (2, 0));
    assert_eq!(send(&jane.at(&two), &conversation, 12).await, 10);
    let refusals = r#"messenger_api_rate_limited_total{rule="send",by="user"}"#;
    assert_eq!((metric(&one, refusals).await, metric(&two, refusals).await), (Some(2), Some(4)));
    // Other requests are not limited.
    john.messages(&conversation, "").expect(200).await;
    one.stop().await;
    two.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn retry_after_is_long_enough(pool: PgPool) {
    // One message is allowed again after 1.5 s at most.
    let send_per_user = Limit::new(2, Duration::from_secs(3));
    let (one, two) = start_two(&pool, &RateLimits { send_per_user, ..OFF }).await;
    let (john, _, conversation) = one.pair(&pool).await;
    for sender in [&john, &john.at(&two)] {
        let wait = loop {
            let answer = sender.post_message(&conversation, "hi").send().await.unwrap();
            if answer.status != 201 {
                break assert_limited(&answer);
            }
        };
        assert!(wait <= 2, "{wait}");
        // The promise is that a client that waits so long succeeds.
        tokio::time::sleep(Duration::from_secs(wait)).await;
        sender.post_message(&conversation, "at last").expect(201).await;
    }
    one.stop().await;
    two.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn ended_sessions_token_uses_no_limit_of_its_user(pool: PgPool) {
    let limits = RateLimits { send_per_user: Limit::new(10, HOUR), ..OFF };
    let app = start(limited(&pool, &limits)).await;
    let (stolen, _, conversation) = app.pair(&pool).await;
    let phone = app.login("john").await;
    phone.call("DELETE", "/api/sessions").expect(204).await;
    for _ in 0..20 {
        assert_problem(&stolen.post_message(&conversation, "hi").send().await.unwrap(), 401, "Unauthorized");
    }
    // Only the first send reaches the database and finds out.
    assert_eq!(send(&phone, &conversation, 12).await, 9);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn every_route_remembers_an_ended_session(pool: PgPool) {
    let limits = RateLimits { send_per_user: Limit::new(1, HOUR), ..OFF };
    let app = start(limited(&pool, &limits)).await;
    let john = app.user(&pool, "john").await;
    for (n, route) in ROUTES.into_iter().enumerate() {
        let name = format!("user{n}");
        let (stolen, phone) = (app.user(&pool, &name).await, app.login(&name).await);
        let conversation = phone.start(&john.name).await;
        stolen.set_session(&pool, "revoked_at = now()").await;
        stolen.call_route(route, &conversation, &john).expect(401).await;
        assert_problem(&stolen.post_message(&conversation, "hi").send().await.unwrap(), 401, "Unauthorized");
        assert_eq!(send(&phone, &conversation, 1).await, 1, "{route}");
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn repeated_key_counts_like_a_send(pool: PgPool) {
    let app = start(limited(&pool, &RateLimits { send_per_user: Limit::new(2, HOUR), ..OFF })).await;
    let (john, _, conversation) = app.pair(&pool).await;
    let post = || john.post_message(&conversation, "once").header("idempotency-key", "k").send();
    assert_eq!(post().await.unwrap().status, 201);
    assert_eq!(post().await.unwrap().header("idempotent-replayed"), Some("true"));
    assert_limited(&post().await.unwrap());
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn without_redis_each_replica_limits_locally(pool: PgPool) {
    let mut redis = Redis::start();
    let limits = RateLimits { send_per_user: Limit::new(20, HOUR), ..RateLimits::OFF };
    let config = limited(&pool, &limits);
    let app = start(Config { redis: RedisTopology::single(redis.url()).unwrap(), ..config }).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    assert_eq!(send(&john, &conversation, 5).await, 5);
    redis.kill();
    assert_eq!(send(&john, &conversation, 30).await, 15);
    until_shared(&app, 0).await;
    redis.restart();
    until_shared(&app, 1).await;
    assert_eq!(send(&john, &conversation, 1).await, 0, "what was counted here still counts");
    redis.freeze();
    assert_eq!(send(&jane, &conversation, 30).await, 20);
    let mut alone = 0;
    for reason in ["failed", "slow", "away"] {
        alone += decided_locally(&app, reason).await;
    }
    assert!(alone >= 35, "{alone}");
    redis.thaw();
    until_shared(&app, 1).await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn frozen_redis_does_not_delay_sends(pool: PgPool) {
    let mut redis = Redis::start();
    let limits = RateLimits { send_per_user: Limit::new(10_000, HOUR), ..RateLimits::OFF };
    let config = limited(&pool, &limits);
    let app = start(Config { redis: RedisTopology::single(redis.url()).unwrap(), ..config }).await;
    let (john, _, conversation) = app.pair(&pool).await;
    until_shared(&app, 1).await;
    redis.freeze();
    for _ in 0..100 {
        john.say(&conversation, "hi").await;
    }
    // Only the first waits for Redis, and no longer than a check may take.
    assert_eq!((decided_locally(&app, "slow").await, decided_locally(&app, "away").await), (1, 99));
    redis.thaw();
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn rate_limit_is_checked_after_401_and_403_and_before_the_body(pool: PgPool) {
    let once = Limit::new(1, HOUR);
    let limits = RateLimits { send_per_user: once, start_per_user: once, search_per_user: once, ..OFF };
    let app = start(limited(&pool, &limits)).await;
    let (john, revoked) = (app.user(&pool, "john").await, app.login("john").await);
    app.user(&pool, "jane").await;
    let conversation = john.start("jane").await;
    john.say(&conversation, "hi").await;
    john.usernames("j").expect(200).await;
    revoked.set_session(&pool, "revoked_at = now()").await;

    let bearer = |token: &str| format!("Bearer {token}");
    let huge = "x".repeat(17 * 1024);
    for path in ["/api/conversations".to_owned(), format!("/api/conversations/{conversation}/messages")] {
        for body in [huge.as_str(), "{", "{}", r#"{"content":"hi","username":"nobody"}"#] {
            let post = async |content_type: &str, more: &[(&str, &str)]| {
                raw::post(&app, &path, &[&[("content-type", content_type)], more].concat(), body).await
            };
            let over = bearer(&john.token);
            let answer = post("text/plain", &[("authorization", &over)]).await;
            assert_problem(&answer, 415, "Content type of application/json required");
            for token in ["bad", &revoked.token] {
                let answer = post("application/json", &[("authorization", &bearer(token))]).await;
                assert_problem(&answer, 401, "Unauthorized");
            }
            let other_site = [("cookie", john.cookie.as_str()), ("origin", "http://evil.example")];
            assert_problem(&post("application/json", &other_site).await, 403, ORIGIN_NOT_ALLOWED);
            assert_limited(&post("application/json", &[("authorization", &over)]).await);
            let ours = [("cookie", john.cookie.as_str()), ("origin", ORIGIN)];
            assert_limited(&post("application/json", &ours).await);
        }
    }
    assert_problem(&revoked.usernames("j").send().await.unwrap(), 401, "Unauthorized");
    assert_limited(&john.usernames("").send().await.unwrap());
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn logins_are_limited_by_address_and_by_name(pool: PgPool) {
    let limits =
        RateLimits { login_per_address: Limit::new(6, HOUR), login_per_name: Limit::new(2, HOUR), ..OFF };
    let proxies = "127.0.0.0/8".parse().unwrap();
    let app = start(Config { trusted_proxies: proxies, ..limited(&pool, &limits) }).await;
    add_users(&pool, ["john", "jane"]).await;
    let login = async |from: &str, name: &str| {
        let call = app.post("/api/login").header("x-forwarded-for", from);
        call.json(&json!({ "username": name })).send().await.unwrap()
    };
    // A name counts from every address, whether or not it exists.
    for (from, name, status) in [
        ("198.51.100.1", "john", 200),
        ("198.51.100.2", "john", 200),
        ("198.51.100.3", "john", 429),
        ("198.51.100.3", "jane", 200),
        ("198.51.100.3", "nobody", 404),
        ("198.51.100.3", "nobody", 404),
        ("198.51.100.3", "nobody", 429),
    ] {
        assert_eq!(login(from, name).await.status, status, "{from} {name}");
    }
    // One more; the next is 429 before the body is read, but after 415.
    let post = async |content_type: &str, body: &str| {
        let headers = [("content-type", content_type), ("x-forwarded-for", "203.0.113.1, 198.51.100.3")];
        raw::post(&app, "/api/login", &headers, body).await
    };
    assert_eq!(post("application/json", "{").await.status, 400);
    assert_limited(&post("application/json", "{").await);
    assert_eq!(post("text/plain", "{").await.status, 415);
    assert_eq!(login("198.51.100.4", "jane").await.status, 200);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn limited_provider_login_can_be_repeated_later(pool: PgPool) {
    let fake = Fake::start().await;
    let with = |limits| Config { providers: vec![github_at(&fake.url)], ..limited(&pool, &limits) };
    let app = start(with(RateLimits { login_per_address: Limit::new(2, HOUR), ..OFF })).await;
    let open = App::start_with(with(RateLimits::OFF)).await;
    let mut browser = LoginBrowser::default();
    let callback = begin(&app, "github", &mut browser).await;
    // One is left.
    assert_eq!(app.get("/api/oauth/github").send().await.unwrap().status, 307);
    assert_limited(&app.get("/api/oauth/github").send().await.unwrap());
    assert_limited(&browser.get(&app, &callback).await);
    assert_eq!(fake.requests("/login/oauth/access_token"), 0);
    // The same link works later.
    let code = parameter(&browser.finish(&open, callback).await, "code").unwrap();
    assert_limited(&browser.exchange(&app, &code).await);
    assert_eq!(browser.exchange(&open, &code).await.status, 200);
    app.stop().await;
    open.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn users_of_one_address_share_a_limit(pool: PgPool) {
    let three = Limit::new(3, HOUR);
    let limits =
        RateLimits { send_per_address: three, start_per_address: three, search_per_address: three, ..OFF };
    let proxies = "127.0.0.1".parse().unwrap();
    let behind = start(Config { trusted_proxies: proxies, ..limited(&pool, &limits) }).await;
    let open = start(limited(&pool, &limits)).await;
    let (john, jane) = (behind.user(&pool, "john").await, behind.user(&pool, "jane").await);
    let from = |call: testkit::http::Call, from: &str| call.header("x-forwarded-for", from).send();
    let (home, work, neighbour) = ("2001:db8::1", "198.51.100.1", "2001:db8::2");
    let conversation = from(john.start_conversation("jane"), home).await.unwrap().json()["id"].clone();
    let conversation = conversation.as_str().unwrap();
    let calls = [
        |user: &ApiUser, _: &str| user.usernames("j"),
        |user: &ApiUser, conversation: &str| user.post_message(conversation, "hi"),
    ];
    for call in calls {
        for (user, place) in [(&john, home), (&jane, neighbour), (&john, home)] {
            assert!(from(call(user, conversation), place).await.unwrap().status < 300);
        }
        for user in [&john, &jane] {
            assert_limited(&from(call(user, conversation), neighbour).await.unwrap());
            assert!(from(call(user, conversation), work).await.unwrap().status < 300);
        }
        // There is no trusted proxy: the header counts for nothing.
        for (place, status) in
            [("198.51.100.1", 2), ("198.51.100.2", 2), ("198.51.100.3", 2), ("198.51.100.4", 4)]
        {
            let answer = from(call(&john.at(&open), conversation), place).await.unwrap();
            assert_eq!(answer.status / 100, status, "{place}");
        }
    }
    for status in [302, 302, 429] {
        assert_eq!(from(jane.start_conversation("john"), home).await.unwrap().status, status);
    }
    behind.stop().await;
    open.stop().await;
}
