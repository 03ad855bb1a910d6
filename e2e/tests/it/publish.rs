//! Events of other back ends: what a host commits reaches each stream of its receiver exactly once, in order, whatever dies.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use e2e::{Browser, Front, Service, TestUser, World, ledger::assert_exact};
use futures_util::future::join_all;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use testkit::{
    servers::Redis,
    sse::{EventSource, ReconnectBy},
    until,
};

use crate::{
    support::{RETRY, Two, watch},
    web::stream::{BLANK, blank},
};

const USERS: usize = 6;
const HOSTS: u64 = 4;
const STEPS: u64 = 120;

/// Host applications that publish to random users until they are told to stop.
struct Hosts {
    world: Arc<World>,
    users: Vec<TestUser>,
    /// What was committed, by user.
    committed: Mutex<BTreeMap<usize, BTreeSet<u64>>>,
    next: AtomicU64,
    stop: AtomicBool,
}

impl Hosts {
    async fn publish(self: Arc<Self>, seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        while !self.stop.load(Ordering::Relaxed) {
            let mut host = PgConnection::connect(&self.world.database_url()).await.unwrap();
            for _ in 0..random.random_range(1..6) {
                sqlx::raw_sql("BEGIN").execute(&mut host).await.unwrap();
                let mut sent = Vec::new();
                for _ in 0..random.random_range(1..5) {
                    let (to, n) = (random.random_range(0..USERS), self.next.fetch_add(1, Ordering::Relaxed));
                    let user = self.users[to].id;
                    // A repeated key is not published again, wherever the first one is by then.
                    for _ in 0..random.random_range(1..3) {
                        let publish =
                            format!("SELECT messenger.publish({user}, 'shop.n', '{{\"n\": {n}}}', 'n-{n}')");
                        sqlx::raw_sql(AssertSqlSafe(publish)).execute(&mut host).await.unwrap();
                    }
                    sent.push((to, n));
                }
                match random.random_range(0..5) {
                    0 => _ = sqlx::raw_sql("ROLLBACK").execute(&mut host).await.unwrap(),
                    // The host dies before its commit.
                    1 => break,
                    _ => {
                        sqlx::raw_sql("COMMIT").execute(&mut host).await.unwrap();
                        let mut committed = self.committed.lock().unwrap();
                        for (to, n) in sent {
                            committed.entry(to).or_default().insert(n);
                        }
                    }
                }
                tokio::time::sleep(Duration::from_millis(random.random_range(0..20))).await;
            }
            // And here without a farewell.
            drop(host);
        }
    }

    async fn more(&self) {
        let wanted = self.next.load(Ordering::Relaxed) + STEPS;
        until("the hosts continue", || async { self.next.load(Ordering::Relaxed) >= wanted }).await;
    }
}

