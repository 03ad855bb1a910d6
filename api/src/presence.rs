//! Who is online. The truth is in Redis, in a hash for each gateway: its users, and since when. Gateways report changes and renew their
//! lease; a gateway without one is swept, and its users leave.
//!
//! Partners are told when a user's first gateway reports them and when no gateway has them any more. Several replicas work on the same
//! hashes without a lock, so the order matters. Users who come are added first and told if no earlier entry is found elsewhere: of two
//! entries at the same time one is the earliest, and its writer tells. Users who leave are removed first, one by one or by the mark of a
//! sweep, and told if no entry is found; a second look after that finds those who came in between, and tells that they are online. What is
//! told twice is harmless, what is not told is not. So everything can be repeated, and is, after a failure: by the gateway, which has no
//! answer, or by the next sweep.
//!
//! A wiped Redis knows no gateway, so each reports all its users again.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use chrono::Utc;
use futures_util::future::try_join_all;
use protocol::{
    channels::Channels,
    ids::UserId,
    presence::{LEASE, PresenceAnswer, PresenceReport, TAKEN_WITHIN},
};
use redis::{Cmd, RedisError};
use service_kit::redis_topology::KeyedRedis;
use thiserror::Error;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    domain::event::{EphemeralEvent, Presence},
    metrics::{Change, Metrics},
    publisher::Publisher,
    store::{Database, StoreError, audience},
};

/// Between two looks for gateways whose lease has ended.
const SWEEP_EVERY: Duration = Duration::from_secs(2);
/// How long Redis must have worked before gateways are swept: they may not have been able to renew their leases.
const STEADY: Duration = Duration::from_secs(16);
/// After a failure of Redis nobody is told for so long: publishers and gateways reconnect to it, and what is told meanwhile is lost.
const SETTLE: Duration = Duration::from_secs(6);
/// Another replica sweeps a gateway again if the one that began has not finished by then.
const SWEEP_WITHIN: Duration = Duration::from_secs(10);
/// Hashes of gateways that nobody swept are forgotten.
const FORGOTTEN_AFTER: Duration = Duration::from_mins(5);
/// Users in one command or statement.
const BATCH: usize = 500;
/// In each gateway's hash from its first report on: without it, users who were reported are lost.
const COMPLETE: &str = "";
/// Failures of Redis are logged once in so long.
const LOG_EVERY: Duration = Duration::from_mins(1);

/// Renews the lease of a gateway that is known and not being swept. The score is the time of the last report, or, negated, when the sweep
/// began.
const RENEW: &str = r"
local now = redis.call('TIME')[1]
if ARGV[2] == '0' then
  local score = redis.call('ZSCORE', KEYS[1], ARGV[1])
  if not score or tonumber(score) < 0 then return 0 end
end
redis.call('ZADD', KEYS[1], now, ARGV[1])
return 1
";

/// The gateways to sweep, which are marked.
const CLAIM: &str = r"
local now = tonumber(redis.call('TIME')[1])
local ended = redis.call('ZRANGEBYSCORE', KEYS[1], 0, now - ARGV[1])
local begun = redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[2] - now, -1)
for _, gateway in ipairs(begun) do table.insert(ended, gateway) end
for _, gateway in ipairs(ended) do redis.call('ZADD', KEYS[1], -now, gateway) end
return ended
";

#[derive(Debug, Error)]
pub enum PresenceError {
    #[error("redis: {0}")]
    Redis(#[from] RedisError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("it took too long")]
    Slow,
    #[error("redis has just come back")]
    Unsettled,
}

/// Cheap to clone.
#[derive(Clone)]
pub struct PresenceService {
    redis: KeyedRedis,
    channels: Channels,
    database: Database,
    publisher: Publisher,
    metrics: Metrics,
    health: Arc<Mutex<Health>>,
}

struct Health {
    started_at: Instant,
    /// The last failure of Redis.
    failed_at: Option<Instant>,
    logged_at: Option<Instant>,
}

/// Since when, in milliseconds since 1970, and at which gateway. The least one is the earliest.
type Entry = (i64, String);

impl PresenceService {
    pub fn new(
        redis: KeyedRedis,
        channels: Channels,
        database: Database,
        publisher: Publisher,
        metrics: Metrics,
    ) -> Self {
        let health = Health { started_at: Instant::now(), failed_at: None, logged_at: None };
        let health = Arc::new(Mutex::new(health));
        Self { redis, channels, database, publisher, metrics, health }
    }

