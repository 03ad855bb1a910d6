//! Redis Cluster: each event goes to the node that owns its channel's slot. Each node has a publisher and a queue of its own,
//! so that a node that hangs delays no other.

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
    BATCH, ConnectedNodes, Publication, PublicationKind, PublisherTask, QUEUE, QueuedBytes,
    drop_publications, enqueue,
    node::{NodePublisher, Redirects},
};
use crate::metrics::Metrics;

/// Redirects of one event before it is dropped: nodes that disagree about a slot would redirect it endlessly.
const MAX_REDIRECTS: u8 = 3;

struct Router {
    topology: RedisTopology,
    channels: Arc<Channels>,
    map: Arc<SlotMap>,
    publishers: HashMap<Node, RunningPublisher>,
    tasks: Tasks,
    running: JoinSet<()>,
    redirects: Redirects,
    connected: ConnectedNodes,
    metrics: Metrics,
}

/// Dropping this makes the node publisher send its queue and end.
struct RunningPublisher {
    // Dropped before the sender: the publisher sees the stop before its queue closes.
    _stop: DropGuard,
    queue: mpsc::Sender<Publication>,
}

/// Runs until `stop`, then publishes what is queued.
pub(super) async fn run(
    worker: PublisherTask,
    connected: ConnectedNodes,
    tasks: Tasks,
    stop: CancellationToken,
) {
    let PublisherTask { mut queue, topology, channels, metrics } = worker;
    let (mut slot_maps, following) = topology.watch_slot_map();
    tokio::pin!(following);
    let (redirected, mut redirected_here) = mpsc::channel(QUEUE);
    let mut router = Router {
        map: slot_maps.now(),
        topology,
        channels,
        publishers: HashMap::new(),
        tasks,
        running: JoinSet::new(),
        redirects: Redirects { redirected, slot_maps: slot_maps.clone() },
        connected,
        metrics,
    };
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        tokio::select! {
            never = &mut following => match never {},
            () = slot_maps.changed() => router.follow(slot_maps.now()),
            Some((publication, node)) = redirected_here.recv() => router.redirect(publication, node),
            // Events wait while no slot has a node yet.
            taken = queue.recv_many(&mut batch, BATCH), if !router.publishers.is_empty() || queue.is_closed() => {
                if taken == 0 {
                    break;
                }
                for publication in batch.drain(..) {
                    router.route(publication);
                }
            }
            () = stop.cancelled(), if !queue.is_closed() => queue.close(),
            Some(_) = router.running.join_next() => {}
        }
    }
    router.publishers.clear();
    while router.running.join_next().await.is_some() {}
}

impl Router {
    fn follow(&mut self, map: Arc<SlotMap>) {
        self.publishers.retain(|node, _| map.nodes().contains(node));
        for node in map.nodes() {
            self.publisher(node);
        }
        self.map = map;
    }

    #[expect(clippy::disallowed_methods, reason = "the publisher is watched")]
    fn publisher(&mut self, node: &Node) -> &mpsc::Sender<Publication> {
        let publisher = self.publishers.entry(node.clone()).or_insert_with(|| {
            let (sender, queue) = mpsc::channel(QUEUE);
            let publisher = NodePublisher::new(
                queue,
                self.topology.clone(),
                node.clone(),
                Some(self.redirects.clone()),
                self.connected.clone(),
                self.metrics.clone(),
            );
            let stop = CancellationToken::new();
            let run = publisher.run(stop.clone());
            self.running.spawn(self.tasks.watch(format!("publisher to {node}"), &stop, run));
            RunningPublisher { _stop: stop.drop_guard(), queue: sender }
        });
        &publisher.queue
    }

    fn route(&mut self, publication: Publication) {
        self.metrics.publish_queued_events.dec();
        if publication.kind == PublicationKind::KeysEverywhere {
            for (node, publisher) in &self.publishers {
                if let Some(channel) = self.map.first_name_on(node, self.channels.keys()) {
                    let payload = publication.payload.clone();
                    let publication = Publication {
                        channel,
                        payload,
                        kind: PublicationKind::Keys,
                        redirects: 0,
                        span: Span::NONE,
                        _bytes: QueuedBytes::default(),
                    };
                    enqueue(&publisher.queue, publication, &self.metrics);
                }
            }
            return;
        }
        match self.map.node_of(&publication.channel).and_then(|node| self.publishers.get(node)) {
            Some(publisher) => enqueue(&publisher.queue, publication, &self.metrics),
            None => drop_publications("disconnected", [publication], &self.metrics),
        }
    }

    /// A node named another one; the whole slot map follows.
    fn redirect(&mut self, publication: Publication, node: Node) {
        self.redirects.slot_maps.refresh();
        if publication.redirects > MAX_REDIRECTS {
            return drop_publications("disconnected", [publication], &self.metrics);
        }
        let metrics = self.metrics.clone();
        enqueue(self.publisher(&node), publication, &metrics);
    }
}
