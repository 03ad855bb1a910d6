//! Publishes committed events to Redis: pipelined, bounded, best effort. Gateways find a dropped event at their next
//! reconcile, so nothing waits for Redis and nothing is kept for later. Ephemeral events are in no feed: a dropped one is lost.

mod cluster;
mod node;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use protocol::{
    channels::Channels,
    event::{self, Ephemeral, LARGEST_EPHEMERAL, Revoked},
    ids::{SessionId, UserId},
    keys_version::KeysVersion,
};
use serde_json::value::RawValue;
use service_kit::{
    redis_topology::{Node, RedisTopology},
    tasks::Tasks,
    traces::{Span, SpanKind, Tracer},
};
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use self::node::NodePublisher;
use crate::{
    domain::event::EphemeralEvent,
    metrics::{Dropped, Metrics},
    store::Appended,
};

/// Events in the queue for Redis, or for one node of a cluster; more are dropped.
const QUEUE: usize = 16_384;
/// Bytes of events in all queues: those of other back ends may be large.
const QUEUED_BYTES: usize = 64 << 20;
const BATCH: usize = 512;
/// Bounds a connection attempt, and the wait for the replies to a pipeline.
const TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub struct Publisher {
    queue: mpsc::Sender<Publication>,
    channels: Arc<Channels>,
    queued: Arc<AtomicUsize>,
    tracer: Tracer,
    metrics: Metrics,
}

struct Publication {
    channel: String,
    payload: Vec<u8>,
    kind: PublicationKind,
    /// The number of redirects by nodes of a cluster.
    redirects: u8,
    /// Ends with the publication: when Redis has taken it, or it is dropped.
    span: Span,
    _bytes: QueuedBytes,
}

/// Counted until it is dropped.
#[derive(Default)]
struct QueuedBytes {
    bytes: usize,
    queued: Arc<AtomicUsize>,
}

impl QueuedBytes {
    /// `None`: there are too many.
    fn count(bytes: usize, queued: &Arc<AtomicUsize>) -> Option<Self> {
        let counted = Self { bytes, queued: queued.clone() };
        (queued.fetch_add(bytes, Ordering::Relaxed) + bytes <= QUEUED_BYTES).then_some(counted)
    }
}

