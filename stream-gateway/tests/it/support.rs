//! A gateway in this process, with a real Redis behind a fault proxy and a fake `api`.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    ops::RangeInclusive,
    sync::atomic::{AtomicI64, AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

use futures_util::future::join_all;
use protocol::{
    channels::Channels,
    claims::{Audience, Claims, SigningKeys},
    event::Envelope,
    feed::KEYS_PATH,
    ids::{SessionId, UserId},
    keys_version::KeysVersion,
    position::{Epoch, Seq},
};
use redis::{AsyncCommands, aio::MultiplexedConnection};
use serde_json::Value;
use service_kit::settings::Given;
use stream_gateway::{
    app::{self, Listeners},
    config::{self, Cli, Config},
};
use testkit::{
    http::{Answer, Client},
    panics, programs,
    proxy::Proxy,
    soon,
    sse::{End, Event, Stream, StreamRequest},
    until,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::api::{FakeApi, Fault, SECRET};

pub(crate) const ORIGIN: &str = "http://localhost:8080";
pub(crate) const EPOCH: Epoch = Epoch(0xabc);
pub(crate) const ANOTHER_EPOCH: Epoch = Epoch(0xdef);
const PEM: &[u8] = b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f\n-----END PRIVATE KEY-----\n";
const ANOTHER_PEM: &[u8] = b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIB8eHRwbGhkYFxYVFBMSERAPDg0MCwoJCAcGBQQDAgEA\n-----END PRIVATE KEY-----\n";

/// A user with a feed at the fake `api`, and a session.
#[derive(Debug, Clone)]
pub(crate) struct FeedUser {
    pub(crate) id: UserId,
    pub(crate) session: SessionId,
    pub(crate) token: String,
}

pub(crate) struct Setup {
    change: Box<dyn FnOnce(&mut Config)>,
    redis_is_away: bool,
    no_keys: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self { change: Box::new(|_| {}), redis_is_away: false, no_keys: false }
    }
}

impl Setup {
    pub(crate) fn config(change: impl FnOnce(&mut Config) + 'static) -> Self {
        Self { change: Box::new(change), ..Self::default() }
    }

    pub(crate) fn redis_is_away(self) -> Self {
        Self { redis_is_away: true, ..self }
    }

    pub(crate) fn no_keys(self) -> Self {
        Self { no_keys: true, ..self }
    }

    pub(crate) async fn start(self) -> GatewayWorld {
        static WORLDS: AtomicU64 = AtomicU64::new(0);
        panics::watch();
        let prefix = format!("gateway-it:{}:{}:", std::process::id(), WORLDS.fetch_add(1, Ordering::Relaxed));
        let signing = keys();
        let api = FakeApi::start(signing.jwks().clone());
        if self.no_keys {
            api.fault(KEYS_PATH, Fault::Failing);
        }
        let url = redis_url();
        let address = url.socket_addrs(|| Some(6379)).unwrap()[0];
        let network = Proxy::start(address).await;
        if self.redis_is_away {
            network.refuse();
        }
        let mut by_proxy = url.clone();
        by_proxy.set_ip_host(network.address().ip()).unwrap();
        by_proxy.set_port(Some(network.address().port())).unwrap();
        let redis = redis::Client::open(url).unwrap().get_multiplexed_async_connection().await.unwrap();

        let args = [
            "stream-gateway",
            "--listen=127.0.0.1:0",
            "--ops-listen=127.0.0.1:0",
            &format!("--origin={ORIGIN}"),
            &format!("--api-internal-url=http://{}", api.address),
            &format!("--internal-secret={SECRET}"),
            &format!("--redis-url={by_proxy}"),
            &format!("--channel-prefix={prefix}"),
            "--drain-wait-seconds=0",
            "--drain-window-seconds=0",
            // No reconcile, so that only the test's own requests are counted.
            "--reconcile-seconds=300",
            "--degraded-reconcile-millis=60000",
            "--rate-limits=false",
            // All clients share one address.
            "--connections-per-address=0",
        ];
        let (_, given) = Given::parse::<Cli>(&config::rows(), args).unwrap();
        let (mut config, _) = config::for_serving(&given, u64::MAX).unwrap();
        (self.change)(&mut config);
        let listeners = Listeners::bind(&config).unwrap();
        let public = listeners.public.local_addr().unwrap();
        let ops = listeners.ops.local_addr().unwrap();
        let stop = CancellationToken::new();
        let run = tokio::spawn(app::run(config, listeners, stop.clone()));
        let channels = Channels::new(&prefix);
        let client = Client::default();
        let world =
            GatewayWorld { api, network, client, public, ops, redis, channels, prefix, signing, stop, run };
        let usual = if self.redis_is_away { "ready; degraded: Redis is unavailable" } else { "ready\n" };
        let note = if self.no_keys { "no public keys" } else { usual };
        until("the gateway is as the test wants it", || async {
            assert!(!world.run.is_finished(), "the gateway ended instead of starting");
            world.readiness().await.text().starts_with(note)
        })
        .await;
        if !self.redis_is_away {
            world.until_metric("messenger_gateway_redis_degraded", 0).await;
        }
        world.api.forget_requests();
        world
    }
}

pub(crate) struct GatewayWorld {
    pub(crate) api: FakeApi,
    /// Between the gateway and Redis.
    pub(crate) network: Proxy,
    pub(crate) client: Client,
    pub(crate) public: SocketAddr,
    pub(crate) ops: SocketAddr,
    redis: MultiplexedConnection,
    channels: Channels,
    prefix: String,
    signing: SigningKeys,
    stop: CancellationToken,
    run: JoinHandle<anyhow::Result<()>>,
}

fn redis_url() -> Url {
    programs::server("REDIS_URL").parse().unwrap()
}

pub(crate) fn keys() -> SigningKeys {
    SigningKeys::from_pems(ORIGIN, PEM, &[]).unwrap()
}

pub(crate) fn new_keys() -> SigningKeys {
    SigningKeys::from_pems(ORIGIN, ANOTHER_PEM, &[]).unwrap()
}

/// A new key signs; the usual one is still valid.
pub(crate) fn rotated_keys() -> SigningKeys {
    SigningKeys::from_pems(ORIGIN, ANOTHER_PEM, &[PEM.to_vec()]).unwrap()
}

pub(crate) fn now() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs().cast_signed()
}

