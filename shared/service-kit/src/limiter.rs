//! Rate limits (GCRA) per user, client address or login name.
//!
//! The counts of this process ([`table`]) are checked first, then the counts that all replicas share in Redis
//! ([`replicas`]). If Redis is unavailable, slow or full, this process limits locally; a metric and one log line say so. The
//! check never fails a request and hardly delays it. Memory and checks in flight are bounded.

mod replicas;
mod table;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    num::NonZeroU32,
    str::FromStr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use governor::{
    Quota, RateLimiter,
    clock::{Clock, DefaultClock},
    middleware::NoOpMiddleware,
};
use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge};
use sha2::{Digest, Sha256};
use thiserror::Error;

pub use self::replicas::LimiterTask;
use self::{
    replicas::{Replicas, SharedCheck},
    table::Table,
};
use crate::{client_address::client_network, labels, metrics, redis_topology::RedisTopology};
use protocol::{
    channels::Channels,
    ids::{ConversationId, UserId},
};

/// A burst of `burst`, refilled evenly over `period`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    Off,
    Of { burst: NonZeroU32, period: Duration },
}

#[derive(Debug, Error)]
#[error(
    "it must be off or a burst and a period such as 60/30 (60 at once, refilled within 30 seconds), at most 1000000/86400"
)]
pub struct InvalidLimit;

impl Limit {
    /// A burst of 0 means no limit.
    pub fn new(burst: u32, period: Duration) -> Self {
        NonZeroU32::new(burst).map_or(Self::Off, |burst| Self::Of { burst, period })
    }
}

impl FromStr for Limit {
    type Err = InvalidLimit;

    fn from_str(text: &str) -> Result<Self, InvalidLimit> {
        if matches!(text, "off" | "0") {
            return Ok(Self::Off);
        }
        let (burst, seconds) = text.split_once('/').ok_or(InvalidLimit)?;
        let (burst, seconds): (u32, u64) =
            (burst.parse().map_err(|_| InvalidLimit)?, seconds.parse().map_err(|_| InvalidLimit)?);
        if !(1..=1_000_000).contains(&burst) || !(1..=86_400).contains(&seconds) {
            return Err(InvalidLimit);
        }
        Ok(Self::new(burst, Duration::from_secs(seconds)))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Subject<'a> {
    User(UserId),
    /// A user in one conversation.
    Participant(UserId, ConversationId),
    /// IPv6 by /64.
    Address(IpAddr),
    /// Another back end, by the id of its token.
    Service(i64),
    /// Stored as a hash, because it is personal and of any length.
    Name(&'a str),
}

impl Subject<'_> {
    pub fn by(&self) -> &'static str {
        match self {
            Self::User(_) => "user",
            Self::Participant(..) => "participant",
            Self::Address(_) => "address",
            Self::Service(_) => "service",
            Self::Name(_) => "name",
        }
    }
}

impl fmt::Display for Subject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(user) => user.fmt(f),
            Self::Participant(user, conversation) => write!(f, "{conversation}:{user}"),
            Self::Address(address) => client_network(*address).fmt(f),
            Self::Service(token) => token.fmt(f),
            Self::Name(name) => write!(f, "{:.32x}", Sha256::digest(name)),
        }
    }
}

pub struct RateLimitRule {
    name: &'static str,
    active: Option<ActiveRule>,
}

struct ActiveRule {
    local: RateLimiter<u64, Table, DefaultClock, NoOpMiddleware<<DefaultClock as Clock>::Instant>>,
    /// Between two requests when the burst is used up.
    interval: Duration,
    burst: u32,
}

/// A limit was exceeded; a request is allowed again after `wait`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Over {
    pub rule: &'static str,
    pub by: &'static str,
    pub wait: Duration,
}

impl Over {
    pub fn retry_after(&self) -> u64 {
        (self.wait.as_millis().div_ceil(1_000) as u64).max(1)
    }
}

labels!(Limited { rule, by });

labels!(Reason { reason });

metrics! {
    pub struct LimiterMetrics {
        rate_limited: Family<Limited, Counter> = "Requests rejected by a rate limit, by rule and by whom it counts";
        rate_limit_local_decisions: Family<Reason, Counter> =
            "Rate limit decisions of this process alone, by why Redis was not used";
        rate_limits_shared: Gauge = "1 while rate limits are off, or shared with the other replicas through Redis";
    }
}

/// If Redis does not answer within this time, this process limits locally until Redis works again.
pub const SHARED_CHECK_TIMEOUT: Duration = Duration::from_millis(40);

pub struct Limiter {
    table: Table,
    hasher: RandomState,
    clock: DefaultClock,
    channels: Channels,
    replicas: Arc<Replicas>,
    metrics: LimiterMetrics,
}

impl Limiter {
    /// Also returns the task that keeps the limiter's own connection to Redis.
    pub fn new(
        topology: RedisTopology,
        channels: Channels,
        timeout: Duration,
        metrics: LimiterMetrics,
    ) -> (Self, LimiterTask) {
        let (replicas, worker) = replicas::new(topology, channels.clone(), timeout, metrics.clone());
        let limiter = Self {
            table: Table::default(),
            hasher: RandomState::new(),
            clock: DefaultClock::default(),
            channels,
            replicas,
            metrics,
        };
        (limiter, worker)
    }

