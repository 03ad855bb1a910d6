//! What all replicas have counted, in Redis: one small script per key, by Redis' own clock, on a connection of its own; on a
//! cluster, one to each node.
//!
//! It is asked only while it is well. The first answer that fails or does not come in time ends that, for everybody and at
//! once; then a task looks for Redis, less and less often, until it answers again. So an outage delays those who were asking
//! when it began, once, and nobody else.

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

use super::{Metrics, Reason};
use crate::{
    backoff::Backoff,
    redis_topology::{Node, RedisTopology, SlotMap, redirect_target},
};
use protocol::channels::Channels;

/// GCRA: the key holds until when its subject owes, in microseconds. Answers for how long to wait; 0: it was counted.
///
/// One that owes for longer than the burst was counted by a clock that has been set back since, as after a failover.
const SCRIPT: &str = r"
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local owes_until = tonumber(redis.call('GET', KEYS[1])) or now
owes_until = math.min(math.max(owes_until, now), now + interval * burst)
local wait = owes_until + interval - (now + interval * burst)
if wait > 0 then
  return wait
end
owes_until = owes_until + interval
local lasts = math.ceil((owes_until - now) / 1000)
redis.call('SET', KEYS[1], string.format('%.0f', owes_until), 'PX', lasts)
return 0
";

/// Questions in flight; who finds more is decided upon without asking.
const QUESTIONS: usize = 512;
/// For connecting, and for the first answer.
const CONNECT_WITHIN: Duration = Duration::from_secs(1);
/// Between attempts to connect: the first delay and the longest.
const BACKOFF: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];
/// A Redis that was well for so long is looked for eagerly again. One that is slow every other moment is left alone.
const STEADY: Duration = Duration::from_secs(10);

/// May this be counted?
pub(super) struct Question {
    pub(super) key: String,
    pub(super) interval: Duration,
    pub(super) burst: u32,
}

pub(super) struct Replicas {
    /// There while Redis is well.
    link: watch::Sender<Option<Link>>,
    places: Semaphore,
    /// There is something to ask about.
    pub(super) wanted: AtomicBool,
    patience: Duration,
    metrics: Metrics,
}

#[derive(Clone)]
struct Link {
    nodes: Arc<BTreeMap<Node, MultiplexedConnection>>,
    map: Arc<SlotMap>,
    /// The script's name at Redis.
    script: Arc<str>,
    /// Tells it from those before and after.
    number: u64,
}

/// The task that looks for Redis.
pub struct Worker {
    topology: RedisTopology,
    channels: Channels,
    replicas: Arc<Replicas>,
}

pub(super) fn new(
    topology: RedisTopology,
    channels: Channels,
    patience: Duration,
    metrics: Metrics,
) -> (Arc<Replicas>, Worker) {
    let replicas = Arc::new(Replicas {
        link: watch::Sender::default(),
        places: Semaphore::new(QUESTIONS),
        wanted: AtomicBool::new(false),
        patience,
        metrics,
    });
    (replicas.clone(), Worker { topology, channels, replicas })
}

impl Replicas {
    /// How long each has to wait, zero if it was counted. `None`: Redis did not say.
    pub(super) async fn ask(
        &self,
        questions: impl ExactSizeIterator<Item = &Question>,
    ) -> Option<Vec<Duration>> {
        let Some(link) = self.link.borrow().clone() else { return self.alone("away") };
        let count = u32::try_from(questions.len()).expect("one for each rule");
        let Ok(_places) = self.places.try_acquire_many(count) else { return self.alone("busy") };
        // One key each, so that a cluster may keep them on different nodes.
        match timeout(self.patience, try_join_all(questions.map(|question| link.ask(question)))).await {
            Ok(Ok(waits)) => Some(waits.into_iter().map(Duration::from_micros).collect()),
            Ok(Err(error)) => {
                self.leave(&link, &error.to_string());
                self.alone("failed")
            }
            Err(_) => {
                self.leave(&link, "no answer in time");
                self.alone("slow")
            }
        }
    }

    fn alone<T>(&self, reason: &'static str) -> Option<T> {
        self.metrics.rate_limit_local_decisions.get_or_create(&Reason { reason }).inc();
        None
    }

    /// The first one who notices says so.
    fn leave(&self, link: &Link, reason: &str) {
        let left = self
            .link
            .send_if_modified(|current| current.take_if(|current| current.number == link.number).is_some());
        if left {
            self.metrics.rate_limits_shared.set(0);
            tracing::warn!(
                reason,
                "Redis does not count for rate limits; each process does so alone until it is back"
            );
        }
    }
}

