//! Publishes to one node over one connection, which is rebuilt after failures.
//!
//! It is also replaced every few seconds: the server may have been demoted, or DNS may point elsewhere, and it would accept
//! everything although no gateway is subscribed there any more.

use std::time::Duration;

use redis::{AsyncConnectionConfig, ErrorKind, RedisError, RedisResult, Value, aio::MultiplexedConnection};
use service_kit::{
    backoff::Backoff,
    redis_topology::{self, Node, RedisTopology, SlotMapWatch},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{BATCH, ConnectedNodes, Publication, PublicationKind, TIMEOUT, drop_publications};
use crate::metrics::Metrics;

/// Between attempts to connect: the first delay and the longest. The longest is shorter than gateways take to rely on a Redis that
/// has come back: they reconcile events that are dropped until then.
const BACKOFF: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(1)];
/// The age at which a connection is replaced, at most.
const RENEW_AFTER: Duration = Duration::from_secs(5);

/// Access to the other nodes of a cluster.
#[derive(Clone)]
pub(super) struct Redirects {
    /// Takes events that this node has redirected to another one.
    pub(super) redirected: mpsc::Sender<(Publication, Node)>,
    pub(super) slot_maps: SlotMapWatch,
}

pub(super) struct NodePublisher {
    queue: mpsc::Receiver<Publication>,
    topology: RedisTopology,
    node: Node,
    redirects: Option<Redirects>,
    connected: ConnectedNodes,
    metrics: Metrics,
}

enum SendEnd {
    /// The queue is closed and empty.
    Stopped,
    /// Redis replies to everything with an error; the connection works.
    Rejected(MultiplexedConnection),
    /// The connection failed; `worked`: after it had taken something.
    Failed { worked: bool },
}

type Renewal = AbortOnDropHandle<RedisResult<MultiplexedConnection>>;

impl NodePublisher {
    pub(super) fn new(
        queue: mpsc::Receiver<Publication>,
        topology: RedisTopology,
        node: Node,
        redirects: Option<Redirects>,
        connected: ConnectedNodes,
        metrics: Metrics,
    ) -> Self {
        connected.change(|(all, _)| *all += 1);
        Self { queue, topology, node, redirects, connected, metrics }
    }