    pub async fn report(&self, report: PresenceReport) -> Result<PresenceAnswer, PresenceError> {
        timeout(TAKEN_WITHIN, self.take(report)).await.map_err(|_| PresenceError::Slow)?
    }

    async fn take(&self, report: PresenceReport) -> Result<PresenceAnswer, PresenceError> {
        let PresenceReport { gateway, first, came, left } = report;
        let known = self.renew(&gateway, first).await?;
        if known && !(came.is_empty() && left.is_empty()) {
            if self.health().failed_at.is_some_and(|failed| failed.elapsed() < SETTLE) {
                return Err(PresenceError::Unsettled);
            }
            for users in came.chunks(BATCH) {
                self.come(&gateway, users).await?;
            }
            for users in left.chunks(BATCH) {
                self.leave(&gateway, users).await?;
            }
        }
        Ok(PresenceAnswer { known })
    }

    /// Which of these users are online.
    pub async fn online(&self, users: &[UserId]) -> Result<HashSet<UserId>, PresenceError> {
        if users.is_empty() {
            return Ok(HashSet::new());
        }
        Ok(self.entries(users).await?.into_keys().collect())
    }

    /// A user has begun or ceased to share their presence.
    pub async fn sharing_changed(&self, user: UserId, shares: bool) -> Result<(), PresenceError> {
        let online = shares && self.entries(&[user]).await?.contains_key(&user);
        if online || !shares {
            self.tell(&[user], online, !shares).await?;
        }
        Ok(())
    }

    async fn renew(&self, gateway: &str, first: bool) -> Result<bool, PresenceError> {
        let (gateways, own) = (self.channels.gateways(), self.channels.gateway(gateway));
        if first {
            self.query::<()>(&own, redis::cmd("HSET").arg(&own).arg(COMPLETE).arg(0)).await?;
        }
        self.query::<()>(&own, redis::cmd("EXPIRE").arg(&own).arg(FORGOTTEN_AFTER.as_secs())).await?;
        if !self.query::<bool>(&own, redis::cmd("HEXISTS").arg(&own).arg(COMPLETE)).await? {
            return Ok(false);
        }
        let mut renew = redis::cmd("EVAL");
        renew.arg(RENEW).arg(1).arg(&gateways).arg(gateway).arg(u8::from(first));
        self.query(&gateways, &renew).await
    }

    async fn come(&self, gateway: &str, users: &[UserId]) -> Result<(), PresenceError> {
        let own = self.channels.gateway(gateway);
        let now = Utc::now().timestamp_millis();
        // Who is reported again keeps the time of the first report.
        let mut known = redis::cmd("HMGET");
        known.arg(&own).arg(users.iter().map(ToString::to_string).collect::<Vec<_>>());
        let known: Vec<Option<i64>> = self.query(&own, &known).await?;
        let mut add = redis::cmd("HSET");
        add.arg(&own);
        for (user, known) in users.iter().zip(&known) {
            add.arg(user.to_string()).arg(known.unwrap_or(now));
        }
        self.query::<()>(&own, &add).await?;
        let entries = self.entries(users).await?;
        let is_first = |user: &&UserId| entries.get(user).is_some_and(|(_, first)| first == gateway);
        let first: Vec<_> = users.iter().filter(is_first).copied().collect();
        self.tell(&first, true, false).await
    }

    async fn leave(&self, gateway: &str, users: &[UserId]) -> Result<(), PresenceError> {
        let own = self.channels.gateway(gateway);
        let mut remove = redis::cmd("HDEL");
        remove.arg(&own).arg(users.iter().map(ToString::to_string).collect::<Vec<_>>());
        self.query::<()>(&own, &remove).await?;
        self.tell_gone(users).await
    }

    /// They are no longer present at some gateway.
    async fn tell_gone(&self, users: &[UserId]) -> Result<(), PresenceError> {
        let entries = self.entries(users).await?;
        let gone: Vec<_> = users.iter().filter(|user| !entries.contains_key(user)).copied().collect();
        if gone.is_empty() {
            return Ok(());
        }
        let note = async |connection: &mut _| audience::note_last_seen(connection, &gone).await;
        self.database.run(note).await?;
        self.tell(&gone, false, false).await?;
        let returned: Vec<_> = self.entries(&gone).await?.into_keys().collect();
        self.tell(&returned, true, false).await
    }

