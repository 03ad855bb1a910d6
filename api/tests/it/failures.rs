//! Failures: without Redis events are only later; without Postgres requests get 503.

use api::config::Config;
use futures_util::StreamExt;
use protocol::{channels::Channels, event::Envelope};
use serde::de::DeserializeOwned;
use serde_json::json;
use service_kit::redis_topology::RedisTopology;
use sqlx::PgPool;
use testkit::{PATIENCE, proxy::Proxy, servers::Redis, soon, until};

use crate::support::{ApiUser, App, anywhere, assert_problem, channel_prefix, config, execute, options};

pub(crate) struct Listener(redis::aio::PubSub);

impl Listener {
    pub(crate) async fn start(url: &str, channel: &str) -> Self {
        let mut pubsub = redis::Client::open(url).unwrap().get_async_pubsub().await.unwrap();
        pubsub.subscribe(channel).await.unwrap();
        Self(pubsub)
    }

    pub(crate) async fn next(&mut self) -> Envelope {
        self.next_as().await
    }

    pub(crate) async fn next_as<T: DeserializeOwned>(&mut self) -> T {
        let message =
            soon("something is published", async { self.0.on_message().next().await }).await.unwrap();
        serde_json::from_slice(message.get_payload_bytes()).unwrap()
    }
}

/// `None`: the metric has no such line yet.
pub(crate) async fn metric(app: &App, line: &str) -> Option<u64> {
    let metrics = app.client.get(format!("{}/metrics", app.ops)).expect(200).await;
    metrics.metric(line).map(|value| value as u64)
}

async fn readiness(app: &App) -> (u16, String) {
    let answer = app.client.get(format!("{}/readyz", app.ops)).send().await.unwrap();
    (answer.status, answer.text().trim().to_owned())
}