    /// Runs until `stop` or until the queue is closed, then publishes what is queued.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let mut batch = Vec::with_capacity(BATCH);
        let mut backoff = Backoff::new(BACKOFF[0], BACKOFF[1]);
        let mut second_chance = true;
        let mut kept = None;
        loop {
            let connected = match kept.take() {
                Some(connection) => Ok(connection),
                None => connect(&self.topology, &self.node).await.inspect(|_| {
                    tracing::info!(node = %self.node, "redis publisher connected");
                }),
            };
            let failed = match connected {
                Ok(connection) => {
                    self.connected.change(|(_, up)| *up += 1);
                    let ended = self.send(connection, &mut batch, &stop).await;
                    self.connected.change(|(_, up)| *up -= 1);
                    match ended {
                        SendEnd::Stopped => return,
                        SendEnd::Rejected(connection) => {
                            kept = Some(connection);
                            "rejected"
                        }
                        SendEnd::Failed { worked } => {
                            if worked || second_chance {
                                // Redis was probably restarted while the connection was idle: retry the batch once.
                                backoff.reset();
                                second_chance = worked;
                                continue;
                            }
                            "no reply"
                        }
                    }
                }
                Err(error) => {
                    self.log(
                        &error,
                        "redis publisher could not connect; delivery falls back to reconciliation",
                    );
                    "cannot connect"
                }
            };
            tracing::debug!(reason = failed, "redis publisher drops events until the next attempt");
            // A replica may have taken over.
            if let Some(redirects) = &self.redirects {
                redirects.slot_maps.refresh();
            }
            self.drop_publications("disconnected", &mut batch);
            if self.drop_for(backoff.next_delay(), &mut batch, &stop).await.is_err() {
                return;
            }
            second_chance = true;
        }
    }

    /// Publishes until stopped or until Redis fails; then `batch` has what was not taken.
    async fn send(
        &mut self,
        mut connection: MultiplexedConnection,
        batch: &mut Vec<Publication>,
        stop: &CancellationToken,
    ) -> SendEnd {
        let mut worked = false;
        let mut renewal = self.renewal();
        loop {
            if batch.is_empty() && self.next_batch(batch, stop, &mut connection, &mut renewal).await == 0 {
                return SendEnd::Stopped;
            }
            let mut pipeline = redis::Pipeline::with_capacity(batch.len());
            for Publication { channel, payload, .. } in batch.iter() {
                let mut publish = self.topology.publish_command();
                publish.arg(channel).arg(payload);
                pipeline.add_command(publish);
            }
            pipeline.ignore_errors();
            let answers = pipeline.query_async::<Vec<RedisResult<Value>>>(&mut connection);
            let (taken, error) = match timeout(TIMEOUT, answers).await {
                Ok(Ok(answers)) => self.sort_replies(batch, answers),
                Ok(Err(error)) => (false, Some(error)),
                Err(_) => {
                    tracing::warn!(node = %self.node, "redis did not reply to a publish in time");
                    return SendEnd::Failed { worked };
                }
            };
            worked |= taken;
            let Some(error) = error else { continue };
            self.log(&error, "redis rejected a publish; delivery falls back to reconciliation");
            if !redis_topology::is_server_error(&error) {
                return SendEnd::Failed { worked };
            }
            self.drop_publications("refused", batch);
            if let Some(redirects) = &self.redirects {
                redirects.slot_maps.refresh();
            }
            if !taken {
                return SendEnd::Rejected(connection);
            }
        }
    }

    /// Counts taken events, forwards redirected ones and leaves the rest in `batch`. Whether any was taken, and an error of the
    /// rest.
    fn sort_replies(
        &self,
        batch: &mut Vec<Publication>,
        answers: Vec<RedisResult<Value>>,
    ) -> (bool, Option<RedisError>) {
        let sent = batch.len();
        let mut failed = None;
        let (mut taken, mut events, mut ephemeral) = (false, 0, 0);
        let mut answers = answers.into_iter();
        for mut publication in std::mem::take(batch) {
            let too_few = || Err(RedisError::from((ErrorKind::Parse, "fewer replies than events")));
            let Err(error) = answers.next().unwrap_or_else(too_few) else {
                taken = true;
                events += u64::from(publication.kind == PublicationKind::Event);
                ephemeral += u64::from(publication.kind == PublicationKind::Ephemeral);
                continue;
            };
            if let (Some(redirects), Some(node)) =
                (&self.redirects, redis_topology::redirect_target(&error, &self.node))
            {
                publication.redirects += 1;
                if let Err(error) = redirects.redirected.try_send((publication, node)) {
                    drop_publications("queue_full", [error.into_inner().0], &self.metrics);
                }
            } else {
                batch.push(publication);
                failed = Some(error);
            }
        }
        self.metrics.publish_queued_events.dec_by((sent - batch.len()) as i64);
        self.metrics.published_events.inc_by(events);
        self.metrics.published_ephemeral_events.inc_by(ephemeral);
        (taken, failed)
    }

    #[expect(clippy::disallowed_methods, reason = "its publisher awaits it")]
    fn renewal(&self) -> Renewal {
        let (topology, node) = (self.topology.clone(), self.node.clone());
        AbortOnDropHandle::new(tokio::spawn(async move {
            sleep(RENEW_AFTER.mul_f64(rand::random_range(0.5..1.0))).await;
            connect(&topology, &node).await
        }))
    }

    /// The number of events that it has put into `batch`; 0 once stopped and empty.
    async fn next_batch(
        &mut self,
        batch: &mut Vec<Publication>,
        stop: &CancellationToken,
        connection: &mut MultiplexedConnection,
        renewal: &mut Renewal,
    ) -> usize {
        while !self.queue.is_closed() {
            tokio::select! {
                renewed = &mut *renewal => {
                    // A failed attempt says nothing about the connection in use.
                    if let Ok(Ok(new)) = renewed {
                        *connection = new;
                    }
                    *renewal = self.renewal();
                }
                taken = self.queue.recv_many(batch, BATCH) => return taken,
                () = stop.cancelled() => self.queue.close(),
            }
        }
        self.queue.recv_many(batch, BATCH).await
    }

    /// Drops events for a while. An error: stopped.
    async fn drop_for(
        &mut self,
        pause: Duration,
        batch: &mut Vec<Publication>,
        stop: &CancellationToken,
    ) -> Result<(), ()> {
        let until = Instant::now() + pause;
        loop {
            tokio::select! {
                () = sleep_until(until) => return Ok(()),
                () = stop.cancelled() => return Err(()),
                taken = self.queue.recv_many(batch, BATCH) => {
                    if taken == 0 {
                        return Err(());
                    }
                    self.drop_publications("disconnected", batch);
                }
            }
        }
    }

    fn log(&self, error: &RedisError, failure: &'static str) {
        if redis_topology::is_access_denied(error) {
            tracing::error!(%error, node = %self.node, "{}", redis_topology::ACCESS_DENIED);
        } else {
            tracing::warn!(%error, node = %self.node, "{failure}");
        }
    }

    fn drop_publications(&self, reason: &'static str, batch: &mut Vec<Publication>) {
        self.metrics.publish_queued_events.dec_by(batch.len() as i64);
        drop_publications(reason, batch.drain(..), &self.metrics);
    }
}

