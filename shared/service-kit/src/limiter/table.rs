//! The counts of this process, in memory of a fixed size.
//!
//! A key may be in any of eight entries of its bucket. A new key replaces the entry with the earliest arrival time, so that many new
//! addresses displace keys that would expire next, and not keys that are limited.

use std::sync::{Arc, Mutex, PoisonError};

use governor::{nanos::Nanos, state::StateStore};

const SHARDS: usize = 16;
const BUCKETS: usize = 1_024;
const ENTRIES: usize = 8;

/// The hash of a key, or 0 if unused, and its theoretical arrival time (GCRA).
type Entry = [u64; 2];
type Bucket = [Entry; ENTRIES];

/// At most 2 MiB; clones share it.
#[derive(Clone)]
pub(super) struct Table(Arc<[Mutex<Vec<Bucket>>]>);

impl Default for Table {
    fn default() -> Self {
        // Zeroed pages cost nothing until they are used.
        Self((0..SHARDS).map(|_| Mutex::new(vec![[[0; 2]; ENTRIES]; BUCKETS])).collect())
    }
}

/// Keys are hashes with a random key of this process, so that clients cannot choose a bucket; collisions are one in 2^64.
impl StateStore for Table {
    type Key = u64;

    fn measure_and_replace<T, F, E>(&self, key: &u64, judge: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let hash = (*key).max(1);
        let shard = &self.0[hash as usize % SHARDS];
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = &mut shard[hash as usize / SHARDS % BUCKETS];
        let found = bucket.iter_mut().find(|[present, _]| *present == hash);
        let (outcome, arrival) = judge(found.as_ref().map(|[_, arrival]| Nanos::new(*arrival)))?;
        let entry = match found {
            Some(entry) => entry,
            None => bucket.iter_mut().min_by_key(|[_, arrival]| *arrival).expect("there are eight"),
        };
        *entry = [hash, arrival.as_u64()];
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use std::{hash::BuildHasher, hash::RandomState, num::NonZeroU32, time::Duration};

    use governor::{Quota, RateLimiter, clock::FakeRelativeClock, middleware::NoOpMiddleware};

    use super::*;

    type TestLimiter = RateLimiter<u64, Table, FakeRelativeClock, NoOpMiddleware<Nanos>>;

    const BURST: u32 = 10;

    fn limiter(table: &Table, clock: &FakeRelativeClock) -> TestLimiter {
        let quota = Quota::with_period(Duration::from_secs(1)).unwrap();
        RateLimiter::new(quota.allow_burst(NonZeroU32::new(BURST).unwrap()), table.clone(), clock.clone())
    }

    fn allowed(limiter: &TestLimiter, key: u64, tries: u32) -> u32 {
        (0..tries).map(|_| u32::from(limiter.check_key(&key).is_ok())).sum()
    }

    #[test]
    fn each_key_has_its_burst_and_its_refill() {
        let (table, clock) = (Table::default(), FakeRelativeClock::default());
        let limiter = limiter(&table, &clock);
        assert_eq!(
            (allowed(&limiter, 7, 20), allowed(&limiter, 2, 5), allowed(&limiter, 0, 20)),
            (10, 5, 10)
        );
        clock.advance(Duration::from_secs(3));
        assert_eq!((allowed(&limiter, 7, 20), allowed(&limiter, 2, 20)), (3, 8));
        clock.advance(Duration::from_secs(1_000));
        assert_eq!(allowed(&limiter, 7, 20), 10);
    }

    #[test]
    fn many_keys_use_no_more_memory_and_release_no_limited_key() {
        let (table, clock, hashes) = (Table::default(), FakeRelativeClock::default(), RandomState::new());
        let limiter = limiter(&table, &clock);
        let held_back: Vec<u64> = (0..100).map(|n| hashes.hash_one(("held back", n))).collect();
        assert!(held_back.iter().all(|key| allowed(&limiter, *key, 20) == BURST));
        for address in 0..200_000_u64 {
            limiter.check_key(&hashes.hash_one(("crowd", address))).unwrap();
        }
        let kept: usize = table.0.iter().map(|shard| shard.lock().unwrap().capacity()).sum();
        assert_eq!(kept, SHARDS * BUCKETS);
        let freed = held_back.iter().filter(|key| allowed(&limiter, **key, 1) > 0).count();
        assert_eq!(freed, 0);
    }
}