/// The replica that relays, and one that does not.
async fn active_first(services: [&mut Service; 2]) -> [&mut Service; 2] {
    let [one, two] = services;
    until("one replica relays", || async {
        one.metric("messenger_api_relay_active").await + two.metric("messenger_api_relay_active").await == 1.0
    })
    .await;
    if one.metric("messenger_api_relay_active").await == 1.0 { [one, two] } else { [two, one] }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn published_events_are_exact_whatever_dies() {
    let mut redis = Redis::start();
    let world = Arc::new(World::with_redis(redis.url()).await);
    let (mut one, mut two) = tokio::join!(world.api().ready(), world.api().ready());
    let gateway = |api: &Service| world.gateway(api.internal()).env("RECONCILE_SECONDS", 1).ready();
    let (mut a, mut b) = tokio::join!(gateway(&one), gateway(&two));
    let mut users = Vec::new();
    for number in 0..USERS {
        users.push(world.user(&two, &format!("user{number}")).await);
    }
    let mut watching = Vec::new();
    for (number, user) in users.iter().enumerate() {
        let mut openings = vec![a.stream(user), b.stream(user)];
        openings.rotate_left(number % 2);
        watching.push(EventSource::open(openings, ReconnectBy::Header, RETRY));
    }
    join_all(watching.iter().map(EventSource::ready)).await;

    let hosts = Arc::new(Hosts {
        world: world.clone(),
        users: users.clone(),
        committed: Mutex::default(),
        next: AtomicU64::new(0),
        stop: AtomicBool::new(false),
    });
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let publishing: Vec<_> =
        (0..HOSTS).map(|n| tokio::spawn(hosts.clone().publish(seed.wrapping_add(n)))).collect();
    hosts.more().await;
    for _ in 0..2 {
        let [active, _] = active_first([&mut one, &mut two]).await;
        active.kill();
        hosts.more().await;
        a.kill();
        hosts.more().await;
        active.restart().await;
        a.restart().await;
        redis.kill();
        hosts.more().await;
        b.kill();
        hosts.more().await;
        redis.restart();
        b.restart().await;
        // In order, too.
        let [active, _] = active_first([&mut one, &mut two]).await;
        active.terminate();
        active.wait().await;
        hosts.more().await;
        active.restart().await;
        hosts.more().await;
    }
    hosts.stop.store(true, Ordering::Relaxed);
    for host in join_all(publishing).await {
        host.unwrap();
    }
    one.until_ready().await;
    let left = "SELECT count(*) FROM messenger.staged_events";
    until("the relay is done", || async {
        sqlx::query_scalar::<_, i64>(left).fetch_one(&world.sql).await.unwrap() == 0
    })
    .await;
    let committed = hosts.committed.lock().unwrap().clone();
    assert!(committed.values().map(BTreeSet::len).sum::<usize>() > 500);
    for (number, (user, browser)) in users.iter().zip(&watching).enumerate() {
        assert_exact(&world.sql, user.id, &user.name, browser).await;
        let record = browser.record();
        let seen: Vec<u64> =
            record.named("shop.n").map(|event| event.json()["n"].as_u64().unwrap()).collect();
        assert_eq!(seen.len(), committed[&number].len(), "{}: once each", user.name);
        assert_eq!(BTreeSet::from_iter(seen), committed[&number], "{}: what was committed", user.name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_replica_relays_within_two_seconds() {
    let world = World::new().await;
    let (mut one, mut two) = tokio::join!(world.api().ready(), world.api().ready());
    let mut gateways =
        [world.gateway(one.internal()).ready().await, world.gateway(two.internal()).ready().await];
    let user = world.user(&two, "john").await;
    let streams = [watch(&gateways[0], &user).await, watch(&gateways[1], &user).await];
    let mut host = PgConnection::connect(&world.database_url()).await.unwrap();
    for n in 0..4 {
        let [active, _] = active_first([&mut one, &mut two]).await;
        // It may have just renewed its lease, or be about to.
        tokio::time::sleep(Duration::from_millis(rand::random_range(0..600))).await;
        if n % 2 == 0 {
            active.kill();
        } else {
            active.freeze();
        }
        let killed = Instant::now();
        let publish = format!("SELECT messenger.publish({}, 'n', '{{\"n\": {n}}}')", user.id);
        sqlx::raw_sql(AssertSqlSafe(publish)).execute(&mut host).await.unwrap();
        let seen = || streams.iter().any(|stream| stream.record().named("n").count() > n);
        until("the event arrives", || async { seen() }).await;
        let took = killed.elapsed();
        println!("takeover {n}: {took:?}");
        assert!(took < Duration::from_secs(2), "{took:?}");
        if n % 2 == 0 {
            active.restart().await;
        } else {
            active.thaw();
        }
        active.until_ready().await;
    }
    for (stream, gateway) in streams.iter().zip(&mut gateways) {
        assert_exact(&world.sql, user.id, "john", stream).await;
        gateway.terminate();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_browsers_event_source_gets_published_events_and_resumes() {
    let browser = Browser::launch().await;
    let front = Front::plain();
    let origin = front.origin();
    let world = World::at(&origin).await;
    let api = world.api().ready().await;
    let mut gateway = world.gateway(api.internal()).env("RECONCILE_SECONDS", 1).ready().await;
    let two = Two::meet(&world, &api).await;
    let _nginx = front.open_at(&[api.public()], &[gateway.public()]).await;
    let context = blank(&browser, &origin).await;
    context.expect("Failed to load resource");
    context.sign_in(&two.jane).await;
    let page = context.open(BLANK).await;
    let script = "
        window.seen = [];
        const source = new EventSource('/api/messages');
        source.addEventListener('order.paid', (event) => seen.push(JSON.parse(event.data)));
        source.addEventListener('Agent:step_2', (event) => seen.push(JSON.parse(event.data)));
        source.addEventListener('ready', () => { window.opened = (window.opened ?? 0) + 1; });";
    page.call(json!([["addScriptTag", { "content": script }]])).await;
    page.wait_for("the stream is open", "window.opened === 1").await;
    let mut host = PgConnection::connect(&world.database_url()).await.unwrap();
    let mut publish = async |name: &str, data: &Value| {
        sqlx::query("SELECT messenger.publish($1::bigint, $2, $3)")
            .bind(two.jane.id.0)
            .bind(name)
            .bind(data)
            .execute(&mut host)
            .await
            .unwrap();
    };
    publish("order.paid", &json!({ "order": 1, "text": "line\nend \u{2028} \u{0085}" })).await;
    page.wait_for("the first event", "seen.length === 1").await;
    gateway.kill();
    publish("Agent:step_2", &json!([])).await;
    publish("order.paid", &json!("while nobody listened")).await;
    gateway.restart().await;
    page.wait_for("the stream is open again", "window.opened === 2").await;
    publish("order.paid", &json!({ "order": 3 })).await;
    page.wait_for("all events", "seen.length >= 4").await;
    assert_eq!(
        page.evaluate("seen").await,
        json!([{ "order": 1, "text": "line\nend \u{2028} \u{0085}" }, [], "while nobody listened", { "order": 3 }])
    );
}