impl GatewayWorld {
    pub(crate) async fn new() -> Self {
        Setup::default().start().await
    }

    pub(crate) fn user(&self, head: Seq) -> FeedUser {
        static USERS: AtomicI64 = AtomicI64::new(1);
        let id = UserId(USERS.fetch_add(1, Ordering::Relaxed));
        self.api.add(id, EPOCH, head);
        self.another_session(id)
    }

    pub(crate) async fn joined_user(&self, head: Seq) -> (FeedUser, Stream) {
        let user = self.user(head);
        let stream = self.joined(&user).await;
        (user, stream)
    }

    pub(crate) fn another_session(&self, id: UserId) -> FeedUser {
        static SESSIONS: AtomicI64 = AtomicI64::new(1);
        let session = SessionId(SESSIONS.fetch_add(1, Ordering::Relaxed));
        self.api.add_session(id, session);
        let token = self.signing.sign(&claims(id, session, now() + 3_600));
        FeedUser { id, session, token }
    }

    pub(crate) fn opening(&self) -> StreamRequest {
        StreamRequest::new(format!("http://{}/api/messages", self.public))
    }

    pub(crate) fn stream(&self, user: &FeedUser) -> StreamRequest {
        self.opening().bearer(&user.token)
    }

    pub(crate) fn stream_after(&self, user: &FeedUser, seq: Seq) -> StreamRequest {
        self.stream(user).last_event_id(self.api.cursor(user.id, seq))
    }

