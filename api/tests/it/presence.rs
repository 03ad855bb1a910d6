//! The question who is online, and the reports of gateways, over HTTP.

use std::time::{Duration, Instant};

use api::config::Config;
use chrono::Utc;
use protocol::{
    ids::UserId,
    presence::{MAX_CHANGES, PRESENCE_PATH, PresenceAnswer, PresenceReport},
};
use serde_json::{Value, json};
use sqlx::PgPool;
use testkit::{proxy::Proxy, servers::Redis, until};
use tokio::time::sleep;

use crate::{
    failures::{Listener, metric, with_redis},
    support::{ApiUser, App, assert_problem, assert_unacceptable, check_event, execute, number, redis_url},
};

const EPHEMERAL: &str = "messenger_api_published_ephemeral_events_total";

/// To the Redis that all tests share.
async fn redis(words: &[&str]) {
    let client = redis::Client::open(redis_url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    redis::cmd(words[0]).arg(&words[1..]).exec_async(&mut connection).await.unwrap();
}

async fn report(app: &App, gateway: &str, first: bool, came: &[UserId], left: &[UserId]) -> bool {
    let report = PresenceReport { gateway: gateway.into(), first, came: came.into(), left: left.into() };
    let answer = app.internal(PRESENCE_PATH, &report).expect(200).await.json();
    serde_json::from_value::<PresenceAnswer>(answer).unwrap().known
}

async fn partners(one: &ApiUser, other: &ApiUser) {
    let conversation = one.start(&other.name).await;
    one.say(&conversation, "hi").await;
    other.say(&conversation, "hello").await;
}

async fn presence(reader: &ApiUser, users: &[UserId]) -> Value {
    let query: Vec<_> = users.iter().map(|user| format!("userId={user}")).collect();
    reader.call("GET", &format!("/api/presence?{}", query.join("&"))).expect(200).await.json()
}

async fn online(reader: &ApiUser, user: &ApiUser) -> bool {
    presence(reader, &[user.id]).await[0]["online"].as_bool().unwrap()
}

async fn next_presence(heard: &mut Listener) -> (String, bool) {
    let message: Value = heard.next_as().await;
    assert_eq!(message["ephemeral"], "presence", "{message}");
    check_event(Some("presence"), &message["data"]);
    (message["data"]["userId"].as_str().unwrap().into(), message["data"]["online"].as_bool().unwrap())
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn presence_is_answered_for_partners_in_the_order_asked(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, bob) =
        (app.user(&pool, "john").await, app.user(&pool, "jane").await, app.user(&pool, "bob").await);
    let stranger = app.user(&pool, "stranger").await;
    partners(&john, &jane).await;
    partners(&john, &bob).await;
    john.start("stranger").await;
    assert!(report(&app, "one", true, &[jane.id, stranger.id], &[]).await);
    let state =
        |user: &ApiUser, online: bool| json!({ "userId": user.id, "online": online, "lastSeenAt": null });
    let all = [bob.id, UserId(999_999), jane.id, stranger.id, john.id, bob.id];
    assert_eq!(presence(&john, &all).await, json!([state(&bob, false), state(&jane, true)]));
    assert_eq!(presence(&stranger, &all).await, json!([]));
    for (block, undo) in [(&john, &jane), (&jane, &john)] {
        let path = format!("/api/blocks/{}", undo.id);
        block.call("PUT", &path).expect(204).await;
        assert_eq!(presence(&john, &all).await, json!([state(&bob, false)]));
        block.call("DELETE", &path).expect(204).await;
    }
    execute(&pool, format!("UPDATE messenger.users SET shares_presence = false WHERE id = {}", jane.id))
        .await;
    assert_eq!(presence(&john, &all).await, json!([state(&bob, false)]));
    let many: String = (1..=101).map(|id| format!("&userId={id}")).collect();
    for (query, sentence) in [
        ("", "userId required"),
        ("?userId=", "userId must be an id"),
        ("?userId=1&userId=x", "userId must be an id"),
        (&format!("?x=1{many}"), "At most 100 users"),
    ] {
        let answer = john.call("GET", &format!("/api/presence{query}")).send().await.unwrap();
        assert_unacceptable(&answer, "userId", sentence);
    }
    app.stop().await;
    let off = App::with(&pool, |config| config.presence = false).await;
    let john = off.login("john").await;
    assert_eq!(presence(&john, &[bob.id]).await, json!([]));
    assert!(
        report(&off, "one", false, &[bob.id], &[]).await,
        "a gateway with another setting repeats nothing"
    );
    off.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn user_is_online_while_any_gateway_has_them(pool: PgPool) {
    let (config, channels) = with_redis(&pool, &redis_url());
    let app = App::start_with(config).await;
    let (john, jane) = (app.user(&pool, "john").await, app.user(&pool, "jane").await);
    partners(&john, &jane).await;
    let mut heard = Listener::start(&redis_url(), &channels.user(john.id)).await;
    let janes = |online: bool| (jane.id.to_string(), online);
    assert!(report(&app, "one", true, &[jane.id], &[]).await);
    assert_eq!(next_presence(&mut heard).await, janes(true));
    // Neither a second gateway nor the end of one of them is told.
    assert!(report(&app, "two", true, &[jane.id], &[]).await);
    assert!(report(&app, "one", false, &[], &[jane.id]).await);
    assert!(online(&john, &jane).await);
    assert!(report(&app, "two", false, &[], &[jane.id]).await);
    assert_eq!(next_presence(&mut heard).await, janes(false));
    assert!(!online(&john, &jane).await);
    let seen = "SELECT count(*) FROM messenger.last_seen WHERE at > now() - interval '1 minute'";
    assert_eq!(number(&pool, seen).await, 1);
    // A repeated report changes nothing for the worse.
    assert!(report(&app, "two", false, &[jane.id], &[]).await);
    assert!(report(&app, "two", false, &[jane.id], &[]).await);
    assert!(online(&john, &jane).await);
    assert_eq!(next_presence(&mut heard).await, janes(true));
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.last_seen").await, 1);
    assert_eq!(metric(&app, r#"messenger_api_presence_changes_total{change="offline"}"#).await, Some(1));
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn newest_two_hundred_partners_are_told_and_nobody_else(pool: PgPool) {
    let (config, channels) = with_redis(&pool, &redis_url());
    let app = App::start_with(config).await;
    let john = app.user(&pool, "john").await;
    // The list's order is that of the names: after the partners come one who has not answered, one who blocks, one who is blocked.
    let others = "SELECT id FROM messenger.users WHERE username LIKE 'other%'";
    execute(
        &pool,
        format!(
            "WITH added AS (
                 INSERT INTO messenger.users (username) SELECT 'other' || n FROM generate_series(1, 206) AS n RETURNING id
             ), ordered AS (SELECT id, row_number() OVER (ORDER BY id) AS n FROM added), made AS (
                 INSERT INTO messenger.conversations (user_a, user_b, user_a_has_written, user_b_has_written)
                 SELECT {john}, id, true, n <> 204 FROM ordered RETURNING id, user_b
             ), blocked AS (
                 INSERT INTO messenger.blocks (blocker_id, blocked_id)
                 SELECT CASE n WHEN 205 THEN id ELSE {john} END, CASE n WHEN 205 THEN {john} ELSE id END FROM ordered WHERE n >= 205
             )
             INSERT INTO messenger.participants (conversation_id, user_id, other_user_id, list_seq)
             SELECT id, {john}, user_b, user_b FROM made",
            john = john.id
        ),
    )
    .await;
    let nth =
        async |n: u32| UserId(number(&pool, format!("{others} ORDER BY id OFFSET {} LIMIT 1", n - 1)).await);
    let mut newest = Listener::start(&redis_url(), &channels.user(nth(203).await)).await;
    let mut last = Listener::start(&redis_url(), &channels.user(nth(4).await)).await;
    assert!(report(&app, "one", true, &[john.id], &[]).await);
    for heard in [&mut newest, &mut last] {
        assert_eq!(next_presence(heard).await, (john.id.to_string(), true));
    }
    until("200 are told", || async { metric(&app, EPHEMERAL).await == Some(200) }).await;
    assert!(report(&app, "one", false, &[], &[john.id]).await);
    until("200 are told again", || async { metric(&app, EPHEMERAL).await == Some(400) }).await;

    // Of whom it is not shared, nothing is told and nothing is stored.
    execute(&pool, "UPDATE messenger.users SET shares_presence = false").await;
    execute(&pool, "DELETE FROM messenger.last_seen").await;
    assert!(report(&app, "one", false, &[john.id], &[]).await);
    assert!(report(&app, "one", false, &[], &[john.id]).await);
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.last_seen").await, 0);
    execute(&pool, "UPDATE messenger.users SET shares_presence = true").await;
    assert!(report(&app, "one", false, &[john.id], &[]).await);
    until("200 are told", || async { metric(&app, EPHEMERAL).await >= Some(600) }).await;
    assert_eq!(metric(&app, EPHEMERAL).await, Some(600));
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn of_two_gateways_that_report_at_the_same_time_one_tells(pool: PgPool) {
    let (config, channels) = with_redis(&pool, &redis_url());
    let other = Config { channels: channels.clone(), ..with_redis(&pool, &redis_url()).0 };
    let (app, other) = (App::start_with(config).await, App::start_with(other).await);
    let (john, jane) = (app.user(&pool, "john").await, app.user(&pool, "jane").await);
    partners(&john, &jane).await;
    let mut heard = Listener::start(&redis_url(), &channels.user(john.id)).await;
    tokio::join!(report(&app, "one", true, &[], &[]), report(&other, "two", true, &[], &[]));
    let (janes, nobody) = ([jane.id], []);
    for _ in 0..30 {
        for (came, left, online) in [(&janes[..], &nobody[..], true), (&nobody[..], &janes[..], false)] {
            tokio::join!(report(&app, "one", false, came, left), report(&other, "two", false, came, left));
            // Perhaps both tell.
            while next_presence(&mut heard).await != (jane.id.to_string(), online) {}
        }
    }
    app.stop().await;
    other.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn gateway_whose_users_are_lost_must_report_them_again(pool: PgPool) {
    let (config, channels) = with_redis(&pool, &redis_url());
    let app = App::start_with(config).await;
    let john = app.user(&pool, "john").await;
    let (all, one) = (channels.gateways(), channels.gateway("one"));
    for lost in [
        ["DEL", &all].as_slice(),
        &["DEL", &one],
        // In the middle of a report: what came after it is there, what was before is not.
        &["HDEL", &one, ""],
    ] {
        assert!(report(&app, "one", true, &[john.id], &[]).await);
        assert!(report(&app, "one", false, &[], &[]).await);
        redis(lost).await;
        assert!(!report(&app, "one", false, &[john.id], &[]).await, "{lost:?}");
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn sweep_that_a_crash_has_ended_is_finished_by_another_replica(pool: PgPool) {
    let (config, channels) = with_redis(&pool, &redis_url());
    let app = App::start_with(config).await;
    let (john, jane) = (app.user(&pool, "john").await, app.user(&pool, "jane").await);
    partners(&john, &jane).await;
    let (all, dead) = (channels.gateways(), channels.gateway("dead"));
    redis(&["HSET", &dead, "", "0", &jane.id.to_string(), "1"]).await;
    redis(&["ZADD", &all, &Utc::now().timestamp().to_string(), "dead"]).await;
    assert!(online(&john, &jane).await);
    let mut heard = Listener::start(&redis_url(), &channels.user(john.id)).await;
    // Another replica has begun, and nobody was told.
    redis(&["ZADD", &all, &format!("-{}", Utc::now().timestamp()), "dead"]).await;
    assert!(!online(&john, &jane).await, "the mark takes effect at once");
    assert!(!report(&app, "dead", false, &[jane.id], &[]).await, "the gateway must take another name");
    assert_eq!(next_presence(&mut heard).await, (jane.id.to_string(), false));
    let client = redis::Client::open(redis_url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let mut left = redis::cmd("EXISTS");
    left.arg(&all).arg(&dead);
    for _ in 0..100 {
        if left.query_async::<u8>(&mut connection).await.unwrap() == 0 {
            return app.stop().await;
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("nothing of the gateway stays");
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn lease_that_has_ended_in_an_outage_may_be_renewed(pool: PgPool) {
    let redis = Redis::start();
    let proxy = Proxy::start(redis.address()).await;
    let (config, channels) = with_redis(&pool, &format!("redis://{}", proxy.address()));
    let app = App::start_with(config).await;
    let started = Instant::now();
    let john = app.user(&pool, "john").await;
    let end_lease = || {
        let long_ago = (Utc::now().timestamp() - 60).to_string();
        let answer = redis.command(&["ZADD", &channels.gateways(), &long_ago, "one"]).unwrap();
        assert_eq!(answer, ":0", "the gateway is known");
    };
    assert!(report(&app, "one", true, &[john.id], &[]).await);
    end_lease();
    sleep(Duration::from_secs(5)).await;
    assert!(report(&app, "one", false, &[], &[]).await, "after an outage of api");

    sleep(Duration::from_secs(17).saturating_sub(started.elapsed())).await;
    proxy.refuse();
    sleep(Duration::from_secs(5)).await;
    end_lease();
    proxy.resume();
    sleep(Duration::from_secs(5)).await;
    assert!(report(&app, "one", false, &[], &[]).await, "after an outage of redis");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn without_redis_presence_is_not_known_and_all_else_works(pool: PgPool) {
    let (config, _) = with_redis(&pool, "redis://127.0.0.1:1");
    let app = App::start_with(config).await;
    let (john, jane) = (app.user(&pool, "john").await, app.user(&pool, "jane").await);
    partners(&john, &jane).await;
    let answer = john.call("GET", &format!("/api/presence?userId={}", jane.id)).send().await.unwrap();
    assert_problem(&answer, 503, "Service unavailable, try again soon");
    assert_eq!(answer.header("retry-after"), Some("5"));
    assert_eq!(presence(&john, &[john.id]).await, json!([]), "nobody is to be looked up");
    let reported =
        PresenceReport { gateway: "one".into(), first: true, came: vec![jane.id], left: Vec::new() };
    app.internal(PRESENCE_PATH, &reported).expect(503).await;
    john.call("PATCH", "/api/auth_user").json(&json!({ "sharesPresence": false })).expect(200).await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn unknown_gateway_must_report_again_and_a_malformed_report_is_refused(pool: PgPool) {
    let app = App::start(&pool).await;
    let john = app.user(&pool, "john").await;
    assert!(!report(&app, "one", false, &[john.id], &[]).await);
    assert!(report(&app, "one", true, &[john.id], &[]).await);
    assert!(report(&app, "one", false, &[], &[]).await);
    let refused = |gateway: &str, came: usize| PresenceReport {
        gateway: gateway.into(),
        first: true,
        came: vec![john.id; came],
        left: Vec::new(),
    };
    for bad in [refused("", 0), refused("a b", 0), refused(&"x".repeat(65), 0), refused("a", MAX_CHANGES + 1)]
    {
        app.internal(PRESENCE_PATH, &bad).expect(400).await;
    }
    app.client.post(format!("{}{PRESENCE_PATH}", app.internal)).json(&refused("a", 0)).expect(401).await;
    app.stop().await;
}