pub(crate) fn with_redis(pool: &PgPool, url: &str) -> (Config, Channels) {
    let channels = Channels::new(channel_prefix());
    let redis = RedisTopology::single(url).unwrap();
    (Config { redis, channels: channels.clone(), ..config(pool) }, channels)
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn every_event_is_published_to_its_receiver(pool: PgPool) {
    let redis = Redis::start();
    let (config, channels) = with_redis(&pool, &redis.url());
    let app = App::start_with(config).await;
    let (john, jane) = (app.user(&pool, "john").await, app.user(&pool, "jane").await);
    let mut johns = Listener::start(&redis.url(), &channels.user(john.id)).await;
    let mut janes = Listener::start(&redis.url(), &channels.user(jane.id)).await;
    let conversation = john.start("jane").await;
    john.post_message(&conversation, "hi").header("idempotency-key", "k-1").expect(201).await;
    jane.read_messages(&conversation).expect(204).await;
    for (heard, user) in [(&mut johns, john.id), (&mut janes, jane.id)] {
        // The same envelopes as in a range, but for the key, which is not stored.
        let range = app.ranges(vec![protocol::feed::RangeAfter { user, after: 0 }]).await.ranges.remove(0);
        assert_eq!(range.events.len(), 3);
        for event in range.events {
            let mut published = json!(heard.next().await);
            if event.event == "message.sent" {
                assert_eq!(published["data"]["idempotencyKey"].take(), "k-1");
            }
            assert_eq!(published, json!(event));
        }
    }
    assert_eq!(metric(&app, "messenger_api_published_events_total").await, Some(6));
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn killed_redis_fails_no_request_and_is_used_again(pool: PgPool) {
    let mut redis = Redis::start();
    let (config, channels) = with_redis(&pool, &redis.url());
    let app = App::start_with(config).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    redis.kill();
    let dropped = r#"messenger_api_publish_dropped_events_total{reason="disconnected"}"#;
    let mut sent = 0;
    until("events are dropped", || {
        sent += 1;
        let (john, app, conversation) = (&john, &app, &conversation);
        async move {
            john.say(conversation, "into the void").await;
            metric(app, dropped).await > Some(0)
        }
    })
    .await;
    until("Redis is seen to be away", || async {
        readiness(&app).await == (200, "ready, degraded: Redis does not answer".into())
    })
    .await;
    redis.restart();
    until("Redis is seen to be back", || async { readiness(&app).await == (200, "ready".into()) }).await;
    let mut heard = Listener::start(&redis.url(), &channels.user(jane.id)).await;
    john.say(&conversation, "and back").await;
    let envelope = heard.next().await;
    assert_eq!(envelope.seq, 1 + sent + 1, "nothing of the outage is published late");
    assert!(envelope.data.get().contains("and back"));
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn redis_restarted_while_idle_loses_no_event(pool: PgPool) {
    let mut redis = Redis::start();
    let (config, channels) = with_redis(&pool, &redis.url());
    let app = App::start_with(config).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    until("the first events are out", || async {
        metric(&app, "messenger_api_published_events_total").await == Some(2)
    })
    .await;
    redis.restart();
    let mut heard = Listener::start(&redis.url(), &channels.user(jane.id)).await;
    john.say(&conversation, "first after the restart").await;
    assert_eq!(heard.next().await.seq, 2);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn everything_but_publishing_works_without_redis(pool: PgPool) {
    let port = testkit::ports::free_port();
    let (config, _) = with_redis(&pool, &format!("redis://127.0.0.1:{port}/"));
    let app = App::start_with(config).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    john.say(&conversation, "hi").await;
    assert_eq!(app.feed(jane.id).await.len(), 2);
    assert_eq!(readiness(&app).await, (200, "ready, degraded: Redis does not answer".into()));
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn hanging_redis_delays_neither_answers_nor_shutdown(pool: PgPool) {
    let mut redis = Redis::start();
    let (config, _) = with_redis(&pool, &redis.url());
    let app = App::start_with(config).await;
    let (john, _, conversation) = app.pair(&pool).await;
    redis.freeze();
    // If each waited a second for Redis, all of them would exceed the test's bound.
    let send = async {
        for _ in 0..PATIENCE.as_secs() + 20 {
            john.say(&conversation, "hi").await;
        }
    };
    soon("messages are sent", send).await;
    soon("the service stops", app.stop()).await;
    redis.thaw();
}

/// A service that reaches Postgres through a network that can fail.
async fn behind_a_proxy(pool: &PgPool) -> (Proxy, App) {
    let options = options(pool);
    let upstream =
        tokio::net::lookup_host((options.get_host(), options.get_port())).await.unwrap().next().unwrap();
    let proxy = Proxy::start(upstream).await;
    let options = options.host("127.0.0.1").port(proxy.address().port());
    (proxy, App::with(pool, |config| config.database = options).await)
}

async fn assert_unavailable(app: &App, john: &ApiUser, conversation: &str) {
    for call in [
        john.auth_user(),
        john.refresh_token(),
        john.conversations(""),
        john.post_message(conversation, "hi"),
        john.post_message(conversation, ""),
        john.read_messages(conversation),
        app.post("/api/login").json(&json!({ "username": "john" })),
        app.internal("/internal/feed/heads", &json!({ "users": [{ "user": "1" }] })),
        app.internal("/internal/feed/ranges", &json!({ "ranges": [{ "user": "1", "after": 0 }] })),
    ] {
        let answer = soon("an answer", call.send()).await.unwrap();
        assert_problem(&answer, 503, "Service unavailable, try again soon");
        assert!(answer.header("retry-after").is_some());
    }
    // Requests without the database work, and an invalid token is still 401.
    app.get("/.well-known/jwks.json").expect(200).await;
    assert_problem(&app.get("/api/auth_user").bearer("x").send().await.unwrap(), 401, "Unauthorized");
    assert_problem(&app.get("/api/nothing").send().await.unwrap(), 404, "Not found");
    until("the service is unready", || async {
        readiness(app).await == (503, "Postgres does not answer".into())
    })
    .await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn refusing_postgres_is_503_until_it_recovers(pool: PgPool) {
    let (proxy, app) = behind_a_proxy(&pool).await;
    let (john, _, conversation) = app.pair(&pool).await;
    proxy.refuse();
    assert_unavailable(&app, &john, &conversation).await;
    proxy.resume();
    until("the service is ready again", || async { readiness(&app).await.0 == 200 }).await;
    john.say(&conversation, "back").await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn silent_postgres_is_503_until_it_recovers(pool: PgPool) {
    let (proxy, app) = behind_a_proxy(&pool).await;
    let (john, _, conversation) = app.pair(&pool).await;
    proxy.silence();
    assert_unavailable(&app, &john, &conversation).await;
    // Hanging connections are closed, so that the pool has room.
    until("no connection is in use", || async {
        metric(&app, "messenger_api_database_connections_used").await == Some(0)
    })
    .await;
    proxy.resume();
    proxy.cut();
    until("the service is ready again", || async { readiness(&app).await.0 == 200 }).await;
    until("messages are taken again", || async {
        john.post_message(&conversation, "back").send().await.unwrap().status == 201
    })
    .await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn lock_held_too_long_is_503_and_changes_nothing(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let mut holder = pool.begin().await.unwrap();
    // The second lock of a send: its first changes must be rolled back.
    let lock = "SELECT FROM messenger.feed_heads WHERE user_id = 2 FOR UPDATE";
    sqlx::query(lock).execute(&mut *holder).await.unwrap();
    let post = || john.post_message(&conversation, "never").header("idempotency-key", "k");
    assert_problem(&post().send().await.unwrap(), 503, "Service unavailable, try again soon");
    holder.rollback().await.unwrap();
    assert_eq!(app.feed(john.id).await.len(), 1);
    let again = post().expect(201).await;
    assert!(again.header("idempotent-replayed").is_none());
    assert_eq!((app.feed(john.id).await.len(), app.feed(jane.id).await.len()), (2, 2));
    app.stop().await;
}

#[sqlx::test(migrations = false)]
async fn server_does_not_start_on_another_schema(pool: PgPool) {
    let refused = async || {
        let listeners = api::app::Listeners::bind(anywhere()).unwrap();
        let stop = tokio_util::sync::CancellationToken::new();
        let run = api::app::run(config(&pool), listeners, stop);
        soon("it refuses", Box::pin(run)).await.unwrap_err().to_string()
    };
    assert!(refused().await.contains("0 of 1 migrations are applied; run `api migrate`"));
    api::maintenance::migrate(options(&pool)).await.unwrap();
    for (damage, complaint) in [
        (
            "UPDATE messenger.function_sets SET checksum = 'x'",
            "the SQL functions of this build are not applied",
        ),
        ("UPDATE messenger._sqlx_migrations SET checksum = 'x'", "migration 1 was edited"),
        ("UPDATE messenger._sqlx_migrations SET success = false", "migration 1 was edited"),
        ("DELETE FROM messenger._sqlx_migrations", "0 of 1 migrations"),
    ] {
        sqlx::query(damage).execute(&pool).await.unwrap();
        assert!(refused().await.contains(complaint), "{complaint}");
    }
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn old_version_keeps_running_on_a_newer_schema(pool: PgPool) {
    execute(&pool, "WITH newer AS (INSERT INTO messenger.function_sets (checksum, applied_at) VALUES ('newer', clock_timestamp()))
         INSERT INTO messenger._sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES (9999, 'newer', true, 'x', 0)").await;
    App::start(&pool).await.stop().await;
}