    /// A live stream at the head of its feed, subscribed and without pending requests.
    pub(crate) async fn joined(&self, user: &FeedUser) -> Stream {
        let before = self.api.record().heads(user.id);
        let mut stream = self.stream(user).stream().await;
        ready(&mut stream, &self.api.cursor(user.id, self.api.head(user.id).seq), false).await;
        self.until_subscribed(user).await;
        self.api.until_requested("the session", |record| record.heads(user.id) > before).await;
        stream
    }

    pub(crate) async fn publish(&self, user: &FeedUser, payload: impl AsRef<[u8]>) {
        let mut redis = self.redis.clone();
        redis.publish::<_, _, ()>(self.channel(user), payload.as_ref()).await.unwrap();
    }

    /// Announces keys as a replica of `api` does every few seconds.
    pub(crate) async fn announce(&self, version: &KeysVersion) {
        let channel = self.channels.keys().next().unwrap();
        let mut redis = self.redis.clone();
        redis.publish::<_, _, ()>(channel, serde_json::to_vec(version).unwrap()).await.unwrap();
    }

    /// In one Redis pipeline, so that the gateway sees one gap.
    pub(crate) async fn publish_together(&self, user: &FeedUser, envelopes: &[Envelope]) {
        let mut pipeline = redis::pipe();
        for envelope in envelopes {
            pipeline.publish(self.channel(user), serde_json::to_vec(envelope).unwrap()).ignore();
        }
        pipeline.query_async::<()>(&mut self.redis.clone()).await.unwrap();
    }

    pub(crate) fn channel(&self, user: &FeedUser) -> String {
        self.channels.user(user.id)
    }

    pub(crate) async fn publish_event(&self, user: &FeedUser, envelope: &Envelope) {
        self.publish(user, serde_json::to_vec(envelope).unwrap()).await;
    }

    /// Commits events that Redis loses.
    pub(crate) fn lose(&self, user: &FeedUser, times: usize) {
        (0..times).for_each(|_| drop(self.api.append(user.id)));
    }

    /// Commits and publishes events; returns the last seq.
    pub(crate) async fn say(&self, user: &FeedUser, times: usize) -> Seq {
        for _ in 0..times {
            let envelope = self.api.append(user.id);
            self.publish_event(user, &envelope).await;
        }
        self.api.head(user.id).seq
    }

    pub(crate) async fn is_subscribed(&self, user: &FeedUser) -> bool {
        let mut redis = self.redis.clone();
        let mut command = redis::cmd("PUBSUB");
        command.arg("NUMSUB").arg(self.channel(user));
        let (_, count): (String, u64) = command.query_async(&mut redis).await.unwrap();
        count > 0
    }

    pub(crate) async fn until_subscribed(&self, user: &FeedUser) {
        until("Redis has the subscription", || self.is_subscribed(user)).await;
    }

    /// Returns when a health probe was published; the next one is due some two seconds later.
    pub(crate) async fn until_health_probe(&self) {
        use futures_util::StreamExt;
        let client = redis::Client::open(redis_url()).unwrap();
        let mut listener = client.get_async_pubsub().await.unwrap();
        listener.psubscribe(format!("{}probe:*", self.prefix)).await.unwrap();
        let mut probes = listener.on_message();
        soon("a health probe", probes.next()).await.unwrap();
    }

    pub(crate) async fn readiness(&self) -> Answer {
        self.client.get(format!("http://{}/readyz", self.ops)).send().await.unwrap()
    }

    /// `api` serves keys from now on.
    pub(crate) async fn until_ready_with_keys(&self) {
        self.api.fault(KEYS_PATH, Fault::None);
        until("the gateway is ready", || async { self.readiness().await.status == 200 }).await;
    }

    /// A metric by name and labels; 0 if absent.
    pub(crate) async fn metric(&self, series: &str) -> u64 {
        let metrics = self.client.get(format!("http://{}/metrics", self.ops)).expect(200).await;
        metrics.metric(series).unwrap_or_default() as u64
    }

    pub(crate) async fn until_metric(&self, name: &str, value: u64) {
        until(&format!("{name} is {value}"), || async { self.metric(name).await == value }).await;
    }

