//! Two users who talk, traffic between many, and their streams.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use e2e::{
    Service, TestUser, World,
    ledger::{StoredFeed, assert_exact},
    service::Plan,
};
use futures_util::future::join_all;
use protocol::ids::ConversationId;
use testkit::{
    servers::Redis,
    soon,
    sse::{End, EventSource, ReconnectBy, Stream, StreamRequest},
    until,
};

/// Short, because no test is about it.
pub(crate) const RETRY: Duration = Duration::from_millis(50);

pub(crate) fn browser(opening: StreamRequest) -> EventSource {
    EventSource::open(vec![opening], ReconnectBy::Header, RETRY)
}

pub(crate) async fn watch(gateway: &Service, user: &TestUser) -> EventSource {
    let browser = browser(gateway.stream(user));
    browser.ready().await;
    browser
}

pub(crate) async fn ready(opening: StreamRequest) -> Stream {
    let mut stream = opening.stream().await;
    stream.named("ready").await;
    stream
}

/// The reason of the goodbye, and whether to reconnect.
pub(crate) async fn goodbye(stream: &mut Stream) -> (String, bool) {
    let (events, end) = stream.rest().await;
    assert_eq!(end, End::Clean);
    let goodbye = events.last().expect("a goodbye");
    assert!(goodbye.is("goodbye") && goodbye.id.is_none(), "{goodbye:?}");
    let data = goodbye.json();
    (data["reason"].as_str().unwrap().to_owned(), data["reconnect"].as_bool().unwrap())
}

pub(crate) async fn until_metric(service: &Service, series: &str, wanted: f64) {
    until(&format!("{series} is {wanted}"), || async { service.metric(series).await == wanted }).await;
}

pub(crate) async fn until_redis_is_healthy(gateway: &Service) {
    until_metric(gateway, "messenger_gateway_redis_degraded", 0.0).await;
    until("everybody is subscribed", || async {
        gateway.metric("messenger_gateway_actual_subscriptions").await
            == gateway.metric("messenger_gateway_desired_subscriptions").await
    })
    .await;
}

/// A world with one replica of each service, and two users who talk.
pub(crate) async fn start() -> (World, Service, Service, Two) {
    start_in(World::new().await, |gateway| gateway).await
}

pub(crate) async fn start_in(
    world: World,
    settings: impl FnOnce(Plan) -> Plan,
) -> (World, Service, Service, Two) {
    let api = world.api().ready().await;
    let gateway = settings(world.gateway(api.internal())).ready().await;
    let two = Two::meet(&world, &api).await;
    (world, api, gateway, two)
}

/// Between two messages of one client.
pub(crate) const PAUSE: Duration = Duration::from_millis(15);

pub(crate) struct Two {
    pub(crate) john: TestUser,
    pub(crate) jane: TestUser,
    pub(crate) conversation: ConversationId,
}

impl Two {
    pub(crate) async fn meet(world: &World, api: &Service) -> Self {
        let john = world.user(api, "john").await;
        let jane = world.user(api, "jane").await;
        let conversation = world.conversation(api, &john, &jane).await;
        Self { john, jane, conversation }
    }

    pub(crate) async fn say(&self, world: &World, api: &Service, times: usize) {
        for _ in 0..times {
            world.say(api, &self.john, self.conversation).await;
        }
    }
}

pub(crate) struct Crowd {
    pub(crate) users: Vec<TestUser>,
    /// The sender and the conversation.
    pub(crate) lines: Vec<(TestUser, ConversationId)>,
}

impl Crowd {
    pub(crate) async fn gather(world: &World, api: &Service, size: usize) -> Self {
        let mut users = Vec::new();
        for number in 0..size {
            users.push(world.user(api, &format!("user{number}")).await);
        }
        let mut lines = Vec::new();
        for (number, user) in users.iter().enumerate() {
            for step in 1..=2 {
                let other = &users[(number + step) % size];
                let conversation = world.conversation(api, user, other).await;
                lines.push((user.clone(), conversation));
                lines.push((other.clone(), conversation));
            }
        }
        Self { users, lines }
    }