    pub fn rule(&self, name: &'static str, limit: Limit) -> RateLimitRule {
        if limit != Limit::Off {
            self.replicas.wanted.store(true, Ordering::Relaxed);
        }
        self.rule_of(name, limit)
    }

    /// A rule for [`Self::allows`]: where all others are off, it is not worth a connection to Redis, and each process counts alone.
    pub fn minor_rule(&self, name: &'static str, limit: Limit) -> RateLimitRule {
        self.rule_of(name, limit)
    }

    fn rule_of(&self, name: &'static str, limit: Limit) -> RateLimitRule {
        let active = match limit {
            Limit::Off => None,
            Limit::Of { burst, period } => {
                let interval = (period / burst.get()).max(Duration::from_micros(1));
                let quota = Quota::with_period(interval).expect("it is not zero").allow_burst(burst);
                let local = RateLimiter::new(quota, self.table.clone(), self.clock.clone());
                Some(ActiveRule { local, interval, burst: burst.get() })
            }
        };
        RateLimitRule { name, active }
    }

    /// Counts a request locally and in Redis. If several rules reject it, the longest wait is returned. All rules count it, even if
    /// one rejects it.
    pub async fn check(&self, charges: &[(&RateLimitRule, Subject<'_>)]) -> Result<(), Over> {
        self.check_local(charges)?;
        self.check_shared(charges).await
    }

    /// Whether this is within the limit. Nobody is rejected if not, so it is not counted as that.
    pub async fn allows(&self, rule: &RateLimitRule, subject: Subject<'_>) -> bool {
        let charges = [(rule, subject)];
        let shared = self.replicas.wanted.load(Ordering::Relaxed);
        self.over_local(&charges).is_none() && (!shared || self.over_shared(&charges).await.is_none())
    }

    pub fn check_local(&self, charges: &[(&RateLimitRule, Subject<'_>)]) -> Result<(), Over> {
        self.reject(self.over_local(charges))
    }

    pub async fn check_shared(&self, charges: &[(&RateLimitRule, Subject<'_>)]) -> Result<(), Over> {
        self.reject(self.over_shared(charges).await)
    }

    /// The longest wait, if a rule rejects it.
    fn over_local(&self, charges: &[(&RateLimitRule, Subject<'_>)]) -> Option<Over> {
        let waits = charges.iter().filter_map(|(rule, subject)| {
            let active = rule.active.as_ref()?;
            let subject_of = |subject| self.hasher.hash_one((rule.name, subject));
            let key = match *subject {
                Subject::Address(address) => subject_of(Subject::Address(client_network(address))),
                other => subject_of(other),
            };
            let until = active.local.check_key(&key).err()?;
            Some(Over { rule: rule.name, by: subject.by(), wait: until.wait_time_from(self.clock.now()) })
        });
        waits.max_by_key(|over| over.wait)
    }

    async fn over_shared(&self, charges: &[(&RateLimitRule, Subject<'_>)]) -> Option<Over> {
        let active = |(rule, subject): &(&RateLimitRule, Subject<'_>)| {
            let ActiveRule { interval, burst, .. } = rule.active.as_ref()?;
            let key = self.channels.limit(rule.name, subject.by(), subject);
            Some((rule.name, subject.by(), SharedCheck { key, interval: *interval, burst: *burst }))
        };
        let checks: Vec<_> = charges.iter().filter_map(active).collect();
        if checks.is_empty() {
            return None;
        }
        let waits = self.replicas.check(checks.iter().map(|(.., check)| check)).await?;
        let waits = checks.iter().zip(waits).map(|((rule, by, _), wait)| Over { rule, by, wait });
        waits.filter(|over| !over.wait.is_zero()).max_by_key(|over| over.wait)
    }

    fn reject(&self, over: Option<Over>) -> Result<(), Over> {
        let Some(over) = over else { return Ok(()) };
        self.metrics.rate_limited.get_or_create(&Limited { rule: over.rule, by: over.by }).inc();
        tracing::debug!(rule = over.rule, by = over.by, wait = ?over.wait, "request rejected by a rate limit");
        Err(over)
    }
}

#[cfg(test)]
mod settings {
    use super::*;

    #[test]
    fn a_limit_is_read_as_an_operator_writes_it() {
        let limit = |text: &str| text.parse::<Limit>().ok();
        assert_eq!(limit("60/30"), Some(Limit::new(60, Duration::from_secs(30))));
        assert_eq!((limit("off"), limit("0")), (Some(Limit::Off), Some(Limit::Off)));
        for bad in [
            "",
            "60",
            "60/",
            "/60",
            "0/60",
            "60/0",
            "60/30/1",
            "-1/60",
            "1.5/60",
            "1000001/1",
            "1/86401",
            "on",
        ] {
            assert_eq!(limit(bad), None, "{bad}");
        }
    }

    #[test]
    fn retry_after_is_whole_seconds_and_long_enough() {
        for (millis, seconds) in [(0, 1), (1, 1), (999, 1), (1_000, 1), (1_001, 2), (59_001, 60)] {
            let over = Over { rule: "send", by: "user", wait: Duration::from_millis(millis) };
            assert_eq!(over.retry_after(), seconds, "{millis}");
        }
    }
}