    pub(crate) async fn rejected(&self, reason: &str) -> u64 {
        self.metric(&format!("messenger_gateway_streams_rejected_total{{reason=\"{reason}\"}}")).await
    }

    pub(crate) async fn until_ended(&self, reason: &str, times: u64) {
        self.until_metric(&format!("messenger_gateway_streams_closed_total{{reason=\"{reason}\"}}"), times)
            .await;
    }

    /// Events are counted after they are written, so a client may be ahead of the metric.
    pub(crate) async fn until_delivered(&self, path: &str, times: u64) {
        self.until_metric(&format!("messenger_gateway_events_delivered_total{{path=\"{path}\"}}"), times)
            .await;
    }

    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }

    pub(crate) async fn stopped(self) {
        let run = soon("the gateway ends", self.run).await;
        run.unwrap().unwrap();
        panics::assert_none();
    }

    /// Each test ends with this or `leaves_nothing`: its last streams are closed, none is left, and the gateway stops cleanly.
    pub(crate) fn ends<T>(self, streams: T) -> impl Future<Output = ()> {
        drop(streams);
        self.ends_without_streams()
    }

    async fn ends_without_streams(self) {
        for gauge in ["streams", "slow_consumers", "replay_buffer_bytes"] {
            self.until_metric(&format!("messenger_gateway_{gauge}"), 0).await;
        }
        self.stop();
        self.stopped().await;
    }

    /// As `ends`, and no user is left either; the gateway remembers users for a second.
    pub(crate) fn leaves_nothing<T>(self, streams: T) -> impl Future<Output = ()> {
        drop(streams);
        async {
            self.until_metric("messenger_gateway_users", 0).await;
            if self.metric("messenger_gateway_redis_connected").await == 1 {
                self.until_metric("messenger_gateway_actual_subscriptions", 0).await;
            }
            self.ends_without_streams().await;
        }
    }
}

pub(crate) fn claims(user: UserId, session: SessionId, exp: i64) -> Claims {
    Claims {
        sub: user,
        sid: Some(session),
        iat: now(),
        exp,
        aud: Audience::Api,
        iss: ORIGIN.into(),
        session_exp: None,
    }
}

pub(crate) async fn ready(stream: &mut Stream, cursor: &str, resumed: bool) {
    let ready = stream.named("ready").await;
    assert_eq!(ready.id.as_deref(), Some(cursor));
    assert_eq!(ready.json()["cursor"], cursor);
    assert_eq!(ready.json()["resumed"], resumed);
}

/// Expects `ready` and `resync`: the cursor is not valid.
pub(crate) async fn ready_and_resync(stream: &mut Stream, head: &str, reason: &str) {
    let ready = stream.named("ready").await;
    assert_eq!((ready.id.as_ref(), ready.json()["resumed"].as_bool()), (None, Some(false)));
    resync(stream, head, reason).await;
}

pub(crate) async fn resync(stream: &mut Stream, head: &str, reason: &str) {
    let resync = stream.named("resync").await;
    assert_eq!(resync.id.as_deref(), Some(head));
    assert_eq!(resync.json()["cursor"], head);
    assert_eq!(resync.json()["reason"], reason);
}

pub(crate) async fn all_receive<'a>(
    streams: impl IntoIterator<Item = &'a mut Stream>,
    seqs: RangeInclusive<Seq>,
) {
    for stream in streams {
        receives(stream, seqs.clone()).await;
    }
}

/// Opens these streams together.
pub(crate) async fn open_all(openings: impl IntoIterator<Item = StreamRequest>) -> Vec<Stream> {
    join_all(openings.into_iter().map(|opening| async move { opening.stream().await })).await
}

pub(crate) async fn receives(stream: &mut Stream, seqs: impl IntoIterator<Item = Seq>) {
    for seq in seqs {
        let event = stream.next().await;
        assert_eq!(event.json()["n"], seq, "{event:?}");
        assert!(event.id.as_deref().is_some_and(|id| id.ends_with(&format!("-{seq}"))), "{event:?}");
    }
}

