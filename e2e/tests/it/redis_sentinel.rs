//! A Redis that sentinels name: when they make another one the server, whether the first has died or is merely asked to step
//! down, everybody follows, and nothing is lost.

use e2e::World;
use shared::test_support::cluster::Watched;

use crate::support::Busy;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_the_sentinels_name_is_followed_when_the_server_dies_and_when_it_steps_down() {
    let mut redis = Watched::start();
    let busy = Busy::new(World::with_redis_settings(redis.settings()).await).await;
    busy.until_redis_is_trusted().await;
    let traffic = busy.traffic();
    traffic.more(40).await;
    redis.servers[0].kill();
    busy.until_redis_is_doubted().await;
    redis.until_leader(1);
    busy.until_redis_is_trusted().await;
    busy.until_listening_to(&[&redis.servers[1]]).await;
    traffic.more(40).await;

    // The first comes back as a replica, and is made the server again.
    redis.servers[0].restart();
    redis.follow(0);
    traffic.more(40).await;
    redis.hand_over(0);
    busy.until_listening_to(&[&redis.servers[0]]).await;
    busy.until_redis_is_trusted().await;
    traffic.more(40).await;
    traffic.stop().await;
    busy.assert_exact().await;
    busy.until_events_come_by_redis().await;
}
