//! Limits of open streams per process and per client address, of new streams per second, and rate limits per user and per
//! address over all gateways. The engine limits the open streams of a user and replaces the oldest.

use std::{
    collections::HashMap,
    net::IpAddr,
    num::NonZeroU32,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use service_kit::{
    client_address::client_network,
    limiter::{Limiter, Over, RateLimitRule, Subject},
};
use slab::Slab;

use crate::config::{Admission, Opening};

pub struct StreamLimits {
    streams: usize,
    streams_per_address: usize,
    rate: DefaultDirectRateLimiter,
    open: AtomicUsize,
    /// Empty without a limit per address.
    networks: Mutex<Networks>,
    limiter: Limiter,
    opened_per_user: RateLimitRule,
    opened_per_address: RateLimitRule,
}

/// Admission of one stream; released on drop. Small, because every stream has one.
pub struct Permit {
    limits: Arc<StreamLimits>,
    /// Where the client's network is counted.
    network: Option<u32>,
}

/// The open streams of each client network.
#[derive(Default)]
struct Networks {
    slots: HashMap<IpAddr, u32>,
    counts: Slab<(IpAddr, usize)>,
}

impl Networks {
    /// Counts one more, unless there are `limit`.
    fn enter(&mut self, address: IpAddr, limit: usize) -> Option<u32> {
        let counts = &mut self.counts;
        let slot = *self.slots.entry(address).or_insert_with(|| counts.insert((address, 0)) as u32);
        let (_, count) = &mut self.counts[slot as usize];
        (*count < limit).then(|| {
            *count += 1;
            slot
        })
    }

    fn leave(&mut self, slot: u32) {
        let (address, count) = &mut self.counts[slot as usize];
        *count -= 1;
        if *count == 0 {
            self.slots.remove(address);
            self.counts.remove(slot as usize);
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitReached {
    Process,
    Address,
    Rate,
    UserRate,
    AddressRate,
}

impl LimitReached {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Process => "streams",
            Self::Address => "address",
            Self::Rate => "rate",
            Self::UserRate => "user_rate",
            Self::AddressRate => "address_rate",
        }
    }
}

impl From<Over> for LimitReached {
    fn from(over: Over) -> Self {
        if over.by == "address" { Self::AddressRate } else { Self::UserRate }
    }
}

impl StreamLimits {
    pub fn new(admission: &Admission, opening: &Opening, limiter: Limiter) -> Arc<Self> {
        let rate = NonZeroU32::new(admission.rate).unwrap_or(NonZeroU32::MIN);
        Arc::new(Self {
            streams: admission.streams,
            streams_per_address: admission.streams_per_address,
            rate: RateLimiter::direct(Quota::per_second(rate)),
            open: AtomicUsize::new(0),
            networks: Mutex::default(),
            opened_per_user: limiter.rule("open", opening.per_user),
            opened_per_address: limiter.rule("open", opening.per_address),
            limiter,
        })
    }

    /// Admits a stream of this user. The user's local count comes first, so that a user over the limit uses up nothing of the
    /// process; Redis comes last, so that it counts only streams that nothing here rejects.
    pub async fn admit(self: &Arc<Self>, user: Subject<'_>, client: IpAddr) -> Result<Permit, LimitReached> {
        let charges = [(&self.opened_per_user, user), (&self.opened_per_address, Subject::Address(client))];
        self.limiter.check_local(&charges)?;
        let permit = self.take(client)?;
        self.limiter.check_shared(&charges).await?;
        Ok(permit)
    }

    fn take(self: &Arc<Self>, address: IpAddr) -> Result<Permit, LimitReached> {
        let address = client_network(address);
        if self.rate.check().is_err() {
            return Err(LimitReached::Rate);
        }
        if self.open.fetch_add(1, Ordering::Relaxed) >= self.streams {
            self.open.fetch_sub(1, Ordering::Relaxed);
            return Err(LimitReached::Process);
        }
        let mut network = None;
        if self.streams_per_address > 0 {
            network = self.networks().enter(address, self.streams_per_address);
            if network.is_none() {
                self.open.fetch_sub(1, Ordering::Relaxed);
                return Err(LimitReached::Address);
            }
        }
        Ok(Permit { limits: self.clone(), network })
    }

    fn networks(&self) -> MutexGuard<'_, Networks> {
        self.networks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.limits.open.fetch_sub(1, Ordering::Relaxed);
        if let Some(network) = self.network {
            self.limits.networks().leave(network);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::Ipv4Addr,
        time::{Duration, Instant},
    };

    use protocol::channels::Channels;
    use service_kit::{
        limiter::{Limit, LimiterMetrics},
        redis_topology::RedisTopology,
    };

    use super::*;

    fn limits(streams: usize, streams_per_address: usize, rate: u32) -> Arc<StreamLimits> {
        let admission = Admission { streams, streams_per_address, rate, max_age: Duration::from_mins(1) };
        let opening = Opening { per_user: Limit::Off, per_address: Limit::Off, patience: Duration::ZERO };
        // Never used.
        let redis = RedisTopology::single("redis://localhost").unwrap();
        let (limiter, _) =
            Limiter::new(redis, Channels::default(), opening.patience, LimiterMetrics::default());
        StreamLimits::new(&admission, &opening, limiter)
    }

    const A: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    const B: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));

    #[test]
    fn each_limit_rejects_and_a_dropped_permit_is_released() {
        let limits = limits(3, 2, 1_000);
        let first = limits.take(A).ok().unwrap();
        let _second = limits.take(A).ok().unwrap();
        assert_eq!(limits.take(A).err(), Some(LimitReached::Address));
        let _third = limits.take(B).ok().unwrap();
        assert_eq!(limits.take(B).err(), Some(LimitReached::Process));
        drop(first);
        assert!(limits.take(A).is_ok());
        assert_eq!(limits.open.load(Ordering::Relaxed), 2);
        assert_eq!(limits.networks().slots.len(), 2);
    }

    #[test]
    fn a_burst_over_the_rate_is_rejected() {
        let limits = limits(100, 0, 5);
        let began = Instant::now();
        let mut taken = Vec::new();
        let reached = loop {
            match limits.take(A) {
                Ok(permit) => taken.push(permit),
                Err(reached) => break reached,
            }
        };
        assert_eq!(reached, LimitReached::Rate);
        // While this thread did not run, the rate went on.
        let refilled = (began.elapsed().as_secs_f64() * 5.0) as usize;
        assert!((5..=5 + refilled).contains(&taken.len()), "{} taken, {refilled} refilled", taken.len());
    }
}
