//! One connection to Redis, or to one node of a cluster, supervised. What is confirmed on it is known only here, and only after
//! Redis has said so.
//!
//! A cluster says by itself that a channel's slot has gone elsewhere, by a confirmation of an unsubscription that nobody asked for,
//! in between the answers to what was asked. Where it could be taken for one of those, the connection is given up.

use std::{
    collections::HashSet,
    convert::Infallible,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use protocol::{
    channels::Channels,
    event::{Notice, Revoked},
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
    sync::{Notify, mpsc},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Board, Health, Link, News, Subscriber,
    wishes::{Batch, Wishes},
};
use crate::{
    frame::MAX_ENVELOPE,
    keys::Keys,
    metrics::{DeliveryPath, Metrics},
    traced,
};

/// An overload lasts; its log line does not say so hundreds of times.
const OVERFLOWS_TOLD_EVERY: Duration = Duration::from_secs(1);
const BEAT_EVERY: Duration = Duration::from_secs(2);
/// Beats are published over a connection of their own. It is made again this often, drawn at random, to notice that the address
/// leads to another server: until then events of that one arrive by reconcile.
const PROBE_RENEWED_AFTER: std::ops::Range<f64> = 10.0..20.0;
/// Beats in a row before a Redis that was lost is trusted again. Publishers come back after their own back-off, and drop events
/// until then: the reconcile that goes with trust finds those.
const BEATS_TO_TRUST_AGAIN: u64 = 2;
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
const BACKOFF: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(2)];

pub(super) struct Listener {
    topology: RedisTopology,
    node: Node,
    slot_maps: SlotMapWatch,
    channels: Channels,
    keys: Arc<Keys>,
    wishes: Wishes,
    news: mpsc::Sender<News>,
    board: Arc<Board>,
    tracer: Tracer,
    metrics: Arc<Metrics>,
    /// Redis, or the node, is not met for the first time.
    again: AtomicBool,
    /// Channels that this connection has in the metric.
    counted: AtomicI64,
}

/// What the connection's driver notes for the supervisor. The driver must not wait, so it only leaves marks.
#[derive(Default)]
struct Marks {
    noticed: Notify,
    gone: AtomicBool,
    overflows: AtomicU64,
    /// The newest beat that came back.
    beat: AtomicU64,
    beat_noticed: Notify,
    asking: Mutex<Asking>,
}

/// Whether answers are on their way, and who was sent elsewhere.
#[derive(Default)]
struct Asking {
    /// While a command is not answered: the channels that it leaves.
    leaving: Option<HashSet<Vec<u8>>>,
    sent_away: Vec<UserId>,
}

impl Marks {
    fn is_gone(&self) {
        self.gone.store(true, Ordering::Release);
        self.noticed.notify_one();
    }

    fn asks(&self, leaving: Option<HashSet<Vec<u8>>>) {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner).leaving = leaving;
    }

    /// Redis says that a channel is left: by our wish, or because its slot is.
    fn left(&self, channel: &[u8], channels: &Channels) {
        let mut asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        match (&asking.leaving, channels.user_of(channel)) {
            (Some(leaving), _) if leaving.contains(channel) => {}
            (None, Some(user)) => {
                asking.sent_away.push(user);
                self.noticed.notify_one();
            }
            // The answers are one behind from here on; or it is the beat's or the keys'.
            _ => self.is_gone(),
        }
    }

    fn sent_away(&self) -> Vec<UserId> {
        std::mem::take(&mut self.asking.lock().unwrap_or_else(PoisonError::into_inner).sent_away)
    }
}

/// A connection in use.
struct Ear {
    connection: MultiplexedConnection,
    link: Link,
    marks: Arc<Marks>,
    beat_channel: String,
    beats: u64,
    probe: Option<Probe>,
    /// Confirmed.
    actual: HashSet<UserId>,
    /// Wanted here, and not to be had: asked for again with the next beat.
    refused: HashSet<UserId>,
}

/// While a connection is in use, or in the making. What it claimed is taken back when it ends, even by a panic.
struct Listening<'a> {
    listener: &'a Listener,
    link: Link,
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        let Listener { wishes, board, node, .. } = self.listener;
        wishes.end(node, self.link);
        board.note(node, Health::default());
        self.listener.count(0);
    }
}

