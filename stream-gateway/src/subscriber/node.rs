//! One supervised connection to Redis, or to one node of a cluster, and its confirmed subscriptions.
//!
//! When a slot moves, a cluster node sends an unrequested SUNSUBSCRIBE confirmation between its other replies. Where it could be
//! mistaken for the reply to a command in flight, the connection is closed.

use std::{
    collections::HashSet,
    convert::Infallible,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use protocol::{
    channels::Channels,
    event::{Ephemeral, LARGEST_EPHEMERAL, Notice, Revoked},
    ids::UserId,
};
use rand::RngExt;
use redis::{AsyncConnectionConfig, PushInfo, PushKind, RedisResult, Value, aio::MultiplexedConnection};
use service_kit::{
    backoff::Backoff,
    redis_topology::{self, Node, RedisTopology, SlotMapWatch},
    traces::Tracer,
};
use tokio::{
    runtime::Handle,
    sync::{Notify, mpsc},
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    Health, HealthBoard, QUEUE, RedisConnectionId, RedisUpdate, Subscriber,
    desired::{Batch, DesiredSubscriptions},
    messages::{MESSAGES_PER_READ, MessageStream, Receiver},
};
use crate::{
    event::EncodedEvent,
    frame::{self, MAX_ENVELOPE},
    keys::Keys,
    metrics::{DeliveryPath, Metrics},
};

/// A connection that is so far behind drops its messages. Less than [`RESPONSE_TIMEOUT`], which a health probe must meet.
const PATIENCE: Duration = Duration::from_secs(1);
const OVERFLOWS_LOGGED_EVERY: Duration = Duration::from_secs(1);
/// Updates from other threads that may come while a connection is read.
const OTHER_UPDATES: usize = 1_024;
const _: () = assert!(MESSAGES_PER_READ + OTHER_UPDATES < QUEUE, "an empty queue has room for a read");
const PROBE_INTERVAL: Duration = Duration::from_secs(2);
/// Age at which the connection that publishes health probes is replaced, in seconds, drawn at random. Only a new connection
/// notices that the address leads to another server; until then a reconcile delivers the events of that server.
const PUBLISHER_RENEWED_AFTER: std::ops::Range<f64> = 10.0..20.0;
/// Health probes that must return before a reconnected Redis counts as healthy. Publishers reconnect after their own back-off
/// and drop events until then: the reconcile on recovery finds those.
const PROBES_TO_RECOVER: u64 = 2;
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);
const BACKOFF: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(2)];

pub(super) struct NodeSubscriber {
    topology: RedisTopology,
    node: Node,
    slot_maps: SlotMapWatch,
    channels: Channels,
    keys: Arc<Keys>,
    desired: DesiredSubscriptions,
    updates: mpsc::Sender<RedisUpdate>,
    delivery: Handle,
    board: Arc<HealthBoard>,
    tracer: Tracer,
    metrics: Arc<Metrics>,
    /// There was an earlier connection to Redis.
    reconnecting: AtomicBool,
    /// This connection's share of the metric.
    counted: AtomicI64,
}

/// Marks that the connection's driver sets, because it must not wait.
#[derive(Default)]
struct Signals {
    noticed: Notify,
    disconnected: AtomicBool,
    /// The newest health probe that returned.
    last_probe: AtomicU64,
    probe_noticed: Notify,
    replies: Mutex<PendingReplies>,
}

#[derive(Default)]
struct PendingReplies {
    /// While a command is in flight: the channels that it unsubscribes.
    unsubscribing: Option<HashSet<Vec<u8>>>,
    /// Users whose slot has moved to another node.
    moved: Vec<UserId>,
}

impl Signals {
    fn mark_disconnected(&self) {
        self.disconnected.store(true, Ordering::Release);
        self.noticed.notify_one();
    }

    fn expect(&self, unsubscribing: Option<HashSet<Vec<u8>>>) {
        self.replies.lock().unwrap_or_else(PoisonError::into_inner).unsubscribing = unsubscribing;
    }

