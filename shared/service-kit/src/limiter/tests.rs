//! Shared rate limits, against a real Redis that is killed, frozen and filled up.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Instant, SystemTime},
};

use super::*;
use testkit::{PATIENCE as LONG, servers::Redis, until};
use tokio_util::sync::CancellationToken;

const ALICE: Subject<'_> = Subject::User(UserId(1));
const BOB: Subject<'_> = Subject::User(UserId(2));

struct Replica {
    limiter: Limiter,
    metrics: LimiterMetrics,
    stop: CancellationToken,
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Replica {
    fn start(redis: &Redis, patience: Duration) -> Self {
        let metrics = LimiterMetrics::default();
        let topology = RedisTopology::single(redis.url()).expect("the URL is good");
        let (limiter, worker) = Limiter::new(topology, Channels::new("t:"), patience, metrics.clone());
        limiter.rule("any", Limit::new(1, HOUR));
        let stop = CancellationToken::new();
        tokio::spawn(worker.run(stop.clone()));
        Self { limiter, metrics, stop }
    }

    async fn ready(redis: &Redis, patience: Duration) -> Self {
        let replica = Self::start(redis, patience);
        replica.until_shared(1).await;
        replica
    }

    async fn until_shared(&self, value: i64) {
        until("limits are shared or local as expected", || async {
            self.metrics.rate_limits_shared.get() == value
        })
        .await;
    }

    async fn allowed(&self, rule: &RateLimitRule, subject: Subject<'_>, tries: u32) -> u32 {
        let mut allowed = 0;
        for _ in 0..tries {
            allowed += u32::from(self.limiter.check(&[(rule, subject)]).await.is_ok());
        }
        allowed
    }

    fn local_decisions(&self, reason: &'static str) -> u64 {
        self.metrics.rate_limit_local_decisions.get_or_create(&Reason { reason }).get()
    }
}

const HOUR: Duration = Duration::from_secs(3_600);

#[tokio::test]
async fn replicas_share_one_budget_and_subjects_do_not() {
    let redis = Redis::start();
    let (one, two) = (Replica::ready(&redis, LONG).await, Replica::ready(&redis, LONG).await);
    let limit = Limit::new(10, HOUR);
    let (at_one, at_two) = (one.limiter.rule("send", limit), two.limiter.rule("send", limit));
    assert_eq!((one.allowed(&at_one, ALICE, 6).await, two.allowed(&at_two, ALICE, 6).await), (6, 4));
    assert_eq!((one.allowed(&at_one, ALICE, 6).await, two.allowed(&at_two, BOB, 12).await), (0, 10));
    let other_rule = two.limiter.rule("search", limit);
    assert_eq!(two.allowed(&other_rule, ALICE, 12).await, 10);
    let refused = one.metrics.rate_limited.get_or_create(&Limited { rule: "send", by: "user" }).get();
    assert_eq!(refused, 6);
    let name = Subject::Name("somebody's name");
    assert_eq!(two.allowed(&at_two, name, 1).await, 1);
    assert_eq!(redis.command(&["KEYS", "*somebody*"]).unwrap(), "*0", "names are not spelled");
}

#[tokio::test]
async fn the_longest_wait_of_several_rules_is_returned() {
    let redis = Redis::start();
    let replica = Replica::ready(&redis, LONG).await;
    let (minute, hour) = (Limit::new(1, Duration::from_secs(60)), Limit::new(1, HOUR));
    let (short, long, off) = (
        replica.limiter.rule("short", minute),
        replica.limiter.rule("long", hour),
        replica.limiter.rule("off", Limit::Off),
    );
    let address = Subject::Address("2001:db8::1".parse().unwrap());
    let neighbour = Subject::Address("2001:db8::2".parse().unwrap());
    let check = async |who| replica.limiter.check(&[(&short, ALICE), (&long, who), (&off, ALICE)]).await;
    let began = Instant::now();
    let assert_waits_for_the_hour = |over: Over| {
        let shortest = 3_600 - 1 - began.elapsed().as_secs();
        assert!((shortest..=3_600).contains(&over.retry_after()), "{over:?}");
    };
    check(address).await.unwrap();
    let over = check(neighbour).await.unwrap_err();
    assert_eq!((over.rule, over.by), ("long", "address"));
    assert_waits_for_the_hour(over);
    // The same from another process's counts.
    let other = Replica::ready(&redis, LONG).await;
    let long = other.limiter.rule("long", hour);
    let over = other.limiter.check(&[(&long, neighbour)]).await.unwrap_err();
    assert_waits_for_the_hour(over);
}

/// Otherwise an alert would never end.
#[tokio::test]
async fn limits_that_are_off_count_as_shared() {
    let metrics = LimiterMetrics::default();
    let nowhere = RedisTopology::single("redis://127.0.0.1:1").unwrap();
    let (limiter, worker) = Limiter::new(nowhere, Channels::new("t:"), LONG, metrics.clone());
    let _off = limiter.rule("any", Limit::Off);
    let stop = CancellationToken::new();
    let running = tokio::spawn(worker.run(stop.clone()));
    until("the gauge is set", || async { metrics.rate_limits_shared.get() == 1 }).await;
    stop.cancel();
    running.await.unwrap();
}

/// Runs the script at random moments; the model knows each moment to within a round trip.
#[tokio::test]
async fn the_script_agrees_with_a_model() {
    const INTERVAL: i64 = 10_000;
    const BURST: i64 = 4;
    let redis = Redis::start();
    let client = redis::Client::open(redis.url()).unwrap();
    let mut clock = client.get_multiplexed_async_connection().await.unwrap();
    let replica = Replica::ready(&redis, LONG).await;
    let period = Duration::from_micros((INTERVAL * BURST) as u64);
    let rule = replica.limiter.rule("model", Limit::new(BURST as u32, period));
    let key = "t:limit:model:user:1";
    let mut time = async || {
        let (seconds, micros): (i64, i64) = redis::cmd("TIME").query_async(&mut clock).await.unwrap();
        seconds * 1_000_000 + micros
    };
    let mut keys = client.get_multiplexed_async_connection().await.unwrap();
    let (mut arrival, mut allowed, mut refused) = (0, 0, 0);
    for _ in 0..400 {
        let before = time().await;
        // The local half has the same rule and would reject first.
        let answer = replica.limiter.check_shared(&[(&rule, ALICE)]).await;
        let after = time().await;
        let wait = |now: i64| arrival.max(now) + INTERVAL - now - INTERVAL * BURST;
        match answer {
            Ok(()) => {
                assert!(wait(after) <= 0, "allowed {} µs too early", wait(after));
                let (stored, lasts): (Option<i64>, i64) =
                    redis::pipe().atomic().get(key).pttl(key).query_async(&mut keys).await.unwrap();
                allowed += 1;
                // The key may have expired already.
                let Some(stored) = stored else {
                    assert!(time().await >= arrival.max(before) + INTERVAL, "expired too early");
                    arrival = 0;
                    continue;
                };
                let possible = arrival.max(before) + INTERVAL..=arrival.max(after) + INTERVAL;
                assert!(possible.contains(&stored), "{stored} not in {possible:?}");
                assert!((0..=INTERVAL * BURST / 1_000 + 1).contains(&lasts), "{lasts}");
                arrival = stored;
            }
            Err(over) => {
                let wait_given = over.wait.as_micros() as i64;
                assert!(
                    (wait(after)..=wait(before)).contains(&wait_given),
                    "{wait_given} µs of {}",
                    wait(before)
                );
                refused += 1;
            }
        }
        // The next random moment, not a wait for anything.
        tokio::time::sleep(Duration::from_micros(rand::random_range(0..8_000))).await;
    }
    assert!(allowed > 50 && refused > 50, "{allowed} {refused}");
}

#[tokio::test]
async fn a_clock_that_is_set_back_keeps_waits_bounded() {
    let redis = Redis::start();
    let replica = Replica::ready(&redis, LONG).await;
    let rule = replica.limiter.rule("send", Limit::new(60, Duration::from_secs(60)));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros();
    let in_an_hour = (now + HOUR.as_micros()).to_string();
    redis.command(&["SET", "t:limit:send:user:1", &in_an_hour]).unwrap();
    let over = replica.limiter.check_shared(&[(&rule, ALICE)]).await.unwrap_err();
    assert!(over.wait <= Duration::from_secs(1), "{over:?}");
    redis.command(&["SET", "t:limit:send:user:1", "1"]).unwrap();
    let mut allowed = 0;
    for _ in 0..70 {
        allowed += u32::from(replica.limiter.check_shared(&[(&rule, ALICE)]).await.is_ok());
    }
    assert!((60..70).contains(&allowed), "{allowed}: an expired debt is no credit");
}

#[tokio::test]
async fn a_flushed_script_is_loaded_again() {
    let redis = Redis::start();
    let replica = Replica::ready(&redis, LONG).await;
    let rule = replica.limiter.rule("send", Limit::new(3, HOUR));
    assert_eq!(replica.allowed(&rule, ALICE, 1).await, 1);
    redis.command(&["SCRIPT", "FLUSH"]).unwrap();
    assert_eq!(replica.allowed(&rule, ALICE, 5).await, 2);
    assert_eq!(redis.command(&["EXISTS", "t:limit:send:user:1"]).unwrap(), ":1");
    assert_eq!(replica.metrics.rate_limits_shared.get(), 1);
}

#[tokio::test]
async fn without_redis_each_process_limits_locally_until_it_returns() {
    let mut redis = Redis::start();
    let replica = Replica::ready(&redis, LONG).await;
    let rule = replica.limiter.rule("send", Limit::new(500, HOUR));
    assert_eq!(replica.allowed(&rule, BOB, 100).await, 100);
    redis.kill();
    assert_eq!(replica.allowed(&rule, BOB, 1_000).await, 400, "its own count continues");
    assert_eq!(replica.local_decisions("failed") + replica.local_decisions("away"), 400);
    assert_eq!(replica.metrics.rate_limits_shared.get(), 0);
    redis.restart();
    replica.until_shared(1).await;
    assert_eq!(replica.allowed(&rule, ALICE, 1).await, 1);
    assert_eq!(redis.command(&["EXISTS", "t:limit:send:user:1"]).unwrap(), ":1");
}

#[tokio::test]
async fn a_frozen_redis_delays_only_checks_in_flight() {
    let mut redis = Redis::start();
    let replica = Replica::ready(&redis, SHARED_CHECK_TIMEOUT).await;
    let rule = replica.limiter.rule("send", Limit::new(1_000, HOUR));
    redis.freeze();
    assert_eq!(replica.allowed(&rule, BOB, 500).await, 500);
    assert_eq!((replica.local_decisions("slow"), replica.local_decisions("away")), (1, 499));
    redis.thaw();
    replica.until_shared(1).await;
}

#[tokio::test]
async fn checks_waiting_for_a_frozen_redis_are_bounded() {
    let mut redis = Redis::start();
    let replica = Replica::ready(&redis, LONG).await;
    let rule = Arc::new(replica.limiter.rule("send", Limit::new(10_000, HOUR)));
    redis.freeze();
    let replica = Arc::new(replica);
    let waiting = AtomicU64::new(0);
    let check = || async {
        waiting.fetch_add(1, Ordering::Relaxed);
        let allowed = replica.allowed(&rule, ALICE, 1).await;
        waiting.fetch_sub(1, Ordering::Relaxed);
        allowed
    };
    let all = futures_util::future::join_all((0..2_000).map(|_| check()));
    let busy = async {
        until("the rest is decided locally", || async { replica.local_decisions("busy") == 2_000 - 512 })
            .await;
        let kept = waiting.load(Ordering::Relaxed);
        redis.thaw();
        kept
    };
    let (allowed, kept) = tokio::join!(all, busy);
    assert_eq!((allowed.iter().sum::<u32>(), kept), (2_000, 512));
}

#[tokio::test]
async fn a_redis_without_memory_left_does_not_count() {
    let redis = Redis::start();
    let replica = Replica::ready(&redis, LONG).await;
    let rule = replica.limiter.rule("send", Limit::new(10, HOUR));
    redis.command(&["CONFIG", "SET", "maxmemory", "1"]).unwrap();
    assert_eq!(replica.allowed(&rule, ALICE, 20).await, 10);
    assert_eq!((replica.local_decisions("failed"), replica.local_decisions("away")), (1, 9));
    // Another trial check fails, so limits stay local.
    let rejected = || redis.command(&["INFO", "errorstats"]).unwrap();
    let before = rejected();
    until("another trial check fails", || async { rejected() != before }).await;
    assert_eq!(replica.metrics.rate_limits_shared.get(), 0);
    redis.command(&["CONFIG", "SET", "maxmemory", "0"]).unwrap();
    replica.until_shared(1).await;
}
