//! One connection that publishes, rebuilt for as long as there is something to publish.
//!
//! It is made anew every few seconds while all is well, too: the server at the other end may have been demoted, or be no longer
//! where the settings point, and take everything without a word for listeners that have long gone elsewhere.

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

use super::{BATCH, Connected, Kind, Notice, TIMEOUT, dropped};
use crate::metrics::Metrics;

/// Between attempts to connect: the first delay and the longest. The longest is shorter than gateways take to rely on a Redis that
/// has come back: they reconcile events that are dropped until then.
const BACKOFF: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(1)];
/// The age at which a connection is replaced, at most.
const RENEW_AFTER: Duration = Duration::from_secs(5);

/// The other nodes of a cluster.
#[derive(Clone)]
pub(super) struct Others {
    /// Where an event goes that a node says is for another one.
    pub(super) moved: mpsc::Sender<(Notice, Node)>,
    pub(super) slot_maps: SlotMapWatch,
}

pub(super) struct Lane {
    queue: mpsc::Receiver<Notice>,
    topology: RedisTopology,
    node: Node,
    others: Option<Others>,
    connected: Connected,
    metrics: Metrics,
}

/// Why sending ended.
enum Ended {
    /// Nothing more will come, and all was sent.
    Stopped,
    /// Redis answers, and refuses everything at present; the connection lives.
    Refused(MultiplexedConnection),
    /// Redis failed; `worked` says whether it had taken anything on this connection.
    Failed { worked: bool },
}

/// A connection in the making, to replace one that is well.
type Renewal = AbortOnDropHandle<RedisResult<MultiplexedConnection>>;

impl Lane {
    pub(super) fn new(
        queue: mpsc::Receiver<Notice>,
        topology: RedisTopology,
        node: Node,
        others: Option<Others>,
        connected: Connected,
        metrics: Metrics,
    ) -> Self {
        connected.change(|(all, _)| *all += 1);
        Self { queue, topology, node, others, connected, metrics }
    }

    /// Runs until `stop`, or nobody is left who offers; then sends what is still queued, if Redis takes it.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let mut batch = Vec::with_capacity(BATCH);
        let mut backoff = Backoff::new(BACKOFF[0], BACKOFF[1]);
        let mut second_chance = true;
        let mut kept = None;
        loop {
            let connected = match kept.take() {
                Some(connection) => Ok(connection),
                None => connect(&self.topology, &self.node).await.inspect(|_| {
                    tracing::info!(node = %self.node, "publishing to Redis");
                }),
            };
            let failed = match connected {
                Ok(connection) => {
                    self.connected.change(|(_, up)| *up += 1);
                    let ended = self.send(connection, &mut batch, &stop).await;
                    self.connected.change(|(_, up)| *up -= 1);
                    match ended {
                        Ended::Stopped => return,
                        Ended::Refused(connection) => {
                            kept = Some(connection);
                            "refused"
                        }
                        Ended::Failed { worked } => {
                            if worked || second_chance {
                                // It was restarted, most likely, and this batch is how we learn it: once, it is sent
                                // again on a new connection.
                                backoff.reset();
                                second_chance = worked;
                                continue;
                            }
                            "Redis refuses"
                        }
                    }
                }
                Err(error) if redis_topology::is_access_denied(&error) => {
                    tracing::error!(%error, node = %self.node, "Redis refuses us: see the user, the password and the rights");
                    "refused"
                }
                Err(error) => {
                    tracing::warn!(%error, node = %self.node, "cannot connect to Redis");
                    "cannot connect"
                }
            };
            tracing::debug!(reason = failed, "dropping events until Redis is back");
            // A replica may have taken over.
            if let Some(others) = &self.others {
                others.slot_maps.refresh();
            }
            self.dropped("disconnected", &mut batch);
            if self.drop_for(backoff.next_delay(), &mut batch, &stop).await.is_err() {
                return;
            }
            second_chance = true;
        }
    }

    /// Sends until stopped or until Redis fails; then what was not taken is left in `batch`.
    async fn send(
        &mut self,
        mut connection: MultiplexedConnection,
        batch: &mut Vec<Notice>,
        stop: &CancellationToken,
    ) -> Ended {
        let mut worked = false;
        let mut renewal = self.renewal();
        loop {
            if batch.is_empty() && self.next_batch(batch, stop, &mut connection, &mut renewal).await == 0 {
                return Ended::Stopped;
            }
            let mut pipeline = redis::Pipeline::with_capacity(batch.len());
            for Notice { channel, payload, .. } in batch.iter() {
                let mut publish = self.topology.publish_command();
                publish.arg(channel).arg(payload);
                pipeline.add_command(publish);
            }
            pipeline.ignore_errors();
            let answers = pipeline.query_async::<Vec<RedisResult<Value>>>(&mut connection);
            let (taken, error) = match timeout(TIMEOUT, answers).await {
                Ok(Ok(answers)) => self.settle(batch, answers),
                Ok(Err(error)) => (false, Some(error)),
                Err(_) => {
                    tracing::warn!(node = %self.node, "Redis did not answer in time");
                    return Ended::Failed { worked };
                }
            };
            worked |= taken;
            let Some(error) = error else { continue };
            if redis_topology::is_access_denied(&error) {
                tracing::error!(%error, node = %self.node, "Redis refuses events: see the user, the password and the rights");
            } else {
                tracing::warn!(%error, node = %self.node, "Redis did not take events");
            }
            if !redis_topology::is_server_error(&error) {
                return Ended::Failed { worked };
            }
            // To send it again would be refused again.
            self.dropped("refused", batch);
            if let Some(others) = &self.others {
                others.slot_maps.refresh();
            }
            if !taken {
                return Ended::Refused(connection);
            }
        }
    }

    /// What was taken is done, what is for another node goes there; the rest stays. Whether any was taken, and why not all.
    fn settle(
        &self,
        batch: &mut Vec<Notice>,
        answers: Vec<RedisResult<Value>>,
    ) -> (bool, Option<RedisError>) {
        let sent = batch.len();
        let mut failed = None;
        let (mut taken, mut events) = (false, 0);
        let mut answers = answers.into_iter();
        for mut notice in std::mem::take(batch) {
            let too_few = || Err(RedisError::from((ErrorKind::Parse, "fewer answers than events")));
            let Err(error) = answers.next().unwrap_or_else(too_few) else {
                taken = true;
                events += u64::from(notice.kind == Kind::Event);
                continue;
            };
            if let (Some(others), Some(node)) =
                (&self.others, redis_topology::redirect_target(&error, &self.node))
            {
                notice.moves += 1;
                if let Err(error) = others.moved.try_send((notice, node)) {
                    dropped("queue_full", [error.into_inner().0], &self.metrics);
                }
            } else {
                batch.push(notice);
                failed = Some(error);
            }
        }
        self.metrics.publish_queued_events.dec_by((sent - batch.len()) as i64);
        self.metrics.published_events.inc_by(events);
        (taken, failed)
    }

    #[expect(clippy::disallowed_methods, reason = "its lane awaits it")]
    fn renewal(&self) -> Renewal {
        let (topology, node) = (self.topology.clone(), self.node.clone());
        AbortOnDropHandle::new(tokio::spawn(async move {
            sleep(RENEW_AFTER.mul_f64(rand::random_range(0.5..1.0))).await;
            connect(&topology, &node).await
        }))
    }

    /// Waits for the next events; 0 once stopped and empty.
    async fn next_batch(
        &mut self,
        batch: &mut Vec<Notice>,
        stop: &CancellationToken,
        connection: &mut MultiplexedConnection,
        renewal: &mut Renewal,
    ) -> usize {
        while !self.queue.is_closed() {
            tokio::select! {
                renewed = &mut *renewal => {
                    // One that cannot be made says nothing about the one that is there.
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

    /// Drops what comes, for a while. An error says that it is time to end.
    async fn drop_for(
        &mut self,
        pause: Duration,
        batch: &mut Vec<Notice>,
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
                    self.dropped("disconnected", batch);
                }
            }
        }
    }

    fn dropped(&self, reason: &'static str, batch: &mut Vec<Notice>) {
        self.metrics.publish_queued_events.dec_by(batch.len() as i64);
        dropped(reason, batch.drain(..), &self.metrics);
    }
}