    /// A confirmation: of our own command, or because the slot has moved.
    fn on_unsubscribed(&self, channel: &[u8], channels: &Channels) {
        let mut replies = self.replies.lock().unwrap_or_else(PoisonError::into_inner);
        match (&replies.unsubscribing, channels.user_of(channel)) {
            (Some(unsubscribing), _) if unsubscribing.contains(channel) => {}
            (None, Some(user)) => {
                replies.moved.push(user);
                self.noticed.notify_one();
            }
            // It may have been taken for a reply, so later replies would be off by one; or it is the probe's or the keys' channel.
            _ => self.mark_disconnected(),
        }
    }

    fn moved(&self) -> Vec<UserId> {
        std::mem::take(&mut self.replies.lock().unwrap_or_else(PoisonError::into_inner).moved)
    }
}

struct NodeConnection {
    redis: MultiplexedConnection,
    /// Reads and writes the connection, on the delivery thread.
    _driver: AbortOnDropHandle<()>,
    id: RedisConnectionId,
    signals: Arc<Signals>,
    probe_channel: String,
    probes: u64,
    publisher: Option<ProbePublisher>,
    actual: HashSet<UserId>,
    /// Desired here, but the node rejected the subscription: retried with the next health probe.
    rejected: HashSet<UserId>,
}

/// Withdraws on drop, even after a panic, what a connection has registered.
struct Registration<'a> {
    subscriber: &'a NodeSubscriber,
    id: RedisConnectionId,
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        let NodeSubscriber { desired, board, node, .. } = self.subscriber;
        desired.detach(node, self.id);
        board.note(node, Health::default());
        self.subscriber.count(0);
    }
}

/// The connection that publishes health probes.
struct ProbePublisher {
    redis: MultiplexedConnection,
    renew_at: Instant,
}

impl NodeSubscriber {
    pub(super) fn new(
        of: &Subscriber,
        node: Node,
        slot_maps: SlotMapWatch,
        board: Arc<HealthBoard>,
        reconnecting: bool,
    ) -> Self {
        Self {
            topology: of.topology.clone(),
            node,
            slot_maps,
            channels: of.channels.clone(),
            keys: of.keys.clone(),
            desired: of.desired.clone(),
            updates: of.updates.clone(),
            delivery: of.delivery.clone(),
            board,
            tracer: of.tracer.clone(),
            metrics: of.metrics.clone(),
            reconnecting: AtomicBool::new(reconnecting),
            counted: AtomicI64::new(0),
        }
    }

    /// Reconnects until `stop`.
    pub(super) async fn run(self, stop: CancellationToken) {
        let mut failures = 0;
        let mut backoff = Backoff::new(BACKOFF[0], BACKOFF[1]);
        while !stop.is_cancelled() {
            static IDS: AtomicU32 = AtomicU32::new(1);
            let id = RedisConnectionId(IDS.fetch_add(1, Ordering::Relaxed));
            let began = Instant::now();
            let ended = {
                let _registration = Registration { subscriber: &self, id };
                stop.run_until_cancelled(self.serve(id)).await
            };
            let lost = self.updates.send(RedisUpdate::Disconnected(id)).await;
            let (Some(Err(error)), Ok(())) = (ended, lost) else { break };
            self.reconnecting.store(true, Ordering::Relaxed);
            self.slot_maps.refresh();
            if began.elapsed() > Duration::from_secs(10) {
                failures = 0;
                backoff.reset();
            }
            failures += 1;
            let wait = backoff.next_delay();
            let why = format!("{error:#}");
            if error.downcast_ref().is_some_and(redis_topology::is_access_denied) {
                tracing::error!(error = why, node = %self.node, failures, ?wait,
                    "{}", redis_topology::ACCESS_DENIED);
            } else {
                tracing::warn!(error = why, node = %self.node, failures, ?wait,
                    "redis connection lost; delivery falls back to reconciliation");
            }
            stop.run_until_cancelled(sleep(wait)).await;
        }
        // The delivery thread has ended.
        stop.cancelled().await;
    }

