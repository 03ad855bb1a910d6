//! The counts of this process, in memory that grows with the number of keys, up to a fixed size.
//!
//! A key may be in any of eight entries of either of its two buckets. If all are used, the table doubles. At its full size, a new key
//! replaces the entry with the earliest arrival time, so that many new addresses displace keys that would expire next, and not keys
//! that are limited.

use std::{
    mem,
    sync::{Arc, Mutex, PoisonError},
};

use governor::{nanos::Nanos, state::StateStore};

const SHARDS: usize = 16;
/// Of each shard; powers of two.
const FIRST_BUCKETS: usize = 8;
const BUCKETS: usize = 1_024;
const ENTRIES: usize = 8;

/// The hash of a key, or 0 if unused, and its theoretical arrival time (GCRA).
type Entry = [u64; 2];
type Bucket = [Entry; ENTRIES];

/// At most 2 MiB; clones share it.
#[derive(Clone)]
pub(super) struct Table(Arc<[Mutex<Shard>]>);

struct Shard(Vec<Bucket>);

impl Default for Table {
    fn default() -> Self {
        Self((0..SHARDS).map(|_| Mutex::new(Shard(vec![[[0; 2]; ENTRIES]; FIRST_BUCKETS]))).collect())
    }
}

impl Shard {
    fn buckets(&self, hash: u64) -> [usize; 2] {
        [hash as usize / SHARDS, (hash >> 32) as usize].map(|bits| bits % self.0.len())
    }

    fn find(&mut self, hash: u64) -> Option<&mut Entry> {
        let [one, two] = self.buckets(hash);
        let bucket = if self.0[one].iter().any(|[present, _]| *present == hash) { one } else { two };
        self.0[bucket].iter_mut().find(|[present, _]| *present == hash)
    }

    fn insert(&mut self, entry: Entry) {
        loop {
            let [one, two] = self.buckets(entry[0]);
            let earliest = |bucket: usize| {
                let arrivals = self.0[bucket].iter().map(|[hash, arrival]| (*hash > 0, *arrival));
                arrivals.zip(0..).min().map(|(arrival, index)| (arrival, bucket, index))
            };
            let earliest = earliest(one).into_iter().chain(earliest(two)).min();
            let ((used, _), bucket, index) = earliest.expect("a bucket has eight entries");
            if !used || self.0.len() == BUCKETS {
                self.0[bucket][index] = entry;
                return;
            }
            let doubled = vec![[[0; 2]; ENTRIES]; 2 * self.0.len()];
            let before = mem::replace(&mut self.0, doubled);
            let used = before.into_iter().flatten().filter(|[hash, _]| *hash > 0);
            used.for_each(|entry| self.insert(entry));
        }
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
        let found = shard.find(hash);
        let (outcome, arrival) = judge(found.as_ref().map(|[_, arrival]| Nanos::new(*arrival)))?;
        let entry = [hash, arrival.as_u64()];
        match found {
            Some(found) => *found = entry,
            None => shard.insert(entry),
        }
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        hash::{BuildHasher, BuildHasherDefault, DefaultHasher, RandomState},
        num::NonZeroU32,
        time::Duration,
    };

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

    fn buckets(table: &Table) -> usize {
        table.0.iter().map(|shard| shard.lock().unwrap().0.capacity()).sum()
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
        assert_eq!(buckets(&table), SHARDS * BUCKETS);
        let freed = held_back.iter().filter(|key| allowed(&limiter, **key, 1) > 0).count();
        assert_eq!(freed, 0);
    }

    #[test]
    fn few_keys_need_little_memory_and_growing_forgets_none() {
        // With random hashes, full buckets and so the size of the table would be matters of luck.
        let hashes = BuildHasherDefault::<DefaultHasher>::default();
        let (table, clock) = (Table::default(), FakeRelativeClock::default());
        let limiter = limiter(&table, &clock);
        let keys: Vec<u64> = (0..10_000).map(|n| hashes.hash_one(n)).collect();
        assert!(keys.iter().all(|key| allowed(&limiter, *key, BURST) == BURST));
        let bytes_per_key = buckets(&table) * size_of::<Bucket>() / keys.len();
        assert!(bytes_per_key <= 60, "{bytes_per_key}");
        assert!(keys.iter().all(|key| allowed(&limiter, *key, 1) == 0));
    }
}