impl Link {
    async fn ask(&self, question: &Question) -> RedisResult<u64> {
        let absent = || RedisError::from((ErrorKind::Io, "nobody owns the key"));
        let node = self.map.node_of(&question.key).ok_or_else(absent)?;
        let mut connection = self.nodes.get(node).ok_or_else(absent)?.clone();
        match question.run("EVALSHA", &self.script).query_async(&mut connection).await {
            // Redis has forgotten it: this tells it again.
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                question.run("EVAL", SCRIPT).query_async(&mut connection).await
            }
            // The slot is on its way to another node, and there the key is or will be.
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::Ask) => {
                let other = redirect_target(&error, node).and_then(|node| self.nodes.get(&node));
                let mut other = other.ok_or(error)?.clone();
                let mut asking = redis::pipe();
                asking.cmd("ASKING").ignore().add_command(question.run("EVAL", SCRIPT));
                asking.query_async::<(u64,)>(&mut other).await.map(|(wait,)| wait)
            }
            answer => answer,
        }
    }
}

impl Question {
    fn run(&self, command: &str, script: &str) -> Cmd {
        let mut command = redis::cmd(command);
        command.arg(script).arg(1).arg(&self.key);
        command.arg(self.interval.as_micros() as u64).arg(self.burst);
        command
    }
}

impl Worker {
    /// Until `stop`. The connection that is there then goes on, for who still asks. Begins once all rules are made: without
    /// any, there is nothing to do.
    pub async fn run(self, stop: CancellationToken) {
        if !self.replicas.wanted.load(Ordering::Relaxed) {
            return stop.cancelled().await;
        }
        if stop.run_until_cancelled(self.look_for_redis()).await.is_none() {
            tracing::debug!("looks for Redis no more");
        }
    }

    async fn look_for_redis(&self) {
        let Replicas { link, metrics, .. } = &*self.replicas;
        let mut links = link.subscribe();
        let mut backoff = Backoff::new(BACKOFF[0], BACKOFF[1]);
        let mut told = false;
        for number in 1.. {
            match self.connect(number).await {
                Ok(found) => {
                    metrics.rate_limits_shared.set(1);
                    tracing::info!("rate limits are counted together with the other replicas");
                    told = true; // Whoever ends it tells it.
                    let began = Instant::now();
                    link.send_replace(Some(found));
                    let _ = links.wait_for(Option::is_none).await;
                    if began.elapsed() >= STEADY {
                        backoff.reset();
                    }
                }
                Err(error) if told => tracing::debug!(%error, "Redis does not answer yet"),
                Err(error) => {
                    told = true;
                    tracing::warn!(%error, "Redis does not count for rate limits; each process does so alone until it is there");
                }
            }
            sleep(backoff.next_delay()).await;
        }
    }

    async fn connect(&self, number: u64) -> RedisResult<Link> {
        let map = self.topology.fetch_slot_map(&SlotMap::default()).await?;
        let connect = async |node: &Node| Ok::<_, RedisError>((node.clone(), self.connect_to(node).await?));
        let nodes = try_join_all(map.nodes().iter().map(connect)).await?;
        let script = nodes.first().map(|(_, (_, script))| script.as_str().into()).unwrap_or_default();
        let nodes = nodes.into_iter().map(|(node, (connection, _))| (node, connection)).collect();
        let link = Link { nodes: Arc::new(nodes), map: Arc::new(map), script, number };
        // Only one that counts is well: not a replica, nor one without memory left.
        for node in link.map.nodes() {
            let keys =
                (0..).map(|turn| self.channels.limit("none", "trial", format_args!("{number}-{turn}")));
            let Some(key) = link.map.first_name_on(node, keys) else { continue };
            link.ask(&Question { key, interval: Duration::from_millis(1), burst: 1 }).await?;
        }
        Ok(link)
    }

    /// With the script's name.
    async fn connect_to(&self, node: &Node) -> RedisResult<(MultiplexedConnection, String)> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_WITHIN))
            .set_response_timeout(Some(CONNECT_WITHIN))
            .set_pipeline_buffer_size(QUESTIONS)
            .set_concurrency_limit(QUESTIONS);
        let mut connection = self.topology.connect(node, &config).await?;
        let mut load = redis::cmd("SCRIPT");
        load.arg("LOAD").arg(SCRIPT);
        let script = load.query_async(&mut connection).await?;
        Ok((connection, script))
    }
}