impl Drop for NodePublisher {
    fn drop(&mut self) {
        self.connected.change(|(all, _)| *all -= 1);
    }
}

async fn connect(topology: &RedisTopology, node: &Node) -> RedisResult<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(TIMEOUT))
        .set_response_timeout(Some(TIMEOUT));
    topology.connect(node, &config).await
}

#[cfg(test)]
mod tests {
    use service_kit::traces::Span;
    use tokio::sync::mpsc;

    use super::*;
    use crate::{
        metrics::Dropped,
        publisher::{QUEUE, QueuedBytes, enqueue},
    };

    fn answer(text: &str) -> RedisResult<Value> {
        redis::parse_redis_value(text.as_bytes()).and_then(Value::extract_error)
    }

    #[test]
    fn each_event_of_a_batch_is_handled_by_its_own_reply() {
        let (metrics, _) = Metrics::of_service();
        let (redirected, mut elsewhere) = mpsc::channel(QUEUE);
        let publisher = NodePublisher::new(
            mpsc::channel(1).1,
            RedisTopology::single("redis://localhost").unwrap(),
            Node::At("one".into(), 1),
            Some(Redirects {
                redirected,
                slot_maps: RedisTopology::single("redis://localhost").unwrap().watch_slot_map().0,
            }),
            ConnectedNodes::new(&metrics),
            metrics.clone(),
        );
        let (offered, _queue) = mpsc::channel(8);
        let publication = |channel: &str| Publication {
            channel: channel.into(),
            payload: vec![],
            kind: PublicationKind::Event,
            redirects: 0,
            span: Span::NONE,
            _bytes: QueuedBytes::default(),
        };
        for channel in ["a", "b", "c", "d"] {
            enqueue(&offered, publication(channel), &metrics);
        }
        let mut batch = ["a", "b", "c", "d"].map(publication).into();
        let answers = [":1\r\n", "-MOVED 5 two:2\r\n", "-CLUSTERDOWN no\r\n", "-MOVED 6 :3\r\n"].map(answer);
        let (taken, error) = publisher.sort_replies(&mut batch, answers.into());
        assert!(taken && error.unwrap().code() == Some("CLUSTERDOWN"));
        assert_eq!(batch.iter().map(|publication| &*publication.channel).collect::<Vec<_>>(), ["c"]);
        let sent: Vec<_> = std::iter::from_fn(|| elsewhere.try_recv().ok())
            .map(|(publication, node)| (publication.channel, publication.redirects, node.to_string()))
            .collect();
        assert_eq!(sent, [("b".into(), 1, "two:2".into()), ("d".into(), 1, "one:3".into())]);
        assert_eq!((metrics.published_events.get(), metrics.publish_queued_events.get()), (1, 1));
        assert!(redis_topology::is_server_error(&answer("-MISCONF no disk\r\n").unwrap_err()));

        // An event without an answer is sent again or dropped, and counted either way.
        for channel in ["e", "f", "g"] {
            enqueue(&offered, publication(channel), &metrics);
        }
        let mut batch = ["e", "f", "g"].map(publication).into();
        let (taken, error) = publisher.sort_replies(&mut batch, vec![answer(":1\r\n")]);
        assert!(taken && !redis_topology::is_server_error(&error.unwrap()), "the connection is out of step");
        assert_eq!(batch.iter().map(|publication| &*publication.channel).collect::<Vec<_>>(), ["f", "g"]);
        publisher.drop_publications("disconnected", &mut batch);
        let reason = "disconnected";
        assert_eq!(metrics.publish_dropped_events.get_or_create(&Dropped { reason }).get(), 2);
        assert_eq!((metrics.published_events.get(), metrics.publish_queued_events.get()), (2, 1));
    }
}