    /// One connection, until it fails.
    async fn serve(&self, id: RedisConnectionId) -> anyhow::Result<Infallible> {
        let mut connection = self.connect(id).await?;
        let desired_changed = self.desired.attach(&self.node, id);
        self.board.note(&self.node, Health { connected: true, healthy: false });
        tracing::info!(node = %self.node, channels = self.desired.count(), "redis connected; subscribing");
        let signals = connection.signals.clone();
        let mut next_probe = Instant::now();
        loop {
            tokio::select! {
                () = desired_changed.notified() => self.sync_subscriptions(&mut connection).await?,
                () = signals.noticed.notified() => {
                    anyhow::ensure!(!signals.disconnected.load(Ordering::Acquire), "the connection was closed");
                    self.note_moved(&mut connection).await?;
                }
                () = tokio::time::sleep_until(next_probe) => {
                    let came_back = self.probe(&mut connection).await?;
                    let still_rejected = self.desired.retry(&self.node, connection.rejected.drain());
                    let enough = connection.probes >= PROBES_TO_RECOVER || !self.reconnecting.load(Ordering::Relaxed);
                    let healthy = came_back && enough && still_rejected == 0;
                    self.board.note(&self.node, Health { connected: true, healthy });
                    next_probe = Instant::now() + PROBE_INTERVAL;
                }
            }
        }
    }

    async fn connect(&self, id: RedisConnectionId) -> anyhow::Result<NodeConnection> {
        let signals = Arc::new(Signals::default());
        let instance = uuid::Uuid::new_v4();
        let names = (0..).map(|turn| self.channels.probe(&format!("{instance}-{turn}")));
        let map = self.slot_maps.clone().now();
        let probe_channel = map.first_name_on(&self.node, names).context("it owns no slot")?;
        let keys_channel = map.first_name_on(&self.node, self.channels.keys()).context("it owns no slot")?;
        let (mut redis, driver) =
            timeout(RESPONSE_TIMEOUT, self.open([&probe_channel, &keys_channel], signals.clone()))
                .await
                .context("cannot connect in time")??;
        for channel in [&probe_channel, &keys_channel] {
            let mut subscribe =
                redis::cmd(if self.topology.is_sharded() { "SSUBSCRIBE" } else { "SUBSCRIBE" });
            subscribe.arg(channel);
            subscribe.query_async::<()>(&mut redis).await.context("cannot subscribe")?;
        }
        self.metrics.redis_connections_opened.inc();
        let (actual, rejected) = Default::default();
        Ok(NodeConnection {
            redis,
            _driver: driver,
            id,
            signals,
            probe_channel,
            probes: 0,
            publisher: None,
            actual,
            rejected,
        })
    }

    /// A connection that is read on the delivery thread.
    #[expect(clippy::disallowed_methods, reason = "both tasks end with what is returned")]
    async fn open(
        &self,
        [probe_channel, keys_channel]: [&str; 2],
        signals: Arc<Signals>,
    ) -> anyhow::Result<(MultiplexedConnection, AbortOnDropHandle<()>)> {
        let address = self.topology.address(&self.node).await.context("cannot connect")?;
        let receiver = MessageReceiver {
            channels: self.channels.clone(),
            probe_channel: probe_channel.into(),
            keys_channel: keys_channel.into(),
            keys: self.keys.clone(),
            updates: self.updates.clone(),
            signals: signals.clone(),
            tracer: self.tracer.clone(),
            metrics: self.metrics.clone(),
            dropped: 0,
            logged_at: None,
        };
        let config = AsyncConnectionConfig::new()
            .set_response_timeout(Some(RESPONSE_TIMEOUT))
            .set_push_sender(push_handler(self.channels.clone(), signals));
        let connecting = self.delivery.spawn(async move {
            let stream = MessageStream::new(address.connect().await?, MAX_ENVELOPE, PATIENCE, receiver);
            let (redis, driver) =
                MultiplexedConnection::new_with_config(address.login(), stream, config).await?;
            RedisResult::Ok((redis, AbortOnDropHandle::new(tokio::spawn(driver))))
        });
        let connected = AbortOnDropHandle::new(connecting).await.context("the delivery thread has ended")?;
        connected.context("cannot connect")
    }

