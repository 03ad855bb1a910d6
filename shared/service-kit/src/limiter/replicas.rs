//! The counts that all replicas share in Redis: a small script per key, by the clock of Redis, on a connection of its own; on a
//! cluster, on one connection to each node.
//!
//! The first check that fails or times out disconnects; a task then reconnects with back-off until a trial check succeeds. An
//! outage therefore delays only the checks in flight when it begins.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::future::try_join_all;
use redis::{
    AsyncConnectionConfig, Cmd, ErrorKind, RedisError, RedisResult, ServerErrorKind,
    aio::MultiplexedConnection,
};
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{LimiterMetrics, Reason};
use crate::{
    backoff::Backoff,
    redis_topology::{Node, RedisTopology, SlotMap, redirect_target},
};
use protocol::channels::Channels;

/// GCRA: the key holds the theoretical arrival time in microseconds. Returns the wait in microseconds; 0: the
/// request was counted.
///
/// A time beyond the burst was written by a clock that has been set back since, as after a failover.
const SCRIPT: &str = r"
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local arrival = tonumber(redis.call('GET', KEYS[1])) or now
arrival = math.min(math.max(arrival, now), now + interval * burst)
local wait = arrival + interval - (now + interval * burst)
if wait > 0 then
  return wait
end
arrival = arrival + interval
local expires_in = math.ceil((arrival - now) / 1000)
redis.call('SET', KEYS[1], string.format('%.0f', arrival), 'PX', expires_in)
return 0
";

const MAX_IN_FLIGHT: usize = 512;
/// Limits connecting and the first answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const BACKOFF: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];
/// A connection that lasted this long resets the back-off, so that a flapping Redis gets few attempts.
const STABLE_AFTER: Duration = Duration::from_secs(10);

pub(super) struct SharedCheck {
    pub(super) key: String,
    pub(super) interval: Duration,
    pub(super) burst: u32,
}

pub(super) struct Replicas {
    /// `None` while Redis is not used.
    connection: watch::Sender<Option<SharedConnection>>,
    permits: Semaphore,
    pub(super) wanted: AtomicBool,
    timeout: Duration,
    metrics: LimiterMetrics,
}

#[derive(Clone)]
struct SharedConnection {
    nodes: Arc<BTreeMap<Node, MultiplexedConnection>>,
    map: Arc<SlotMap>,
    /// The SHA1 by which Redis knows the script.
    script: Arc<str>,
    /// Distinguishes this connection from earlier and later ones.
    number: u64,
}

pub struct LimiterTask {
    topology: RedisTopology,
    channels: Channels,
    replicas: Arc<Replicas>,
}

pub(super) fn new(
    topology: RedisTopology,
    channels: Channels,
    timeout: Duration,
    metrics: LimiterMetrics,
) -> (Arc<Replicas>, LimiterTask) {
    let replicas = Arc::new(Replicas {
        connection: watch::Sender::default(),
        permits: Semaphore::new(MAX_IN_FLIGHT),
        wanted: AtomicBool::new(false),
        timeout,
        metrics,
    });
    (replicas.clone(), LimiterTask { topology, channels, replicas })
}

impl Replicas {
    /// The wait of each check; zero if it was counted. `None`: Redis did not answer.
    pub(super) async fn check(
        &self,
        checks: impl ExactSizeIterator<Item = &SharedCheck>,
    ) -> Option<Vec<Duration>> {
        let Some(connection) = self.connection.borrow().clone() else { return self.decide_locally("away") };
        let count = u32::try_from(checks.len()).expect("one for each rule");
        let Ok(_permits) = self.permits.try_acquire_many(count) else { return self.decide_locally("busy") };
        // One key each, so that a cluster may keep them on different nodes.
        match timeout(self.timeout, try_join_all(checks.map(|check| connection.check(check)))).await {
            Ok(Ok(waits)) => Some(waits.into_iter().map(Duration::from_micros).collect()),
            Ok(Err(error)) => {
                self.disconnect(&connection, &error.to_string());
                self.decide_locally("failed")
            }
            Err(_) => {
                self.disconnect(&connection, "no answer in time");
                self.decide_locally("slow")
            }
        }
    }

    fn decide_locally<T>(&self, reason: &'static str) -> Option<T> {
        self.metrics.rate_limit_local_decisions.get_or_create(&Reason { reason }).inc();
        None
    }

    /// Logs once per connection.
    fn disconnect(&self, connection: &SharedConnection, reason: &str) {
        let left = self.connection.send_if_modified(|current| {
            current.take_if(|current| current.number == connection.number).is_some()
        });
        if left {
            self.metrics.rate_limits_shared.set(0);
            tracing::warn!(reason, "redis unavailable; rate limits are enforced per process");
        }
    }
}