    /// One ready client per user.
    pub(crate) async fn watch(&self, at: &[&Service]) -> Vec<(TestUser, EventSource)> {
        let mut watching = Vec::new();
        for (number, user) in self.users.iter().enumerate() {
            let openings = (0..at.len()).map(|turn| at[(number + turn) % at.len()].stream(user)).collect();
            watching.push((user.clone(), EventSource::open(openings, ReconnectBy::Header, RETRY)));
        }
        join_all(watching.iter().map(|(_, browser)| browser.ready())).await;
        watching
    }

    /// Several clients per user, all at the first gateway; they reconnect to the others.
    pub(crate) async fn watch_first(&self, at: &[&Service], devices: usize) -> Vec<(TestUser, EventSource)> {
        let mut watching = Vec::new();
        for user in &self.users {
            for _ in 0..devices {
                let openings = at.iter().map(|gateway| gateway.stream(user)).collect();
                watching.push((user.clone(), EventSource::open(openings, ReconnectBy::Header, RETRY)));
            }
        }
        join_all(watching.iter().map(|(_, browser)| browser.ready())).await;
        watching
    }
}

/// Careful clients that write until stopped, at these replicas in turn.
pub(crate) struct Traffic {
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicU64>,
    senders: Vec<tokio::task::JoinHandle<Vec<String>>>,
}

impl Traffic {
    pub(crate) fn start(
        world: &Arc<World>,
        apis: &[&Service],
        lines: &[(TestUser, ConversationId)],
        pause: Duration,
    ) -> Self {
        let apis: Vec<String> = apis.iter().map(|api| api.url("")).collect();
        let (stop, accepted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let senders = lines.iter().enumerate().map(|(number, (user, conversation))| {
            let (world, apis, user, conversation) =
                (world.clone(), apis.clone(), user.clone(), *conversation);
            let (stop, accepted) = (stop.clone(), accepted.clone());
            tokio::spawn(async move {
                let mut ids = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let key = format!("{number}-{}", ids.len());
                    let message = world.say_until_accepted(&apis, &user, conversation, &key).await;
                    ids.push(message["id"].as_str().unwrap().to_owned());
                    accepted.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(pause).await;
                }
                ids
            })
        });
        Self { senders: senders.collect(), stop, accepted }
    }