    async fn sync_subscriptions(&self, connection: &mut NodeConnection) -> anyhow::Result<()> {
        let Batch { subscribe, unsubscribe, unchanged } =
            self.desired.next_batch(&self.node, &connection.actual);
        // One command at a time, so that a confirmation belongs to the newest command on its channel.
        if !unsubscribe.is_empty() {
            self.unsubscribe(connection, &unsubscribe).await?;
            unsubscribe.iter().for_each(|user| _ = connection.actual.remove(user));
        }
        if !subscribe.is_empty() {
            let subscribed = self.subscribe(connection, subscribe).await?;
            connection.actual.extend(&subscribed);
            self.updates.send(RedisUpdate::Subscribed(connection.id, subscribed)).await?;
        }
        if !unchanged.is_empty() {
            self.updates.send(RedisUpdate::Subscribed(connection.id, unchanged)).await?;
        }
        self.count(connection.actual.len());
        Ok(())
    }

    /// Returns the users whose channels Redis confirms; a cluster node rejects those whose slot it does not own.
    async fn subscribe(
        &self,
        connection: &mut NodeConnection,
        users: Vec<UserId>,
    ) -> anyhow::Result<Vec<UserId>> {
        if !self.topology.is_sharded() {
            connection.redis.subscribe(self.names(&users)).await.context("cannot subscribe")?;
            return Ok(users);
        }
        connection.rejected.extend(&users);
        let mut subscribed = Vec::with_capacity(users.len());
        let mut failed = None;
        for answer in self.send_for_each(connection, "SSUBSCRIBE", &users, HashSet::new()).await? {
            match answer {
                Ok(Value::Push { kind: PushKind::SSubscribe, data }) => {
                    if let Some(Value::BulkString(channel)) = data.first()
                        && let Some(user) = self.channels.user_of(channel)
                        && connection.rejected.remove(&user)
                    {
                        subscribed.push(user);
                    }
                }
                Ok(_) => {}
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(error) if redis_topology::is_access_denied(&error) => Err(error).context("cannot subscribe"),
            Some(error) => {
                tracing::info!(%error, node = %self.node, rejected = connection.rejected.len(), "redis node rejected subscriptions; refreshing the slot map");
                self.slot_maps.refresh();
                Ok(subscribed)
            }
            None => Ok(subscribed),
        }
    }

    async fn unsubscribe(&self, connection: &mut NodeConnection, users: &[UserId]) -> anyhow::Result<()> {
        let names = self.names(users);
        if !self.topology.is_sharded() {
            return connection.redis.unsubscribe(names).await.context("cannot unsubscribe");
        }
        let unsubscribing = names.into_iter().map(String::into_bytes).collect();
        let answers = self.send_for_each(connection, "SUNSUBSCRIBE", users, unsubscribing).await?;
        // A missing confirmation came before the command: the replies are off by one.
        answers.into_iter().collect::<RedisResult<Vec<_>>>().context("cannot unsubscribe")?;
        Ok(())
    }

    /// A pipeline of one command per channel, because the channels may be in different slots.
    async fn send_for_each(
        &self,
        connection: &mut NodeConnection,
        command: &str,
        users: &[UserId],
        unsubscribing: HashSet<Vec<u8>>,
    ) -> anyhow::Result<Vec<RedisResult<Value>>> {
        let mut pipeline = redis::Pipeline::with_capacity(users.len());
        for name in self.names(users) {
            pipeline.cmd(command).arg(name);
        }
        connection.signals.expect(Some(unsubscribing));
        let answers = pipeline.ignore_errors().query_async(&mut connection.redis).await;
        connection.signals.expect(None);
        answers.context("no answer to subscription commands")
    }

    /// The node delivers nothing for moved slots any more. The refreshed slot map assigns them to their new node.
    async fn note_moved(&self, connection: &mut NodeConnection) -> anyhow::Result<()> {
        let users = connection.signals.moved();
        if users.is_empty() {
            return Ok(());
        }
        tracing::info!(node = %self.node, users = users.len(), "redis slots moved to another node; resubscribing");
        self.slot_maps.refresh();
        users.iter().for_each(|user| _ = connection.actual.remove(user));
        connection.rejected.extend(&users);
        self.count(connection.actual.len());
        self.updates.send(RedisUpdate::Moved(connection.id, users)).await?;
        Ok(())
    }

    fn names(&self, users: &[UserId]) -> Vec<String> {
        users.iter().map(|user| self.channels.user(*user)).collect()
    }

    fn count(&self, actual: usize) {
        let actual = i64::try_from(actual).unwrap_or(i64::MAX);
        self.metrics.actual_subscriptions.inc_by(actual - self.counted.swap(actual, Ordering::Relaxed));
        self.metrics.desired_subscriptions.set(i64::try_from(self.desired.count()).unwrap_or(i64::MAX));
    }

    /// Whether a message published now, to the server now behind the address, returns. Fails if this connection is the cause.
    async fn probe(&self, connection: &mut NodeConnection) -> anyhow::Result<bool> {
        connection.signals.expect(Some(HashSet::new()));
        let ping = redis::cmd("PING").query_async::<()>(&mut connection.redis).await;
        connection.signals.expect(None);
        match ping {
            Ok(()) => {}
            // For example, its disk is full: messages still pass, which the probe shows.
            Err(error) if redis_topology::is_server_error(&error) => {
                tracing::debug!(%error, node = %self.node, "redis answered PING with an error; the health probe decides");
            }
            Err(error) => return Err(error).context("no answer to PING"),
        }
        connection.probes += 1;
        if let Err(error) = self.publish_probe(connection).await {
            tracing::warn!(%error, node = %self.node, "redis health probe could not publish");
            self.slot_maps.refresh();
            return Ok(false);
        }
        let came_back = async {
            while connection.signals.last_probe.load(Ordering::Acquire) < connection.probes {
                connection.signals.probe_noticed.notified().await;
            }
        };
        timeout(RESPONSE_TIMEOUT, came_back).await.context("a health probe did not return")?;
        Ok(true)
    }

    async fn publish_probe(&self, connection: &mut NodeConnection) -> RedisResult<()> {
        let mut publish = self.topology.publish_command();
        publish.arg(&connection.probe_channel).arg(connection.probes);
        if let Some(publisher) = &mut connection.publisher
            && Instant::now() < publisher.renew_at
        {
            match publish.query_async(&mut publisher.redis).await {
                // Probably closed: a new connection shows whether Redis is healthy.
                Err(error) if !redis_topology::is_server_error(&error) => {}
                answered => return answered,
            }
        }
        connection.publisher = None;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(RESPONSE_TIMEOUT))
            .set_response_timeout(Some(RESPONSE_TIMEOUT));
        let redis = self.topology.connect(&self.node, &config).await?;
        self.metrics.redis_probe_connections_opened.inc();
        let renew_at =
            Instant::now() + Duration::from_secs_f64(rand::rng().random_range(PUBLISHER_RENEWED_AFTER));
        let publisher = connection.publisher.insert(ProbePublisher { redis, renew_at });
        publish.query_async(&mut publisher.redis).await
    }
}

