//! Without Redis delivery is slower and still complete.

use std::time::Duration;

use e2e::World;
use testkit::{proxy::Proxy, servers::Redis, until};

use crate::support::Busy;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_killed_wiped_and_restarted_under_traffic_loses_nothing() {
    let mut redis = Redis::start();
    let busy = Busy::new(World::with_redis(redis.url()).await).await;
    let traffic = busy.traffic();
    for _ in 0..2 {
        traffic.more(80).await;
        redis.kill();
        traffic.more(80).await;
        redis.restart();
        busy.until_redis_is_healthy().await;
    }
    traffic.more(80).await;
    traffic.stop().await;
    busy.assert_exact().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_is_silently_dead_for_a_while_loses_nothing() {
    let mut redis = Redis::start();
    let busy = Busy::new(World::with_redis(redis.url()).await).await;
    let traffic = busy.traffic();
    traffic.more(80).await;
    redis.freeze();
    busy.until_redis_is_degraded().await;
    traffic.more(80).await;
    redis.thaw();
    busy.until_redis_is_healthy().await;
    traffic.more(80).await;
    traffic.stop().await;
    busy.assert_exact().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_arrive_by_reconcile_until_redis_first_starts() {
    let mut redis = Redis::start();
    redis.kill(); // Its address is known and nothing listens.
    let world = World::with_redis(redis.url()).await;
    let (api, gateway) = world.pair().await;
    let busy = Busy::of(world, vec![api], vec![gateway]).await;
    let traffic = busy.traffic();
    traffic.more(100).await;
    busy.until_all_is_seen().await;
    redis.restart();
    busy.until_redis_is_healthy().await;
    traffic.more(100).await;
    traffic.stop().await;
    busy.assert_exact().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscribers_killed_again_and_again_lose_nothing() {
    let redis = Redis::start();
    let busy = Busy::new(World::with_redis(redis.url()).await).await;
    let traffic = busy.traffic();
    for _ in 0..15 {
        traffic.more(15).await;
        redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).unwrap();
    }
    for _ in 0..5 {
        traffic.more(15).await;
        redis.command(&["CLIENT", "KILL", "TYPE", "normal"]).unwrap();
    }
    traffic.stop().await;
    busy.until_redis_is_healthy().await;
    busy.assert_exact().await;
    for gateway in &busy.gateways {
        let opened = gateway.metric("messenger_gateway_redis_connections_opened_total").await;
        assert!(opened > 1.0, "the subscribers were killed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_open_link_between_gateway_and_redis_loses_nothing() {
    let redis = Redis::start();
    let proxy = Proxy::start(redis.address()).await;
    let world = World::with_redis(redis.url()).await;
    let api = world.api().ready().await;
    let behind = format!("redis://{}/", proxy.address());
    let gateway = world.gateway(api.internal()).env("REDIS_URL", behind).ready().await;
    let busy = Busy::of(world, vec![api], vec![gateway]).await;
    let traffic = busy.traffic();
    traffic.more(50).await;
    proxy.silence();
    busy.until_redis_is_degraded().await;
    traffic.more(50).await;
    proxy.resume();
    busy.until_redis_is_healthy().await;
    proxy.slow(Duration::from_millis(60));
    traffic.more(50).await;
    proxy.cut_after(700);
    proxy.cut();
    traffic.more(50).await;
    proxy.resume();
    traffic.stop().await;
    busy.assert_exact().await;
}

fn refused_pings(redis: &Redis) -> u64 {
    let stats = redis.command(&["INFO", "commandstats"]).unwrap();
    let ping = stats.lines().find(|line| line.starts_with("cmdstat_ping:")).unwrap_or_default();
    let refused = ping.split("rejected_calls=").nth(1).and_then(|rest| rest.split(',').next());
    refused.map_or(0, |count| count.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_whose_disk_is_full_still_brings_events() {
    let redis = Redis::start();
    let busy = Busy::new(World::with_redis(redis.url()).await).await;
    busy.until_redis_is_healthy().await;
    let connects = async || {
        let [a, b] = [0, 1]
            .map(|index| busy.gateways[index].metric("messenger_gateway_redis_connections_opened_total"));
        a.await + b.await
    };
    let before = connects().await;
    redis.lose_disk().await;
    let refused = refused_pings(&redis);
    // At least twice for each gateway.
    until("gateways see that the disk is full", || async { refused_pings(&redis) >= refused + 4 }).await;
    busy.until_redis_is_healthy().await;
    busy.until_events_come_by_redis().await;
    busy.assert_exact().await;
    assert_eq!(connects().await, before, "an error is an answer: the connections live");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_follow_a_redis_address_that_moves() {
    let (old, new) = (Redis::start(), Redis::start());
    let service = Proxy::start(old.address()).await;
    let busy = Busy::new(World::with_redis(format!("redis://{}/", service.address())).await).await;
    let traffic = busy.traffic();
    traffic.more(40).await;
    // Present connections stay where they are, and work.
    service.aim(new.address());
    busy.until_listening_to(&[&new]).await;
    traffic.more(40).await;
    traffic.stop().await;
    busy.assert_exact().await;
    busy.until_events_come_by_redis().await;
}