    /// The earliest entry of each of these users who has one, at gateways that are not being swept.
    async fn entries(&self, users: &[UserId]) -> Result<HashMap<UserId, Entry>, PresenceError> {
        let gateways = self.channels.gateways();
        let mut list = redis::cmd("ZRANGEBYSCORE");
        let known: Vec<String> = self.query(&gateways, list.arg(&gateways).arg(0).arg("+inf")).await?;
        let fields: Vec<_> = users.iter().map(ToString::to_string).collect();
        let read = known.into_iter().map(|gateway| {
            let key = self.channels.gateway(&gateway);
            let mut get = redis::cmd("HMGET");
            get.arg(&key).arg(&fields);
            async move { Ok::<_, PresenceError>((gateway, self.query::<Vec<Option<i64>>>(&key, &get).await?)) }
        });
        let mut earliest: HashMap<UserId, Entry> = HashMap::new();
        for (gateway, since) in try_join_all(read).await? {
            for (user, since) in users.iter().zip(since) {
                let Some(since) = since else { continue };
                let entry = (since, gateway.clone());
                let first = earliest.entry(*user).or_insert_with(|| entry.clone());
                if entry < *first {
                    *first = entry;
                }
            }
        }
        Ok(earliest)
    }

    /// `unshared`: also of users who do not share their presence.
    async fn tell(&self, users: &[UserId], online: bool, unshared: bool) -> Result<(), PresenceError> {
        if users.is_empty() {
            return Ok(());
        }
        let find = async |connection: &mut _| audience::partners(connection, users, unshared).await;
        for (user, partners) in self.database.run(find).await? {
            let last_seen_at = (!online && !unshared).then(Utc::now);
            let event = EphemeralEvent::Presence(Presence { user_id: user, online, last_seen_at });
            self.publisher.room_for_ephemeral().await;
            self.publisher.publish_ephemeral(&event, partners);
        }
        let change = if online { "online" } else { "offline" };
        self.metrics.presence_changes.get_or_create(&Change { change }).inc_by(users.len() as u64);
        Ok(())
    }

    /// Sweeps gateways whose lease has ended until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        stop.run_until_cancelled(async {
            loop {
                sleep(SWEEP_EVERY.mul_f64(rand::random_range(0.8..1.2))).await;
                if let Err(error) = self.sweep().await {
                    tracing::debug!(%error, "gateways whose lease has ended could not be swept; it is retried");
                }
            }
        })
        .await;
    }

    async fn sweep(&self) -> Result<(), PresenceError> {
        let gateways = self.channels.gateways();
        // A command in any case, so that a failure is noticed.
        let steady_since = {
            let health = self.health();
            health.failed_at.unwrap_or(health.started_at)
        };
        if steady_since.elapsed() < STEADY {
            return self.query::<()>(&gateways, redis::cmd("EXISTS").arg(&gateways)).await;
        }
        let mut claim = redis::cmd("EVAL");
        claim.arg(CLAIM).arg(1).arg(&gateways).arg(LEASE.as_secs()).arg(SWEEP_WITHIN.as_secs());
        for gateway in self.query::<Vec<String>>(&gateways, &claim).await? {
            let own = self.channels.gateway(&gateway);
            let users: Vec<String> = self.query(&own, redis::cmd("HKEYS").arg(&own)).await?;
            let users: Vec<UserId> = users.iter().filter_map(|user| user.parse().ok()).collect();
            tracing::info!(
                gateway,
                users = users.len(),
                "gateway no longer reports presence; its users leave"
            );
            // Its hash stays until all are told: the next one to sweep, after a crash, must find them.
            for users in users.chunks(BATCH) {
                self.tell_gone(users).await?;
            }
            self.query::<()>(&own, redis::cmd("DEL").arg(&own)).await?;
            self.query::<()>(&gateways, redis::cmd("ZREM").arg(&gateways).arg(&gateway)).await?;
        }
        Ok(())
    }

    async fn query<T: redis::FromRedisValue>(&self, key: &str, command: &Cmd) -> Result<T, PresenceError> {
        self.redis.query(key, command).await.map_err(|error| {
            let mut health = self.health();
            health.failed_at = Some(Instant::now());
            if health.logged_at.is_none_or(|logged| logged.elapsed() > LOG_EVERY) {
                health.logged_at = Some(Instant::now());
                tracing::warn!(%error, "redis unavailable for presence; it stays as it is until redis is back");
            }
            error.into()
        })
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