    pub(crate) async fn more(&self, messages: u64) {
        let wanted = self.accepted.load(Ordering::Relaxed) + messages;
        soon("the traffic continues", async {
            while self.accepted.load(Ordering::Relaxed) < wanted {
                assert!(!self.senders.iter().all(tokio::task::JoinHandle::is_finished), "all senders failed");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    pub(crate) async fn stop(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        let mut ids = Vec::new();
        for sender in self.senders {
            ids.extend(sender.await.expect("a sender does not fail"));
        }
        ids
    }
}

/// Replicas, gateways, and users who write and watch continuously.
pub(crate) struct Busy {
    pub(crate) world: Arc<World>,
    pub(crate) apis: Vec<Service>,
    pub(crate) gateways: Vec<Service>,
    pub(crate) crowd: Crowd,
    watching: Vec<(TestUser, EventSource)>,
}

impl Busy {
    pub(crate) async fn new(world: World) -> Self {
        let (one, two) = tokio::join!(world.api().ready(), world.api().ready());
        let (a, b) =
            tokio::join!(world.gateway(one.internal()).ready(), world.gateway(two.internal()).ready());
        Self::of(world, vec![one, two], vec![a, b]).await
    }

    pub(crate) async fn of(world: World, apis: Vec<Service>, gateways: Vec<Service>) -> Self {
        let crowd = Crowd::gather(&world, &apis[0], 4).await;
        let watching = crowd.watch(&gateways.iter().collect::<Vec<_>>()).await;
        Self { world: Arc::new(world), apis, gateways, crowd, watching }
    }

    pub(crate) fn traffic(&self) -> Traffic {
        Traffic::start(&self.world, &self.apis.iter().collect::<Vec<_>>(), &self.crowd.lines, PAUSE)
    }

    pub(crate) fn close_streams(&mut self) {
        self.watching.clear();
    }

    pub(crate) async fn until_all_is_seen(&self) {
        for (user, browser) in &self.watching {
            let head = StoredFeed::read(&self.world.sql, user.id).await.head_cursor();
            browser
                .until(&format!("{} sees {head}", user.name), |record| {
                    record.events.iter().any(|event| event.id.as_ref() == Some(&head))
                })
                .await;
        }
    }

    /// All feeds are exact, whatever happened to the streams.
    pub(crate) async fn assert_ledgers(&self) {
        assert_all_exact(&self.world, &self.apis[0], &self.crowd.lines, &self.watching).await;
    }

    pub(crate) async fn assert_exact(&self) {
        assert_all_exact(&self.world, &self.apis[0], &self.crowd.lines, &self.watching).await;
        for (user, browser) in &self.watching {
            assert_eq!(browser.record().opened, 1, "{}'s stream stayed open", user.name);
        }
    }

    pub(crate) async fn until_redis_is_healthy(&self) {
        for gateway in &self.gateways {
            until_redis_is_healthy(gateway).await;
        }
    }

    pub(crate) async fn until_redis_is_degraded(&self) {
        for gateway in &self.gateways {
            until_metric(gateway, "messenger_gateway_redis_degraded", 1.0).await;
        }
    }

    pub(crate) async fn until_limits_are_shared(&self) {
        for api in &self.apis {
            until_metric(api, "messenger_api_rate_limits_shared", 1.0).await;
        }
        for gateway in &self.gateways {
            until_metric(gateway, "messenger_gateway_rate_limits_shared", 1.0).await;
        }
    }

    /// Each gateway has subscriptions at one of these servers.
    pub(crate) async fn until_listening_to(&self, servers: &[&Redis]) {
        let probes = format!("{}*", self.world.probes());
        until("the gateways listen there", || async {
            let listening = |kind: &str| {
                let count = |server: &&Redis| {
                    let channels = server.command(&["PUBSUB", kind, &probes]).ok()?;
                    channels.strip_prefix('*')?.parse::<usize>().ok()
                };
                servers.iter().filter_map(count).sum::<usize>()
            };
            listening("CHANNELS") >= self.gateways.len() || listening("SHARDCHANNELS") >= self.gateways.len()
        })
        .await;
    }

    /// Redis delivers every event again, without reconcile.
    pub(crate) async fn until_events_come_by_redis(&self) {
        let events = async |label: &str| {
            let mut sum = 0.0;
            for gateway in &self.gateways {
                sum += gateway.metric_where("messenger_gateway_events_delivered_total", label).await;
            }
            sum
        };
        until("Redis brings every event", async || {
            let (all, by_redis) = (events("").await, events(r#"path="redis""#).await);
            assert_all_exact(&self.world, &self.apis[0], &self.crowd.lines, &self.watching).await;
            let (all, by_redis) = (events("").await - all, events(r#"path="redis""#).await - by_redis);
            all == by_redis && all > 0.0
        })
        .await;
    }
}

/// All received exactly their feeds, and again after one more message on each line: nothing old can arrive later
/// unnoticed.
pub(crate) async fn assert_all_exact(
    world: &World,
    api: &Service,
    lines: &[(TestUser, ConversationId)],
    watching: &[(TestUser, EventSource)],
) {
    for (user, browser) in watching {
        assert_exact(&world.sql, user.id, &user.name, browser).await;
    }
    for (user, conversation) in lines {
        world.say(api, user, *conversation).await;
    }
    for (user, browser) in watching {
        assert_exact(&world.sql, user.id, &user.name, browser).await;
    }
}

pub(crate) async fn assert_stored(world: &World, accepted: &[String]) {
    let ids: Vec<i64> = accepted.iter().map(|id| id.parse().unwrap()).collect();
    let stored = sqlx::query_scalar("SELECT count(*) FROM messenger.messages WHERE id = ANY($1)").bind(&ids);
    let stored: i64 = stored.fetch_one(&world.sql).await.unwrap();
    assert_eq!(usize::try_from(stored).unwrap(), ids.len(), "every accepted message is there");
}

/// Besides these, each line got one more.
pub(crate) async fn assert_stored_once(world: &World, accepted: &[String], lines: usize) {
    let stored = sqlx::query_scalar("SELECT count(*) FROM messenger.messages").fetch_one(&world.sql).await;
    let stored: i64 = stored.unwrap();
    assert_eq!(usize::try_from(stored).unwrap(), accepted.len() + lines, "each was taken once");
}
