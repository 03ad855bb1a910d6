//! A cluster: each event goes to the node that owns its channel's slot, by a lane of its own with a queue of its own, so that a
//! node that hangs holds up nobody else's.

use std::{collections::HashMap, sync::Arc};

use protocol::channels::Channels;
use service_kit::{
    redis_topology::{Node, RedisTopology, SlotMap},
    tasks::Tasks,
    traces::Span,
};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    BATCH, Connected, Kind, Notice, QUEUE, Worker, dropped,
    lane::{Lane, Others},
    offer,
};
use crate::metrics::Metrics;

/// How often an event is sent on before it is dropped: nodes that disagree about a slot would pass it round.
const MOST_MOVES: u8 = 3;

struct Router {
    topology: RedisTopology,
    channels: Arc<Channels>,
    map: Arc<SlotMap>,
    lanes: HashMap<Node, Running>,
    tasks: Tasks,
    running: JoinSet<()>,
    others: Others,
    connected: Connected,
    metrics: Metrics,
}

/// A running lane. Dropping this makes the lane send its queue and end.
struct Running {
    // Dropped before the sender: a lane without either has ended in order.
    _stop: DropGuard,
    queue: mpsc::Sender<Notice>,
}

/// Runs until `stop`, then sends what is still queued.
pub(super) async fn run(worker: Worker, connected: Connected, tasks: Tasks, stop: CancellationToken) {
    let Worker { mut queue, topology, channels, metrics } = worker;
    let (mut slot_maps, following) = topology.watch_slot_map();
    tokio::pin!(following);
    let (moved, mut sent_on) = mpsc::channel(QUEUE);
    let mut router = Router {
        map: slot_maps.now(),
        topology,
        channels,
        lanes: HashMap::new(),
        tasks,
        running: JoinSet::new(),
        others: Others { moved, slot_maps: slot_maps.clone() },
        connected,
        metrics,
    };
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        tokio::select! {
            never = &mut following => match never {},
            () = slot_maps.changed() => router.follow(slot_maps.now()),
            Some((notice, node)) = sent_on.recv() => router.send_on(notice, node),
            // While no slot has an owner yet, events wait.
            taken = queue.recv_many(&mut batch, BATCH), if !router.lanes.is_empty() || queue.is_closed() => {
                if taken == 0 {
                    break;
                }
                for notice in batch.drain(..) {
                    router.route(notice);
                }
            }
            () = stop.cancelled(), if !queue.is_closed() => queue.close(),
            Some(_) = router.running.join_next() => {}
        }
    }
    router.lanes.clear();
    while router.running.join_next().await.is_some() {}
}

impl Router {
    /// Lanes to those who own slots, and to nobody else.
    fn follow(&mut self, map: Arc<SlotMap>) {
        self.lanes.retain(|node, _| map.nodes().contains(node));
        for node in map.nodes() {
            self.lane(node);
        }
        self.map = map;
    }

    #[expect(clippy::disallowed_methods, reason = "the lane is watched")]
    fn lane(&mut self, node: &Node) -> &mpsc::Sender<Notice> {
        let lane = self.lanes.entry(node.clone()).or_insert_with(|| {
            let (sender, queue) = mpsc::channel(QUEUE);
            let lane = Lane::new(
                queue,
                self.topology.clone(),
                node.clone(),
                Some(self.others.clone()),
                self.connected.clone(),
                self.metrics.clone(),
            );
            let stop = CancellationToken::new();
            let run = lane.run(stop.clone());
            self.running.spawn(self.tasks.watch(format!("publisher to {node}"), &stop, run));
            Running { _stop: stop.drop_guard(), queue: sender }
        });
        &lane.queue
    }

    fn route(&mut self, notice: Notice) {
        self.metrics.publish_queued_events.dec();
        if notice.kind == Kind::KeysEverywhere {
            for (node, lane) in &self.lanes {
                if let Some(channel) = self.map.first_name_on(node, self.channels.keys()) {
                    let payload = notice.payload.clone();
                    let notice = Notice { channel, payload, kind: Kind::Keys, moves: 0, span: Span::NONE };
                    offer(&lane.queue, notice, &self.metrics);
                }
            }
            return;
        }
        match self.map.node_of(&notice.channel).and_then(|node| self.lanes.get(node)) {
            Some(lane) => offer(&lane.queue, notice, &self.metrics),
            None => dropped("disconnected", [notice], &self.metrics),
        }
    }

    /// The node that was asked says whose it is; the whole map follows.
    fn send_on(&mut self, notice: Notice, node: Node) {
        self.others.slot_maps.refresh();
        if notice.moves > MOST_MOVES {
            return dropped("disconnected", [notice], &self.metrics);
        }
        let metrics = self.metrics.clone();
        offer(self.lane(&node), notice, &metrics);
    }
}