impl Drop for QueuedBytes {
    fn drop(&mut self) {
        self.queued.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PublicationKind {
    /// For one user.
    Event,
    /// For one user, in no feed. It takes at most half of a queue, so that it keeps out no event of a feed.
    Ephemeral,
    /// Key versions, for every node: on the first of [`Channels::keys`] that it owns.
    KeysEverywhere,
    /// The same for one node. The next announcement follows in seconds.
    Keys,
}

pub struct PublisherTask {
    queue: mpsc::Receiver<Publication>,
    topology: RedisTopology,
    channels: Arc<Channels>,
    metrics: Metrics,
}

pub fn publisher(
    topology: RedisTopology,
    channels: Channels,
    tracer: Tracer,
    metrics: Metrics,
) -> (Publisher, PublisherTask) {
    let (sender, queue) = mpsc::channel(QUEUE);
    let channels = Arc::new(channels);
    let queued = Arc::default();
    let publisher =
        Publisher { queue: sender, channels: channels.clone(), queued, tracer, metrics: metrics.clone() };
    (publisher, PublisherTask { queue, topology, channels, metrics })
}

impl Publisher {
    /// Never waits for Redis.
    pub fn publish(&self, events: Vec<Appended>) {
        for Appended { receiver, mut envelope } in events {
            let parent = envelope.traceparent.as_deref().and_then(|parent| parent.parse().ok());
            let mut span = self.tracer.child(parent, "publish", SpanKind::Producer);
            if let Some(context) = span.context() {
                span.text("messaging.system", "redis");
                span.text("user.id", receiver);
                span.number("event.seq", envelope.seq);
                // An event from Redis is a child of its publishing; one that is read from the feed, of the commit.
                envelope.traceparent = Some(context.to_string());
            }
            let payload =
                serde_json::to_vec(&envelope).expect("an envelope is strings, numbers and valid JSON");
            self.enqueue(receiver, payload, PublicationKind::Event, span);
        }
    }

    /// Waits for room for ephemeral events, a second at most: a caller with many of them must not lose them to its own speed.
    pub async fn room_for_ephemeral(&self) {
        let patient_until = Instant::now() + TIMEOUT;
        while self.queue.capacity() <= QUEUE * 3 / 4 && Instant::now() < patient_until {
            sleep(Duration::from_millis(2)).await;
        }
    }

    /// To those of the receivers who are connected.
    pub fn publish_ephemeral(&self, event: &EphemeralEvent, receivers: impl IntoIterator<Item = UserId>) {
        let data = serde_json::value::to_raw_value(event).expect("it is strings and times");
        self.publish_ephemeral_json(event.name(), &data, receivers);
    }

    /// The same of another back end. `data`: one line.
    pub fn publish_ephemeral_json(
        &self,
        name: &str,
        data: &RawValue,
        receivers: impl IntoIterator<Item = UserId>,
    ) {
        let message = Ephemeral { ephemeral: name, v: event::VERSION, data };
        let payload = serde_json::to_vec(&message).expect("it is strings, numbers and valid JSON");
        debug_assert!(payload.len() <= LARGEST_EPHEMERAL, "gateways drop longer ones");
        for receiver in receivers {
            self.enqueue(receiver, payload.clone(), PublicationKind::Ephemeral, Span::NONE);
        }
    }

    /// Notifies gateways that these sessions of one user have ended. They also find out at their next reconcile.
    pub fn publish_revoked(&self, user: UserId, sessions: &[SessionId]) {
        for &revoked in sessions {
            let payload = serde_json::to_vec(&Revoked { revoked }).expect("an id is a string");
            self.enqueue(user, payload, PublicationKind::Event, Span::NONE);
        }
    }

    pub fn publish_keys(&self, version: &KeysVersion) {
        let channel = self.channels.keys().next().expect("they have no end");
        let payload = serde_json::to_vec(version).expect("a version is strings and numbers");
        let publication = Publication {
            channel,
            payload,
            kind: PublicationKind::KeysEverywhere,
            redirects: 0,
            span: Span::NONE,
            _bytes: QueuedBytes::default(),
        };
        enqueue(&self.queue, publication, &self.metrics);
    }

    fn enqueue(&self, receiver: UserId, payload: Vec<u8>, kind: PublicationKind, span: Span) {
        let channel = self.channels.user(receiver);
        let counted = QueuedBytes::count(payload.len(), &self.queued);
        let has_room = counted.is_some();
        let publication =
            Publication { channel, payload, kind, redirects: 0, span, _bytes: counted.unwrap_or_default() };
        if has_room {
            enqueue(&self.queue, publication, &self.metrics);
        } else {
            drop_publications("queue_full", [publication], &self.metrics);
        }
    }
}

fn enqueue(queue: &mpsc::Sender<Publication>, publication: Publication, metrics: &Metrics) {
    let half = queue.max_capacity() / 2;
    if publication.kind == PublicationKind::Ephemeral && queue.capacity() < half {
        return drop_publications("queue_full", [publication], metrics);
    }
    match queue.try_send(publication) {
        Ok(()) => _ = metrics.publish_queued_events.inc(),
        Err(TrySendError::Full(publication)) => drop_publications("queue_full", [publication], metrics),
        Err(TrySendError::Closed(publication)) => drop_publications("stopping", [publication], metrics),
    }
}

fn drop_publications(
    reason: &'static str,
    publications: impl IntoIterator<Item = Publication>,
    metrics: &Metrics,
) {
    for mut publication in publications {
        publication.span.fail(reason);
        let dropped = match publication.kind {
            PublicationKind::Event => &metrics.publish_dropped_events,
            PublicationKind::Ephemeral => &metrics.publish_dropped_ephemeral_events,
            PublicationKind::KeysEverywhere | PublicationKind::Keys => continue,
        };
        dropped.get_or_create(&Dropped { reason }).inc();
    }
}

impl PublisherTask {
    /// Runs until `stop`, then publishes what is queued.
    pub async fn run(self, tasks: Tasks, stop: CancellationToken) {
        let connected = ConnectedNodes::new(&self.metrics);
        if self.topology.is_sharded() {
            cluster::run(self, connected, tasks, stop.clone()).await;
        } else {
            let publisher =
                NodePublisher::new(self.queue, self.topology, Node::Only, None, connected, self.metrics);
            publisher.run(stop.clone()).await;
        }
        // The last command may end before `stop`.
        stop.cancelled().await;
    }
}

/// Counts node publishers and the connected ones; the metric is 1 if all are connected.
#[derive(Clone)]
struct ConnectedNodes {
    counts: Arc<Mutex<(usize, usize)>>,
    metrics: Metrics,
}

impl ConnectedNodes {
    fn new(metrics: &Metrics) -> Self {
        Self { counts: Arc::default(), metrics: metrics.clone() }
    }

    fn change(&self, change: impl FnOnce(&mut (usize, usize))) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut counts);
        let (all, up) = *counts;
        self.metrics.redis_connected.set(i64::from(all > 0 && up == all));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_for_redis_is_bounded_in_bytes() {
        let (metrics, _) = Metrics::of_service();
        let topology = RedisTopology::single("redis://localhost").unwrap();
        let (publisher, mut task) =
            publisher(topology, Channels::new("x:"), Tracer::default(), metrics.clone());
        let data = RawValue::from_string(format!("\"{}\"", "x".repeat(48 * 1024))).unwrap();
        for _ in 0..2 {
            publisher.publish_ephemeral_json("a", &data, (0..2_000).map(UserId));
            let dropped =
                metrics.publish_dropped_ephemeral_events.get_or_create(&Dropped { reason: "queue_full" });
            assert!(dropped.get() > 600);
            let mut queued = 0;
            // What leaves the queue makes room.
            while task.queue.try_recv().is_ok() {
                queued += 1;
            }
            assert!((1_300..=QUEUED_BYTES / data.get().len()).contains(&queued), "{queued}");
        }
        assert_eq!(publisher.queued.load(Ordering::Relaxed), 0);
    }
}
