//! Redis Cluster with sharded channels: the node that owns a channel carries its events. While nodes die, hang and move
//! slots, events may be late and none is lost; afterwards Redis delivers every event again.

use e2e::World;
use testkit::{cluster::Cluster, until};

use crate::support::Busy;

async fn busy_on(cluster: &Cluster) -> Busy {
    let settings = [("REDIS_TOPOLOGY", "cluster".to_owned()), ("REDIS_URL", cluster.urls())];
    let busy = Busy::new(World::with_redis_settings(settings).await).await;
    busy.until_redis_is_healthy().await;
    busy
}

fn heard_at(cluster: &Cluster, channel: &str) -> Vec<usize> {
    let listens = |node: &usize| {
        let channels = cluster.nodes[*node].command(&["PUBSUB", "SHARDCHANNELS", channel]);
        channels.is_ok_and(|count| count == "*1")
    };
    (0..cluster.nodes.len()).filter(listens).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn channel_is_subscribed_only_on_the_node_that_owns_it() {
    let cluster = Cluster::start();
    let busy = busy_on(&cluster).await;
    for user in &busy.crowd.users {
        let channel = busy.world.channel(user.id);
        assert_eq!(heard_at(&cluster, &channel), [cluster.owner(&channel)]);
    }
    busy.until_events_come_by_redis().await;
    busy.assert_exact().await;
    busy.until_limits_are_shared().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn moved_slot_is_resubscribed_on_its_new_node() {
    let cluster = Cluster::start();
    let busy = busy_on(&cluster).await;
    let traffic = busy.traffic();
    for _ in 0..2 {
        for user in &busy.crowd.users {
            traffic.more(15).await;
            let channel = busy.world.channel(user.id);
            let to = (cluster.owner(&channel) + 1) % cluster.nodes.len();
            cluster.move_slot_of(&channel, to);
            until("it is heard at its new node alone", || async { heard_at(&cluster, &channel) == [to] })
                .await;
        }
    }
    traffic.more(15).await;
    traffic.stop().await;
    busy.until_redis_is_healthy().await;
    busy.assert_exact().await;
    busy.until_events_come_by_redis().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_node_is_followed_to_its_replica_without_loss() {
    let mut cluster = Cluster::start();
    let busy = busy_on(&cluster).await;
    let channel = busy.world.channel(busy.crowd.users[0].id);
    let doomed = cluster.owner(&channel);
    cluster.add_replica(doomed);
    let traffic = busy.traffic();
    traffic.more(40).await;
    cluster.nodes[doomed].kill();
    busy.until_redis_is_degraded().await;
    traffic.more(40).await;
    busy.until_redis_is_healthy().await;
    let replica = cluster.nodes.len() - 1;
    assert_eq!(heard_at(&cluster, &channel), [replica]);
    // It returns as a replica of its replica.
    cluster.nodes[doomed].restart();
    cluster.until_whole();
    traffic.more(40).await;
    traffic.stop().await;
    busy.assert_exact().await;
    busy.until_events_come_by_redis().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hanging_node_loses_nothing_and_delays_no_other() {
    let mut cluster = Cluster::start();
    let busy = busy_on(&cluster).await;
    let channel = busy.world.channel(busy.crowd.users[0].id);
    let hung = cluster.owner(&channel);
    let traffic = busy.traffic();
    traffic.more(40).await;
    cluster.nodes[hung].freeze();
    busy.until_redis_is_degraded().await;
    traffic.more(80).await;
    cluster.nodes[hung].thaw();
    busy.until_redis_is_healthy().await;
    traffic.more(40).await;
    traffic.stop().await;
    busy.assert_exact().await;
    busy.until_events_come_by_redis().await;
}