/// The connection that publishes beats.
struct Probe {
    connection: MultiplexedConnection,
    renew_at: Instant,
}

impl Listener {
    /// `again`: it takes the place of another one.
    pub(super) fn new(
        of: &Subscriber,
        node: Node,
        slot_maps: SlotMapWatch,
        board: Arc<Board>,
        again: bool,
    ) -> Self {
        Self {
            topology: of.topology.clone(),
            node,
            slot_maps,
            channels: of.channels.clone(),
            keys: of.keys.clone(),
            wishes: of.wishes.clone(),
            news: of.news.clone(),
            board,
            tracer: of.tracer.clone(),
            metrics: of.metrics.clone(),
            again: AtomicBool::new(again),
            counted: AtomicI64::new(0),
        }
    }

    /// Listens until `stop`.
    pub(super) async fn run(self, stop: CancellationToken) {
        let mut failures = 0;
        let mut backoff = Backoff::new(BACKOFF[0], BACKOFF[1]);
        while !stop.is_cancelled() {
            static LINKS: AtomicU64 = AtomicU64::new(1);
            let link = Link(LINKS.fetch_add(1, Ordering::Relaxed));
            let began = Instant::now();
            let ended = {
                let _listening = Listening { listener: &self, link };
                stop.run_until_cancelled(self.listen(link)).await
            };
            let lost = self.news.send(News::Lost(link)).await;
            let (Some(Err(error)), Ok(())) = (ended, lost) else { break };
            self.again.store(true, Ordering::Relaxed);
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
                    "Redis refuses us: see the user, the password and the rights; events arrive by reconcile, a little later");
            } else {
                tracing::warn!(error = why, node = %self.node, failures, ?wait,
                    "Redis is away; events arrive by reconcile, a little later");
            }
            stop.run_until_cancelled(sleep(wait)).await;
        }
        // Without the delivery thread there is nothing to do.
        stop.cancelled().await;
    }

    /// One connection, until something is wrong with it.
    async fn listen(&self, link: Link) -> anyhow::Result<Infallible> {
        let mut ear = self.connect(link).await?;
        let wishes_changed = self.wishes.start(&self.node, link);
        self.board.note(&self.node, Health { connected: true, trusted: false });
        tracing::info!(node = %self.node, channels = self.wishes.count(), "listening to Redis");
        let marks = ear.marks.clone();
        let mut next_beat = Instant::now();
        let (mut told, mut untold) = (None::<Instant>, 0);
        loop {
            tokio::select! {
                () = wishes_changed.notified() => self.follow_wishes(&mut ear).await?,
                () = marks.noticed.notified() => {
                    anyhow::ensure!(!marks.gone.load(Ordering::Acquire), "the connection broke");
                    self.note_sent_away(&mut ear).await?;
                    let missed = marks.overflows.swap(0, Ordering::AcqRel);
                    if missed > 0 {
                        self.news.send(News::Missed).await?;
                        untold += missed;
                        if told.is_none_or(|told| told.elapsed() > OVERFLOWS_TOLD_EVERY) {
                            tracing::warn!(missed = untold, "messages from Redis found the queue full; reconciling");
                            (told, untold) = (Some(Instant::now()), 0);
                        }
                    }
                }
                () = tokio::time::sleep_until(next_beat) => {
                    let heard = self.beat(&mut ear).await?;
                    let still_refused = self.wishes.again(&self.node, ear.refused.drain());
                    let enough = ear.beats >= BEATS_TO_TRUST_AGAIN || !self.again.load(Ordering::Relaxed);
                    let trusted = heard && enough && still_refused == 0;
                    self.board.note(&self.node, Health { connected: true, trusted });
                    next_beat = Instant::now() + BEAT_EVERY;
                }
            }
        }
    }

    async fn connect(&self, link: Link) -> anyhow::Result<Ear> {
        let marks = Arc::new(Marks::default());
        let instance = uuid::Uuid::new_v4();
        let names = (0..).map(|turn| self.channels.beat(&format!("{instance}-{turn}")));
        let map = self.slot_maps.clone().now();
        let beat_channel = map.first_name_on(&self.node, names).context("it owns no slot")?;
        let keys_channel = map.first_name_on(&self.node, self.channels.keys()).context("it owns no slot")?;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(ANSWER_WITHIN))
            .set_response_timeout(Some(ANSWER_WITHIN))
            .set_push_sender(self.hears(&beat_channel, &keys_channel, marks.clone()));
        let mut connection = self.topology.connect(&self.node, &config).await.context("cannot connect")?;
        for channel in [&beat_channel, &keys_channel] {
            let mut subscribe =
                redis::cmd(if self.topology.is_sharded() { "SSUBSCRIBE" } else { "SUBSCRIBE" });
            subscribe.arg(channel);
            subscribe.query_async::<()>(&mut connection).await.context("cannot subscribe")?;
        }
        self.metrics.redis_connections_opened.inc();
        let (actual, refused) = Default::default();
        Ok(Ear { connection, link, marks, beat_channel, beats: 0, probe: None, actual, refused })
    }

    /// Runs where the connection is read; must not wait.
    fn hears(
        &self,
        beat_channel: &str,
        keys_channel: &str,
        marks: Arc<Marks>,
    ) -> impl Fn(PushInfo) -> Result<(), ()> + use<> {
        let channels = self.channels.clone();
        let [beat_channel, keys_channel] =
            [beat_channel, keys_channel].map(|channel| channel.as_bytes().to_vec());
        let keys = self.keys.clone();
        let news = self.news.clone();
        let tracer = self.tracer.clone();
        let metrics = self.metrics.clone();
        move |push| {
            match push.kind {
                PushKind::Message | PushKind::SMessage => {}
                PushKind::Disconnection => {
                    marks.is_gone();
                    return Ok(());
                }
                PushKind::SUnsubscribe => {
                    if let Some(Value::BulkString(channel)) = push.data.first() {
                        marks.left(channel, &channels);
                    }
                    return Ok(());
                }
                // Confirmations are awaited as replies.
                _ => return Ok(()),
            }
            let [Value::BulkString(channel), Value::BulkString(payload)] = push.data.as_slice() else {
                metrics.redis_invalid_messages.inc();
                return Ok(());
            };
            if *channel == beat_channel {
                if let Some(beat) = std::str::from_utf8(payload).ok().and_then(|text| text.parse().ok()) {
                    marks.beat.fetch_max(beat, Ordering::AcqRel);
                    marks.beat_noticed.notify_one();
                }
                return Ok(());
            }
            if *channel == keys_channel {
                match serde_json::from_slice(payload) {
                    Ok(version) => keys.hear_of(&version),
                    Err(_) => _ = metrics.redis_invalid_messages.inc(),
                }
                return Ok(());
            }
            let Some(user) = channels.user_of(channel) else {
                metrics.redis_invalid_messages.inc();
                return Ok(());
            };
            let message = read(&tracer, user, payload).unwrap_or_else(|| {
                // Of a newer api, or a stranger's: the feed has it if it is an event.
                metrics.redis_invalid_messages.inc();
                News::Doubted(user)
            });
            if news.try_send(message).is_err() {
                metrics.redis_dropped_messages.inc();
                marks.overflows.fetch_add(1, Ordering::AcqRel);
                marks.noticed.notify_one();
            }
            Ok(())
        }
    }

    async fn follow_wishes(&self, ear: &mut Ear) -> anyhow::Result<()> {
        let Batch { join, leave, back } = self.wishes.take(&self.node, &ear.actual);
        // One command after the other: a confirmation then always belongs to the newest command on its channel.
        if !leave.is_empty() {
            self.unsubscribe(ear, &leave).await?;
            leave.iter().for_each(|user| _ = ear.actual.remove(user));
        }
        if !join.is_empty() {
            let joined = self.subscribe(ear, join).await?;
            ear.actual.extend(&joined);
            self.news.send(News::Confirmed(ear.link, joined)).await?;
        }
        if !back.is_empty() {
            self.news.send(News::Confirmed(ear.link, back)).await?;
        }
        self.count(ear.actual.len());
        Ok(())
    }

    /// Those that Redis confirms: all, or on a cluster those whose slot is here.
    async fn subscribe(&self, ear: &mut Ear, users: Vec<UserId>) -> anyhow::Result<Vec<UserId>> {
        if !self.topology.is_sharded() {
            ear.connection.subscribe(self.names(&users)).await.context("cannot subscribe")?;
            return Ok(users);
        }
        ear.refused.extend(&users);
        let mut joined = Vec::with_capacity(users.len());
        let mut failed = None;
        for answer in self.ask_for_each(ear, "SSUBSCRIBE", &users, HashSet::new()).await? {
            match answer {
                Ok(Value::Push { kind: PushKind::SSubscribe, data }) => {
                    if let Some(Value::BulkString(channel)) = data.first()
                        && let Some(user) = self.channels.user_of(channel)
                        && ear.refused.remove(&user)
                    {
                        joined.push(user);
                    }
                }
                Ok(_) => {}
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(error) if redis_topology::is_access_denied(&error) => Err(error).context("cannot subscribe"),
            Some(error) => {
                tracing::info!(%error, node = %self.node, refused = ear.refused.len(), "channels are not to be had here");
                self.slot_maps.refresh();
                Ok(joined)
            }
            None => Ok(joined),
        }
    }

    async fn unsubscribe(&self, ear: &mut Ear, users: &[UserId]) -> anyhow::Result<()> {
        let names = self.names(users);
        if !self.topology.is_sharded() {
            return ear.connection.unsubscribe(names).await.context("cannot unsubscribe");
        }
        let leaving = names.into_iter().map(String::into_bytes).collect();
        let answers = self.ask_for_each(ear, "SUNSUBSCRIBE", users, leaving).await?;
        // What is not confirmed here was so before we asked, and answers are out of step.
        answers.into_iter().collect::<RedisResult<Vec<_>>>().context("cannot unsubscribe")?;
        Ok(())
    }

    /// One command for each channel, as each has a slot of its own, in one go.
    async fn ask_for_each(
        &self,
        ear: &mut Ear,
        command: &str,
        users: &[UserId],
        leaving: HashSet<Vec<u8>>,
    ) -> anyhow::Result<Vec<RedisResult<Value>>> {
        let mut pipeline = redis::Pipeline::with_capacity(users.len());
        for name in self.names(users) {
            pipeline.cmd(command).arg(name);
        }
        ear.marks.asks(Some(leaving));
        let answers = pipeline.ignore_errors().query_async(&mut ear.connection).await;
        ear.marks.asks(None);
        answers.context("Redis does not answer about channels")
    }

    /// The node brings nothing for them any more. Who owns them now will be told to, as soon as the map says who that is.
    async fn note_sent_away(&self, ear: &mut Ear) -> anyhow::Result<()> {
        let users = ear.marks.sent_away();
        if users.is_empty() {
            return Ok(());
        }
        tracing::info!(node = %self.node, users = users.len(), "a slot has left the node");
        self.slot_maps.refresh();
        users.iter().for_each(|user| _ = ear.actual.remove(user));
        ear.refused.extend(&users);
        self.count(ear.actual.len());
        self.news.send(News::SentAway(ear.link, users)).await?;
        Ok(())
    }

    fn names(&self, users: &[UserId]) -> Vec<String> {
        users.iter().map(|user| self.channels.user(*user)).collect()
    }

    fn count(&self, actual: usize) {
        let actual = i64::try_from(actual).unwrap_or(i64::MAX);
        self.metrics.actual_subscriptions.inc_by(actual - self.counted.swap(actual, Ordering::Relaxed));
        self.metrics.desired_subscriptions.set(i64::try_from(self.wishes.count()).unwrap_or(i64::MAX));
    }

    /// Whether a message published now, to wherever the address points now, comes back to us. Fails when this connection is
    /// to blame.
    async fn beat(&self, ear: &mut Ear) -> anyhow::Result<bool> {
        ear.marks.asks(Some(HashSet::new()));
        let ping = redis::cmd("PING").query_async::<()>(&mut ear.connection).await;
        ear.marks.asks(None);
        match ping {
            Ok(()) => {}
            // As when its disk is full: messages go through all the same, which the beat shows.
            Err(error) if redis_topology::is_server_error(&error) => {
                tracing::debug!(%error, node = %self.node, "redis answered a ping with an error");
            }
            Err(error) => return Err(error).context("Redis does not answer a ping"),
        }
        ear.beats += 1;
        if let Err(error) = self.publish_beat(ear).await {
            tracing::warn!(%error, node = %self.node, "no beat can be published to Redis");
            self.slot_maps.refresh();
            return Ok(false);
        }
        let heard = async {
            while ear.marks.beat.load(Ordering::Acquire) < ear.beats {
                ear.marks.beat_noticed.notified().await;
            }
        };
        timeout(ANSWER_WITHIN, heard).await.context("a beat through Redis did not come back")?;
        Ok(true)
    }

    async fn publish_beat(&self, ear: &mut Ear) -> RedisResult<()> {
        let mut beat = self.topology.publish_command();
        beat.arg(&ear.beat_channel).arg(ear.beats);
        if let Some(probe) = &mut ear.probe
            && Instant::now() < probe.renew_at
        {
            match beat.query_async(&mut probe.connection).await {
                // It was closed, most likely: a new connection tells whether Redis is well.
                Err(error) if !redis_topology::is_server_error(&error) => {}
                answered => return answered,
            }
        }
        ear.probe = None;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(ANSWER_WITHIN))
            .set_response_timeout(Some(ANSWER_WITHIN));
        let connection = self.topology.connect(&self.node, &config).await?;
        self.metrics.redis_probe_connections_opened.inc();
        let renew_at =
            Instant::now() + Duration::from_secs_f64(rand::rng().random_range(PROBE_RENEWED_AFTER));
        let probe = ear.probe.insert(Probe { connection, renew_at });
        beat.query_async(&mut probe.connection).await
    }
}

