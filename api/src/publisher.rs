//! Committed events to Redis: pipelined, bounded, best effort. A doorbell that also carries the letter: what is dropped
//! here is found by the gateways' next reconcile, so nothing waits for it, and nothing is kept for later.

use std::{sync::Arc, time::Duration};

use redis::{AsyncConnectionConfig, aio::MultiplexedConnection};
use shared::{
    channels::Channels,
    event::Revoked,
    ids::{SessionId, UserId},
};
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::{Dropped, Metrics},
    store::Appended,
};

/// Events that wait for Redis; more are dropped.
const QUEUE: usize = 16_384;
/// Events in one pipeline.
const BATCH: usize = 512;
/// For connecting, and for a pipeline to be answered.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Between attempts to connect: doubled each time, up to the cap, and drawn at random so that replicas do not march in step.
const BACKOFF: Duration = Duration::from_millis(100);
const BACKOFF_CAP: Duration = Duration::from_secs(5);

/// Where commands leave their events.
#[derive(Clone)]
pub struct Publisher {
    queue: mpsc::Sender<Notice>,
    channels: Arc<Channels>,
    metrics: Metrics,
}

/// One message for one channel, ready to send.
struct Notice {
    channel: String,
    payload: Vec<u8>,
}

/// The task that sends them.
pub struct Worker {
    queue: mpsc::Receiver<Notice>,
    client: redis::Client,
    metrics: Metrics,
}

pub fn publisher(client: redis::Client, channels: Channels, metrics: Metrics) -> (Publisher, Worker) {
    let (sender, queue) = mpsc::channel(QUEUE);
    let publisher = Publisher { queue: sender, channels: Arc::new(channels), metrics: metrics.clone() };
    (publisher, Worker { queue, client, metrics })
}

impl Publisher {
    /// Returns at once, whatever Redis does.
    pub fn publish(&self, events: Vec<Appended>) {
        for Appended { receiver, envelope } in events {
            let payload =
                serde_json::to_vec(&envelope).expect("an envelope is strings, numbers and valid JSON");
            self.offer(receiver, payload);
        }
    }

    /// Tells gateways that these sessions of one user have ended. As best effort as events are, and asked for as well.
    pub fn publish_revoked(&self, user: UserId, sessions: &[SessionId]) {
        for &revoked in sessions {
            let payload = serde_json::to_vec(&Revoked { revoked }).expect("an id is a string");
            self.offer(user, payload);
        }
    }

    fn offer(&self, receiver: UserId, payload: Vec<u8>) {
        let reason = match self.queue.try_send(Notice { channel: self.channels.user(receiver), payload }) {
            Ok(()) => return,
            Err(TrySendError::Full(_)) => "queue_full",
            Err(TrySendError::Closed(_)) => "stopping",
        };
        self.metrics.publish_dropped.get_or_create(&Dropped { reason }).inc();
    }
}

/// Why sending ended.
enum Ended {
    /// Nothing more will come, and all was sent.
    Stopped,
    /// Redis failed; `worked` says whether it had taken anything on this connection.
    Failed { worked: bool },
}

impl Worker {
    /// Runs until `stop`, then sends what is still queued, if Redis takes it.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut batch = Vec::with_capacity(BATCH);
        let mut backoff = BACKOFF;
        let mut second_chance = true;
        loop {
            let failed = match self.connect().await {
                Ok(connection) => {
                    tracing::info!("publishing to Redis");
                    self.metrics.redis_connected.set(1);
                    let ended = self.send(connection, &mut batch, &stop).await;
                    self.metrics.redis_connected.set(0);
                    match ended {
                        Ended::Stopped => return,
                        Ended::Failed { worked } => {
                            if worked || second_chance {
                                // It was restarted, most likely, and this batch is how we learn it: once, it is sent
                                // again on a new connection.
                                backoff = BACKOFF;
                                second_chance = worked;
                                continue;
                            }
                            "Redis refuses"
                        }
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, retry_in = ?backoff, "cannot connect to Redis");
                    "cannot connect"
                }
            };
            tracing::debug!(reason = failed, "dropping events until Redis is back");
            self.dropped(batch.len());
            batch.clear();
            if self.drop_for(rand::random_range(backoff / 2..=backoff), &mut batch, &stop).await.is_err() {
                return;
            }
            backoff = (backoff * 2).min(BACKOFF_CAP);
            second_chance = true;
        }
    }

    async fn connect(&self) -> redis::RedisResult<MultiplexedConnection> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(TIMEOUT))
            .set_response_timeout(Some(TIMEOUT));
        self.client.get_multiplexed_async_connection_with_config(&config).await
    }

    /// Sends until stopped or until Redis fails; then what was not taken is left in `batch`.
    async fn send(
        &mut self,
        mut connection: MultiplexedConnection,
        batch: &mut Vec<Notice>,
        stop: &CancellationToken,
    ) -> Ended {
        let mut worked = false;
        loop {
            if batch.is_empty() && self.next_batch(batch, stop).await == 0 {
                return Ended::Stopped;
            }
            self.metrics.publish_queue.set((batch.len() + self.queue.len()) as i64);
            let mut pipeline = redis::Pipeline::with_capacity(batch.len());
            for Notice { channel, payload } in batch.iter() {
                pipeline.publish(channel, payload).ignore();
            }
            match timeout(TIMEOUT, pipeline.query_async::<()>(&mut connection)).await {
                Ok(Ok(())) => {
                    self.metrics.published.inc_by(batch.len() as u64);
                    batch.clear();
                    self.metrics.publish_queue.set(self.queue.len() as i64);
                    worked = true;
                }
                Ok(Err(error)) => {
                    tracing::warn!(%error, "Redis did not take events");
                    return Ended::Failed { worked };
                }
                Err(_) => {
                    tracing::warn!("Redis did not answer in time");
                    return Ended::Failed { worked };
                }
            }
        }
    }

    /// Waits for the next events; 0 once stopped and empty.
    async fn next_batch(&mut self, batch: &mut Vec<Notice>, stop: &CancellationToken) -> usize {
        if !self.queue.is_closed() {
            tokio::select! {
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
                    self.dropped(taken);
                    batch.clear();
                }
            }
        }
    }

    fn dropped(&self, events: usize) {
        self.metrics.publish_queue.set(self.queue.len() as i64);
        self.metrics.publish_dropped.get_or_create(&Dropped { reason: "disconnected" }).inc_by(events as u64);
    }
}