/// Of what is no message. Runs in the connection's driver; must not wait.
fn push_handler(channels: Channels, signals: Arc<Signals>) -> impl Fn(PushInfo) -> Result<(), ()> {
    move |push| {
        match push.kind {
            PushKind::Disconnection => signals.mark_disconnected(),
            PushKind::SUnsubscribe => {
                if let Some(Value::BulkString(channel)) = push.data.first() {
                    signals.on_unsubscribed(channel, &channels);
                }
            }
            // Confirmations are awaited as replies.
            _ => {}
        }
        Ok(())
    }
}

/// Passes messages to the engine, from its own thread.
struct MessageReceiver {
    channels: Channels,
    probe_channel: Box<str>,
    keys_channel: Box<str>,
    keys: Arc<Keys>,
    updates: mpsc::Sender<RedisUpdate>,
    signals: Arc<Signals>,
    tracer: Tracer,
    metrics: Arc<Metrics>,
    /// Since the connection was last caught up.
    dropped: u64,
    logged_at: Option<Instant>,
}

impl Receiver for MessageReceiver {
    fn has_room(&self) -> bool {
        self.updates.capacity() >= MESSAGES_PER_READ + OTHER_UPDATES
    }

    fn receive(&mut self, channel: &[u8], payload: Option<&[u8]>, late: bool) {
        let Some(user) = self.channels.user_of(channel) else { return self.receive_other(channel, payload) };
        let ephemeral = payload.is_some_and(Ephemeral::is_one);
        if late && ephemeral {
            self.metrics.ephemeral_dropped("late").inc();
            return;
        }
        if late {
            self.metrics.redis_dropped_messages.inc();
            self.dropped += 1;
            return;
        }
        let read = payload.and_then(|payload| read(&self.tracer, user, payload));
        if read.is_none() && ephemeral {
            // Nothing of a feed is missing.
            self.metrics.ephemeral_dropped("invalid").inc();
            return;
        }
        let update = read.unwrap_or_else(|| {
            // From a newer api or another publisher: if it is an event, the feed has it.
            self.metrics.redis_invalid_messages.inc();
            RedisUpdate::Uncertain(user)
        });
        self.send(update);
    }