impl SharedConnection {
    async fn check(&self, check: &SharedCheck) -> RedisResult<u64> {
        let absent = || RedisError::from((ErrorKind::Io, "no node owns the slot of the key"));
        let node = self.map.node_of(&check.key).ok_or_else(absent)?;
        let mut connection = self.nodes.get(node).ok_or_else(absent)?.clone();
        match check.run("EVALSHA", &self.script).query_async(&mut connection).await {
            // EVAL loads the script again.
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                check.run("EVAL", SCRIPT).query_async(&mut connection).await
            }
            // The slot is being migrated to another node.
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::Ask) => {
                let other = redirect_target(&error, node).and_then(|node| self.nodes.get(&node));
                let mut other = other.ok_or(error)?.clone();
                let mut asking = redis::pipe();
                asking.cmd("ASKING").ignore().add_command(check.run("EVAL", SCRIPT));
                asking.query_async::<(u64,)>(&mut other).await.map(|(wait,)| wait)
            }
            answer => answer,
        }
    }
}

impl SharedCheck {
    fn run(&self, command: &str, script: &str) -> Cmd {
        let mut command = redis::cmd(command);
        command.arg(script).arg(1).arg(&self.key);
        command.arg(self.interval.as_micros() as u64).arg(self.burst);
        command
    }
}

impl LimiterTask {
    /// Runs until `stop`; the connection then stays for checks of the shutdown. All rules must exist before; without any, it
    /// does nothing.
    pub async fn run(self, stop: CancellationToken) {
        if !self.replicas.wanted.load(Ordering::Relaxed) {
            // Nothing is limited per process, so no alert is due.
            self.replicas.metrics.rate_limits_shared.set(1);
            return stop.cancelled().await;
        }
        stop.run_until_cancelled(self.keep_connected()).await;
    }

    async fn keep_connected(&self) {
        let Replicas { connection, metrics, .. } = &*self.replicas;
        let mut changes = connection.subscribe();
        let mut backoff = Backoff::new(BACKOFF[0], BACKOFF[1]);
        let mut logged = false;
        for number in 1.. {
            match self.connect(number).await {
                Ok(found) => {
                    metrics.rate_limits_shared.set(1);
                    tracing::info!("rate limits are shared through redis");
                    logged = true; // `disconnect` logs the end.
                    let began = Instant::now();
                    connection.send_replace(Some(found));
                    let _ = changes.wait_for(Option::is_none).await;
                    if began.elapsed() >= STABLE_AFTER {
                        backoff.reset();
                    }
                }
                Err(error) if logged => tracing::debug!(%error, "redis still unavailable for rate limits"),
                Err(error) => {
                    logged = true;
                    tracing::warn!(%error, "redis unavailable; rate limits are enforced per process");
                }
            }
            sleep(backoff.next_delay()).await;
        }
    }

    async fn connect(&self, number: u64) -> RedisResult<SharedConnection> {
        let map = self.topology.fetch_slot_map(&SlotMap::default()).await?;
        let connect = async |node: &Node| Ok::<_, RedisError>((node.clone(), self.connect_to(node).await?));
        let nodes = try_join_all(map.nodes().iter().map(connect)).await?;
        let script = nodes.first().map(|(_, (_, script))| script.as_str().into()).unwrap_or_default();
        let nodes = nodes.into_iter().map(|(node, (connection, _))| (node, connection)).collect();
        let connection = SharedConnection { nodes: Arc::new(nodes), map: Arc::new(map), script, number };
        // A trial check fails on a replica, or on a Redis without memory.
        for node in connection.map.nodes() {
            let keys =
                (0..).map(|turn| self.channels.limit("none", "trial", format_args!("{number}-{turn}")));
            let Some(key) = connection.map.first_name_on(node, keys) else { continue };
            connection.check(&SharedCheck { key, interval: Duration::from_millis(1), burst: 1 }).await?;
        }
        Ok(connection)
    }

    async fn connect_to(&self, node: &Node) -> RedisResult<(MultiplexedConnection, String)> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(CONNECT_TIMEOUT))
            .set_pipeline_buffer_size(MAX_IN_FLIGHT)
            .set_concurrency_limit(MAX_IN_FLIGHT);
        let mut connection = self.topology.connect(node, &config).await?;
        let mut load = redis::cmd("SCRIPT");
        load.arg("LOAD").arg(SCRIPT);
        let script = load.query_async(&mut connection).await?;
        Ok((connection, script))
    }
}
