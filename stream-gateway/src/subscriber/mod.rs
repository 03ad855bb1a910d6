//! Redis: listens to the channels of the users who have a stream here, and to what is said about public keys.
//!
//! One supervised connection of its own, or one to each node of a cluster, rebuilt for ever with capped, jittered back-off. Which
//! channels are wanted is shared state, changed by the hub at any time; which are confirmed is known only to the connection, and
//! only after Redis has said so. Every queue is bounded: a message that finds the queue full is dropped and reported as a doubt,
//! which a reconcile heals. A beat through Redis and back, published over another connection that is renewed now and then, finds a
//! server that is silently dead, demoted, or no longer where the address points. Redis is trusted while every node is.

mod desired;
mod node;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use protocol::{
    channels::Channels,
    ids::{SessionId, UserId},
};
use service_kit::{
    redis_topology::{Node, RedisTopology},
    tasks::Tasks,
    traces::Tracer,
};
use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
};
use tokio_util::sync::{CancellationToken, DropGuard};

pub use self::desired::DesiredSubscriptions;
use self::node::NodeSubscriber;
use crate::{event::EncodedEvent, keys::Keys, metrics::Metrics};

/// Messages from Redis that the engine has not taken yet.
pub const QUEUE: usize = 16_384;

/// A connection to Redis, told from all before and after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RedisConnectionId(pub u64);

/// What the engine hears from Redis, and about it.
#[derive(Debug)]
pub enum RedisUpdate {
    Event(UserId, EncodedEvent),
    /// A session of this user has ended.
    SessionEnded(UserId, SessionId),
    /// Something was said about this user that cannot be read.
    Uncertain(UserId),
    /// From here on, what is published for these users arrives by this connection.
    Subscribed(RedisConnectionId, Vec<UserId>),
    /// This connection brings nothing for these users any more: a cluster sent them elsewhere.
    Moved(RedisConnectionId, Vec<UserId>),
    /// The connection is gone, and with it what it had confirmed.
    Disconnected(RedisConnectionId),
    /// Whether Redis is trusted to bring what is published.
    Degraded(bool),
    /// Something may have been missed.
    Dropped,
}

pub struct Subscriber {
    pub topology: RedisTopology,
    pub channels: Channels,
    /// Hears of changes of the public keys.
    pub keys: Arc<Keys>,
    pub desired: DesiredSubscriptions,
    pub updates: mpsc::Sender<RedisUpdate>,
    pub tracer: Tracer,
    pub tasks: Tasks,
    pub metrics: Arc<Metrics>,
}

/// What is known of a node's connection.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Health {
    connected: bool,
    healthy: bool,
}

/// Where listeners note how they are.
#[derive(Default)]
struct HealthBoard {
    nodes: Mutex<HashMap<Node, Health>>,
    changed: Notify,
}

impl HealthBoard {
    fn note(&self, node: &Node, health: Health) {
        let before = self.nodes.lock().unwrap_or_else(PoisonError::into_inner).insert(node.clone(), health);
        if before != Some(health) {
            self.changed.notify_one();
        }
    }

    /// Of all of these together.
    fn of(&self, nodes: &[Node]) -> Health {
        let mut known = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|node, _| nodes.contains(node));
        let all = |is: fn(&Health) -> bool| nodes.iter().all(|node| known.get(node).is_some_and(is));
        Health { connected: all(|health| health.connected), healthy: all(|health| health.healthy) }
    }
}

impl Subscriber {
    /// Listens until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        stop.run_until_cancelled(self.supervise()).await;
        // During a stop, the delivery thread may be gone before this is told to stop.
        stop.cancelled().await;
    }

    /// One listener for each node that owns something.
    #[expect(clippy::disallowed_methods, reason = "each subscriber is watched")]
    async fn supervise(&self) {
        let (mut slot_maps, following) = self.topology.watch_slot_map();
        tokio::pin!(following);
        let board = Arc::new(HealthBoard::default());
        let mut subscribers: HashMap<Node, DropGuard> = HashMap::new();
        let mut running = JoinSet::new();
        let mut degraded = true;
        let mut map = slot_maps.now();
        let mut known_before = false;
        loop {
            subscribers.retain(|node, _| map.nodes().contains(node));
            for node in map.nodes() {
                subscribers.entry(node.clone()).or_insert_with(|| {
                    let stop = CancellationToken::new();
                    let subscriber = NodeSubscriber::new(
                        self,
                        node.clone(),
                        slot_maps.clone(),
                        board.clone(),
                        known_before,
                    );
                    let run = subscriber.run(stop.clone());
                    running.spawn(self.tasks.watch(format!("redis subscriber of {node}"), &stop, run));
                    stop.drop_guard()
                });
            }
            known_before |= !map.nodes().is_empty();
            self.desired.assign_by(map.clone());
            // Until the map changes, that is how it is.
            loop {
                let health = board.of(map.nodes());
                self.metrics.redis_connected.set(i64::from(health.connected && !map.nodes().is_empty()));
                if degraded == (health.healthy && map.covers_all_slots()) {
                    degraded = !degraded;
                    if self.updates.send(RedisUpdate::Degraded(degraded)).await.is_err() {
                        return;
                    }
                }
                tokio::select! {
                    never = &mut following => match never {},
                    () = slot_maps.changed() => break,
                    () = board.changed.notified() => {}
                    () = self.desired.changed() => self.desired.apply_changes(),
                    Some(_) = running.join_next() => {}
                }
            }
            map = slot_maps.now();
        }
    }
}
