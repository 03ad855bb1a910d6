//! Committed events to Redis: pipelined, bounded, best effort. A doorbell that also carries the letter: what is dropped
//! here is found by the gateways' next reconcile, so nothing waits for it, and nothing is kept for later.

mod cluster;
mod lane;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use protocol::{
    channels::Channels,
    event::Revoked,
    ids::{SessionId, UserId},
    keys_version::KeysVersion,
};
use service_kit::{
    redis_topology::{Node, RedisTopology},
    tasks::Tasks,
    traces::{Span, SpanKind, Tracer},
};
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio_util::sync::CancellationToken;

use self::lane::Lane;
use crate::{
    metrics::{Dropped, Metrics},
    store::Appended,
};

/// Events that wait for Redis, or for one node of a cluster; more are dropped.
const QUEUE: usize = 16_384;
/// Events in one pipeline.
const BATCH: usize = 512;
/// For connecting, and for a pipeline to be answered.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Where commands leave their events.
#[derive(Clone)]
pub struct Publisher {
    queue: mpsc::Sender<Notice>,
    channels: Arc<Channels>,
    tracer: Tracer,
    metrics: Metrics,
}

/// One message for one channel, ready to send.
struct Notice {
    channel: String,
    payload: Vec<u8>,
    kind: Kind,
    /// How often a node of a cluster has said that it is for another one.
    moves: u8,
    /// Ends with the notice: when Redis has taken it, or it is dropped.
    span: Span,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Something for one user. Metrics count these alone.
    Event,
    /// Which keys are good, for every node: on the first of [`Channels::keys`] that it owns.
    KeysEverywhere,
    /// The same, for one node of a cluster. The next one follows in seconds, so it is not missed.
    Keys,
}

/// The task that sends them.
pub struct Worker {
    queue: mpsc::Receiver<Notice>,
    topology: RedisTopology,
    channels: Arc<Channels>,
    metrics: Metrics,
}

pub fn publisher(
    topology: RedisTopology,
    channels: Channels,
    tracer: Tracer,
    metrics: Metrics,
) -> (Publisher, Worker) {
    let (sender, queue) = mpsc::channel(QUEUE);
    let channels = Arc::new(channels);
    let publisher = Publisher { queue: sender, channels: channels.clone(), tracer, metrics: metrics.clone() };
    (publisher, Worker { queue, topology, channels, metrics })
}

impl Publisher {
    /// Returns at once, whatever Redis does.
    pub fn publish(&self, events: Vec<Appended>) {
        for Appended { receiver, mut envelope } in events {
            let parent = envelope.traceparent.as_deref().and_then(|parent| parent.parse().ok());
            let mut span = self.tracer.child(parent, "publish", SpanKind::Producer);
            if let Some(context) = span.context() {
                span.text("messaging.system", "redis");
                span.text("user.id", receiver);
                span.number("event.seq", envelope.seq);
                // What comes by Redis hangs below its publishing; what is read from the feed, below the commit.
                envelope.traceparent = Some(context.to_string());
            }
            let payload =
                serde_json::to_vec(&envelope).expect("an envelope is strings, numbers and valid JSON");
            self.offer(receiver, payload, span);
        }
    }

    /// Tells gateways that these sessions of one user have ended. As best effort as events are, and asked for as well.
    pub fn publish_revoked(&self, user: UserId, sessions: &[SessionId]) {
        for &revoked in sessions {
            let payload = serde_json::to_vec(&Revoked { revoked }).expect("an id is a string");
            self.offer(user, payload, Span::NONE);
        }
    }

    /// Tells every gateway which keys this replica has.
    pub fn publish_keys(&self, version: &KeysVersion) {
        let channel = self.channels.keys().next().expect("they have no end");
        let payload = serde_json::to_vec(version).expect("a version is strings and numbers");
        let notice = Notice { channel, payload, kind: Kind::KeysEverywhere, moves: 0, span: Span::NONE };
        offer(&self.queue, notice, &self.metrics);
    }

    fn offer(&self, receiver: UserId, payload: Vec<u8>, span: Span) {
        let channel = self.channels.user(receiver);
        let notice = Notice { channel, payload, kind: Kind::Event, moves: 0, span };
        offer(&self.queue, notice, &self.metrics);
    }
}

/// Into a queue, or dropped and counted.
fn offer(queue: &mpsc::Sender<Notice>, notice: Notice, metrics: &Metrics) {
    match queue.try_send(notice) {
        Ok(()) => _ = metrics.publish_queued_events.inc(),
        Err(TrySendError::Full(notice)) => dropped("queue_full", [notice], metrics),
        Err(TrySendError::Closed(notice)) => dropped("stopping", [notice], metrics),
    }
}

fn dropped(reason: &'static str, notices: impl IntoIterator<Item = Notice>, metrics: &Metrics) {
    for mut notice in notices {
        notice.span.fail(reason);
        if notice.kind == Kind::Event {
            metrics.publish_dropped_events.get_or_create(&Dropped { reason }).inc();
        }
    }
}

impl Worker {
    /// Runs until `stop`, then sends what is still queued, if Redis takes it.
    pub async fn run(self, tasks: Tasks, stop: CancellationToken) {
        let connected = Connected::new(&self.metrics);
        if self.topology.is_sharded() {
            cluster::run(self, connected, tasks, stop.clone()).await;
        } else {
            let lane = Lane::new(self.queue, self.topology, Node::Only, None, connected, self.metrics);
            lane.run(stop.clone()).await;
        }
        // During a stop, commands may be gone before this is told to stop.
        stop.cancelled().await;
    }
}

/// Of all lanes, how many there are and how many have a connection; the metric says whether all have.
#[derive(Clone)]
struct Connected {
    lanes: Arc<Mutex<(usize, usize)>>,
    metrics: Metrics,
}

impl Connected {
    fn new(metrics: &Metrics) -> Self {
        Self { lanes: Arc::default(), metrics: metrics.clone() }
    }

    fn change(&self, change: impl FnOnce(&mut (usize, usize))) {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut lanes);
        let (all, up) = *lanes;
        self.metrics.redis_connected.set(i64::from(all > 0 && up == all));
    }
}