    fn caught_up(&mut self) {
        let dropped = std::mem::take(&mut self.dropped);
        if dropped == 0 {
            return;
        }
        self.send(RedisUpdate::Dropped);
        if self.logged_at.is_none_or(|logged_at| logged_at.elapsed() > OVERFLOWS_LOGGED_EVERY) {
            tracing::warn!(dropped, "redis messages dropped: delivery is a second behind; reconciling");
            self.logged_at = Some(Instant::now());
        }
    }
}

impl MessageReceiver {
    fn send(&self, update: RedisUpdate) {
        if self.updates.try_send(update).is_err() {
            // The engine has ended; were the queue full, the reconcile after a disconnection would recover the event.
            self.signals.mark_disconnected();
        }
    }

    fn receive_other(&self, channel: &[u8], payload: Option<&[u8]>) {
        let payload = payload.unwrap_or_default();
        if channel == self.probe_channel.as_bytes() {
            if let Some(probe) = std::str::from_utf8(payload).ok().and_then(|text| text.parse().ok()) {
                self.signals.last_probe.fetch_max(probe, Ordering::AcqRel);
                self.signals.probe_noticed.notify_one();
            }
            return;
        }
        match serde_json::from_slice(payload) {
            Ok(version) if channel == self.keys_channel.as_bytes() => self.keys.notice_version(&version),
            _ => _ = self.metrics.redis_invalid_messages.inc(),
        }
    }
}

fn read(tracer: &Tracer, user: UserId, payload: &[u8]) -> Option<RedisUpdate> {
    match Notice::from_json(payload).ok()? {
        Notice::Event(envelope) => EncodedEvent::receive(tracer, user, &envelope, DeliveryPath::Redis)
            .ok()
            .map(|event| RedisUpdate::Event(user, event)),
        Notice::Ephemeral(event) => {
            let event = Some(event).filter(|_| payload.len() <= LARGEST_EPHEMERAL);
            event
                .and_then(|event| frame::encode_ephemeral(&event).ok())
                .map(|event| RedisUpdate::Ephemeral(user, event))
        }
        Notice::Revoked(Revoked { revoked }) => Some(RedisUpdate::SessionEnded(user, revoked)),
    }
}