/// Expects the last event, and then the end of the body, not only of the connection.
pub(crate) async fn goodbye(stream: &mut Stream, reason: &str) -> Value {
    let (events, end) = stream.rest().await;
    assert_eq!(end, End::Clean, "after {events:?}");
    let last = events.last().unwrap_or_else(|| panic!("an end without goodbye, {reason} expected"));
    assert!(last.is("goodbye"), "{last:?}");
    let data = last.json();
    assert_eq!((last.id.as_ref(), data["reason"].as_str()), (None, Some(reason)));
    if data["reconnect"] == false {
        assert_eq!(stream.retry, Some(Duration::from_hours(1)), "most readers come back all the same");
    }
    data
}

/// When a client is to come back: soon, or after its limit.
pub(crate) const RETRY_SOON: RangeInclusive<u128> = 2_000..=5_000;
pub(crate) const RETRY_LATER: RangeInclusive<u128> = 60_000..=120_000;

pub(crate) fn assert_retry(stream: &Stream, milliseconds: RangeInclusive<u128>) {
    let retry = stream.retry.expect("a retry").as_millis();
    assert!(milliseconds.contains(&retry), "{retry}");
}

/// The stream writes its goodbye and nothing else.
pub(crate) async fn receives_only_a_goodbye(stream: &mut Stream, reason: &str) -> Value {
    let (events, end) = stream.rest().await;
    assert_eq!(end, End::Clean);
    let [goodbye] = &events[..] else { panic!("{events:?}") };
    assert!(goodbye.is("goodbye"), "{goodbye:?}");
    let data = goodbye.json();
    assert_eq!(data["reason"], reason);
    data
}

/// Events 1 to the last one that came.
pub(crate) fn assert_without_gaps(events: &[Event]) {
    let numbers: Vec<_> = events.iter().map(|event| event.json()["n"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=events.len() as u64).collect::<Vec<_>>());
}

/// How long a test watches for something that must not happen.
pub(crate) const A_WHILE: Duration = Duration::from_millis(300);

pub(crate) async fn silence(stream: &mut Stream) {
    if let Ok(event) = tokio::time::timeout(A_WHILE, stream.event()).await {
        panic!("expected nothing, got {event:?}");
    }
}

pub(crate) fn distinct<T: Ord>(all: impl IntoIterator<Item = T>) -> usize {
    all.into_iter().collect::<BTreeSet<_>>().len()
}

pub(crate) struct Raw {
    pub(crate) socket: TcpStream,
    read: Vec<u8>,
}

impl Raw {
    pub(crate) fn head(user: &FeedUser, version: &str) -> String {
        format!(
            "GET /api/messages HTTP/{version}\r\nHost: x\r\nAccept: text/event-stream\r\nAuthorization: Bearer {}\r\n\r\n",
            user.token
        )
    }

    pub(crate) async fn request(world: &GatewayWorld, user: &FeedUser, version: &str) -> Self {
        let mut socket = TcpStream::connect(world.public).await.unwrap();
        socket.write_all(Self::head(user, version).as_bytes()).await.unwrap();
        Self { socket, read: vec![] }
    }

    pub(crate) async fn open(world: &GatewayWorld, user: &FeedUser) -> Self {
        let mut raw = Self::request(world, user, "1.1").await;
        raw.until("event: ready").await;
        raw
    }

    pub(crate) async fn until(&mut self, text: &str) {
        soon(text, async {
            while !String::from_utf8_lossy(&self.read).contains(text) {
                assert!(self.socket.read_buf(&mut self.read).await.unwrap() > 0, "ended before {text:?}");
            }
        })
        .await;
    }

    pub(crate) async fn until_end(&mut self) {
        soon("the end", async { while matches!(self.socket.read_buf(&mut self.read).await, Ok(1..)) {} })
            .await;
    }

    /// Head and body as they were on the wire.
    pub(crate) async fn whole(mut self) -> (String, String) {
        self.until_end().await;
        let text = String::from_utf8(self.read).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.to_ascii_lowercase(), body.to_owned())
    }
}
