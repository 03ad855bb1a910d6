//! Redis subscriptions: the channels of the users who have a stream here, and the channel of public key versions.
//!
//! One supervised connection, or one to each node of a cluster, reopened with capped, jittered back-off. The engine changes the
//! desired subscriptions at any time; only the connection knows which are confirmed. A health probe, published over a second
//! connection that is renewed regularly, detects a server that is dead, demoted, or no longer the one behind the address. Redis
//! is degraded unless every node is healthy.
//!
//! The connections are read on the delivery thread, so that a message costs no task switch between threads; all other work for
//! them is done on the worker threads. While the engine is busy, nothing is read: the messages wait in the socket and at Redis. A
//! connection that is a second behind drops what waits, and a reconcile recovers the events.

mod desired;
mod messages;
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
    runtime::Handle,
    sync::{Notify, mpsc},
    task::JoinSet,
};
use tokio_util::sync::{CancellationToken, DropGuard};

pub use self::desired::DesiredSubscriptions;
use self::node::NodeSubscriber;
use crate::{core::RedisConnectionId, event::EncodedEvent, frame::Chunk, keys::Keys, metrics::Metrics};

/// Updates that the engine has not taken yet. Without room for those of a whole read, no connection is read.
pub const QUEUE: usize = 8_192;

#[derive(Debug)]
pub enum RedisUpdate {
    Event(UserId, EncodedEvent),
    /// An event that is in no feed.
    Ephemeral(UserId, Chunk),
    /// A session of this user has ended.
    SessionEnded(UserId, SessionId),
    /// A message on this user's channel could not be parsed.
    Uncertain(UserId),
    /// Redis has confirmed these users' channels on this connection.
    Subscribed(RedisConnectionId, Vec<UserId>),
    /// The slots of these users' channels have moved away from this connection's node.
    Moved(RedisConnectionId, Vec<UserId>),
    /// The connection is closed, and its subscriptions with it.
    Disconnected(RedisConnectionId),
    Degraded(bool),
    /// Messages were dropped.
    Dropped,
}

pub struct Subscriber {
    pub topology: RedisTopology,
    pub channels: Channels,
    pub keys: Arc<Keys>,
    pub desired: DesiredSubscriptions,
    pub updates: mpsc::Sender<RedisUpdate>,
    /// Reads the connections.
    pub delivery: Handle,
    pub tracer: Tracer,
    pub tasks: Tasks,
    pub metrics: Arc<Metrics>,
}

/// Health of one node, or of all.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Health {
    connected: bool,
    healthy: bool,
}

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

    fn of(&self, nodes: &[Node]) -> Health {
        let mut known = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|node, _| nodes.contains(node));
        let all = |is: fn(&Health) -> bool| nodes.iter().all(|node| known.get(node).is_some_and(is));
        Health { connected: all(|health| health.connected), healthy: all(|health| health.healthy) }
    }
}

impl Subscriber {
    /// Subscribes until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        stop.run_until_cancelled(self.supervise()).await;
        // During a shutdown the delivery thread ends first, and the supervision with it.
        stop.cancelled().await;
    }

    /// Runs one subscriber for each node that owns slots.
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