#[cfg(test)]
mod tests {
    use protocol::ids::SessionId;
    use service_kit::{secrets::Secrets, tasks::Tasks};

    use super::*;
    use crate::api_client::ApiClient;

    #[tokio::test]
    async fn panicked_subscriber_leaves_redis_degraded() {
        let (updates, _news) = mpsc::channel(1);
        let topology = RedisTopology::single("redis://localhost").unwrap();
        let metrics = Arc::new(Metrics::default());
        let api = ApiClient::new("http://localhost", Secrets::random(), metrics.clone());
        let owner = Subscriber {
            topology: topology.clone(),
            channels: Channels::default(),
            keys: Arc::new(Keys::new("http://localhost", api, metrics.clone())),
            desired: DesiredSubscriptions::new(Channels::default()),
            updates,
            delivery: Handle::current(),
            tracer: Tracer::default(),
            tasks: Tasks::default(),
            metrics,
        };
        let board = Arc::new(HealthBoard::default());
        let subscriber =
            NodeSubscriber::new(&owner, Node::Only, topology.watch_slot_map().0, board.clone(), false);
        let (id, panicked) = (RedisConnectionId(1), CancellationToken::new());
        let run = {
            let panicked = panicked.clone();
            async move {
                let _registration = Registration { subscriber: &subscriber, id };
                subscriber.desired.attach(&subscriber.node, id);
                subscriber.board.note(&subscriber.node, Health { connected: true, healthy: true });
                panicked.cancelled().await;
                panic!("a defect");
            }
        };
        let running = owner.tasks.spawn("redis subscriber of redis", &CancellationToken::new(), run);
        board.changed.notified().await;
        assert!(board.of(&[Node::Only]).healthy);
        panicked.cancel();
        running.await.unwrap();
        assert!(board.of(&[Node::Only]) == Health::default());
        assert_eq!(owner.tasks.failure().unwrap().task, "redis subscriber of redis");
    }

    #[test]
    fn late_messages_are_dropped_and_end_in_one_reconcile() {
        let (updates, mut news) = mpsc::channel(8);
        let metrics = Arc::new(Metrics::default());
        let api = ApiClient::new("http://localhost", Secrets::random(), metrics.clone());
        let mut receiver = MessageReceiver {
            channels: Channels::default(),
            probe_channel: "probe".into(),
            keys_channel: "keys".into(),
            keys: Arc::new(Keys::new("http://localhost", api, metrics.clone())),
            updates,
            signals: Arc::default(),
            tracer: Tracer::default(),
            metrics: metrics.clone(),
            dropped: 0,
            logged_at: None,
        };
        for channel in ["user:1", "user:2", "probe"] {
            receiver.receive(channel.as_bytes(), Some(b"3"), true);
        }
        let typing = br#"{"ephemeral":"typing","v":1,"data":{}}"#;
        receiver.receive(b"user:3", Some(typing), true);
        receiver.caught_up();
        receiver.caught_up();
        assert!(matches!(news.try_recv(), Ok(RedisUpdate::Dropped)));
        assert!(news.try_recv().is_err());
        assert_eq!(metrics.redis_dropped_messages.get(), 2);
        receiver.receive(b"user:3", Some(typing), true);
        receiver.caught_up();
        assert!(news.try_recv().is_err(), "an ephemeral event is not recovered");
        assert_eq!(metrics.ephemeral_dropped("late").get(), 2);
        assert_eq!(receiver.signals.last_probe.load(Ordering::Acquire), 3, "a probe is never dropped");
    }

    #[test]
    fn invalid_payloads_are_rejected() {
        for payload in [&b""[..], b"{}", b"[]", b"null", b"\xff"] {
            assert!(read(&Tracer::default(), UserId(1), payload).is_none());
        }
        let revoked = read(&Tracer::default(), UserId(1), br#"{"revoked":"5"}"#);
        assert!(matches!(revoked, Some(RedisUpdate::SessionEnded(UserId(1), SessionId(5)))));
    }
}
