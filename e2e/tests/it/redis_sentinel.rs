//! Redis Sentinel: api and gateways follow a failover, forced or after a crash, and no event is lost.

use e2e::World;
use testkit::cluster::Sentinels;

use crate::{presence::assert_presence_works, support::Busy};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_follow_the_master_that_sentinels_name() {
    let mut redis = Sentinels::start();
    let busy = Busy::new(World::with_redis_settings(redis.settings()).await).await;
    busy.until_redis_is_healthy().await;
    let traffic = busy.traffic();
    traffic.more(40).await;
    redis.hand_over(1);
    busy.until_listening_to(&[&redis.servers[1]]).await;
    busy.until_redis_is_healthy().await;
    traffic.more(40).await;

    redis.servers[1].kill();
    busy.until_redis_is_degraded().await;
    redis.until_leader(0);
    busy.until_listening_to(&[&redis.servers[0]]).await;
    busy.until_redis_is_healthy().await;
    traffic.more(40).await;
    traffic.stop().await;
    busy.assert_exact().await;
    busy.until_events_come_by_redis().await;
    assert_presence_works(&busy.world, &busy.apis[0], &busy.gateways[0], "late").await;
}