fn read(tracer: &Tracer, user: UserId, payload: &[u8]) -> Option<News> {
    if payload.len() > MAX_ENVELOPE {
        return None;
    }
    match Notice::from_json(payload).ok()? {
        Notice::Event(envelope) => traced::receive(tracer, user, &envelope, DeliveryPath::Redis)
            .ok()
            .map(|event| News::Event(user, event)),
        Notice::Revoked(Revoked { revoked }) => Some(News::Revoked(user, revoked)),
    }
}

#[cfg(test)]
mod tests {
    use protocol::ids::SessionId;
    use service_kit::{secrets::Secrets, tasks::Tasks};

    use super::*;
    use crate::backfill::Api;

    #[tokio::test]
    async fn a_listener_that_panics_leaves_redis_degraded() {
        let (news, _news) = mpsc::channel(1);
        let topology = RedisTopology::single("redis://localhost").unwrap();
        let metrics = Arc::new(Metrics::default());
        let api = Api::new("http://localhost", Secrets::random(), metrics.clone());
        let subscriber = Subscriber {
            topology: topology.clone(),
            channels: Channels::default(),
            keys: Arc::new(Keys::new("http://localhost", api, metrics.clone())),
            wishes: Wishes::new(Channels::default()),
            news,
            tracer: Tracer::default(),
            tasks: Tasks::default(),
            metrics,
        };
        let board = Arc::new(Board::default());
        let listener =
            Listener::new(&subscriber, Node::Only, topology.watch_slot_map().0, board.clone(), false);
        let (link, panicked) = (Link(1), CancellationToken::new());
        let run = {
            let panicked = panicked.clone();
            async move {
                let _listening = Listening { listener: &listener, link };
                listener.wishes.start(&listener.node, link);
                listener.board.note(&listener.node, Health { connected: true, trusted: true });
                panicked.cancelled().await;
                panic!("a defect");
            }
        };
        let running = subscriber.tasks.spawn("redis listener of redis", &CancellationToken::new(), run);
        board.changed.notified().await;
        assert!(board.of(&[Node::Only]).trusted);
        panicked.cancel();
        running.await.unwrap();
        assert!(board.of(&[Node::Only]) == Health::default());
        assert_eq!(subscriber.tasks.failure().unwrap().task, "redis listener of redis");
    }

    #[test]
    fn a_payload_of_another_form_is_none_of_ours() {
        for payload in [&b""[..], b"{}", b"[]", b"null", b"\xff", &vec![b' '; MAX_ENVELOPE + 1]] {
            assert!(read(&Tracer::default(), UserId(1), payload).is_none());
        }
        let revoked = read(&Tracer::default(), UserId(1), br#"{"revoked":"5"}"#);
        assert!(matches!(revoked, Some(News::Revoked(UserId(1), SessionId(5)))));
    }
}