impl Drop for Lane {
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
        publisher::{QUEUE, offer},
    };

    fn answer(text: &str) -> RedisResult<Value> {
        redis::parse_redis_value(text.as_bytes()).and_then(Value::extract_error)
    }

    #[test]
    fn each_event_of_a_batch_is_handled_by_its_own_reply() {
        let (metrics, _) = Metrics::of_service();
        let (moved, mut elsewhere) = mpsc::channel(QUEUE);
        let lane = Lane::new(
            mpsc::channel(1).1,
            RedisTopology::single("redis://localhost").unwrap(),
            Node::At("one".into(), 1),
            Some(Others {
                moved,
                slot_maps: RedisTopology::single("redis://localhost").unwrap().watch_slot_map().0,
            }),
            Connected::new(&metrics),
            metrics.clone(),
        );
        let (offered, _queue) = mpsc::channel(8);
        let notice = |channel: &str| Notice {
            channel: channel.into(),
            payload: vec![],
            kind: Kind::Event,
            moves: 0,
            span: Span::NONE,
        };
        for channel in ["a", "b", "c", "d"] {
            offer(&offered, notice(channel), &metrics);
        }
        let mut batch = ["a", "b", "c", "d"].map(notice).into();
        let answers = [":1\r\n", "-MOVED 5 two:2\r\n", "-CLUSTERDOWN no\r\n", "-MOVED 6 :3\r\n"].map(answer);
        let (taken, error) = lane.settle(&mut batch, answers.into());
        assert!(taken && error.unwrap().code() == Some("CLUSTERDOWN"));
        assert_eq!(batch.iter().map(|notice| &*notice.channel).collect::<Vec<_>>(), ["c"]);
        let sent: Vec<_> = std::iter::from_fn(|| elsewhere.try_recv().ok())
            .map(|(notice, node)| (notice.channel, notice.moves, node.to_string()))
            .collect();
        assert_eq!(sent, [("b".into(), 1, "two:2".into()), ("d".into(), 1, "one:3".into())]);
        assert_eq!((metrics.published_events.get(), metrics.publish_queued_events.get()), (1, 1));
        assert!(redis_topology::is_server_error(&answer("-MISCONF no disk\r\n").unwrap_err()));

        // An event without an answer is sent again or dropped, and counted either way.
        for channel in ["e", "f", "g"] {
            offer(&offered, notice(channel), &metrics);
        }
        let mut batch = ["e", "f", "g"].map(notice).into();
        let (taken, error) = lane.settle(&mut batch, vec![answer(":1\r\n")]);
        assert!(taken && !redis_topology::is_server_error(&error.unwrap()), "the connection is out of step");
        assert_eq!(batch.iter().map(|notice| &*notice.channel).collect::<Vec<_>>(), ["f", "g"]);
        lane.dropped("disconnected", &mut batch);
        let reason = "disconnected";
        assert_eq!(metrics.publish_dropped_events.get_or_create(&Dropped { reason }).get(), 2);
        assert_eq!((metrics.published_events.get(), metrics.publish_queued_events.get()), (2, 1));
    }
}
