//! Slow consumers delay no other stream and receive exactly their feed when they read again.

use std::time::Duration;

use protocol::position::Seq;
use serde_json::json;
use testkit::{
    soon,
    sse::{End, Stream},
};

use crate::support::{ANOTHER_EPOCH, FeedUser, GatewayWorld, Setup, assert_without_gaps, ready, receives};

/// A ready stream whose client reads only when the test does.
async fn slow_consumer(world: &GatewayWorld, user: &FeedUser) -> Stream {
    let head = world.api.cursor(user.id, world.api.head(user.id).seq);
    let mut stream = world.stream(user).tiny_receive_buffer().stream().await;
    ready(&mut stream, &head, false).await;
    world.until_subscribed(user).await;
    stream
}

/// Commits and publishes events; returns the last seq.
async fn flood(world: &GatewayWorld, user: &FeedUser, events: usize, bytes: usize) -> Seq {
    for _ in 0..events {
        let event = world.api.append_large(user.id, bytes);
        world.publish_event(user, &event).await;
    }
    world.api.head(user.id).seq
}

async fn until_lagging(world: &GatewayWorld, consumers: u64) {
    world.until_metric("messenger_gateway_slow_consumers", consumers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_consumer_delays_no_other_and_catches_up_exactly() {
    let world = GatewayWorld::new().await;
    let (user, other) = (world.user(0), world.user(0));
    let mut slow = slow_consumer(&world, &user).await;
    let mut same = world.joined(&user).await;
    let mut others = world.joined(&other).await;
    world.api.forget_requests();
    for round in 0..40 {
        flood(&world, &user, 10, 3_000).await;
        receives(&mut same, round * 10 + 1..=round * 10 + 10).await;
        flood(&world, &other, 1, 10).await;
        receives(&mut others, round + 1..=round + 1).await;
    }
    assert_eq!(world.api.record().requests(), []);
    until_lagging(&world, 1).await;
    receives(&mut slow, 1..=400).await;
    until_lagging(&world, 0).await;
    // The replay buffer is shorter; the gateway read the rest from the feed.
    let ranges = world.api.record().ranges(user.id);
    assert!(!ranges.is_empty() && ranges.is_sorted(), "{ranges:?}");
    assert!(world.api.record().ranges(other.id).is_empty());
    world.say(&user, 1).await;
    receives(&mut slow, 401..=401).await;
    receives(&mut same, 401..=401).await;
    world.until_metric("messenger_gateway_replay_buffer_bytes", 0).await;
    world.leaves_nothing((slow, same, others)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replay_buffers_are_bounded_over_all_slow_consumers() {
    const BACKLOG: usize = 100_000;
    let world = Setup::config(|config| config.delivery.replay_buffer_bytes = BACKLOG).start().await;
    let users = [world.user(0), world.user(0), world.user(0)];
    let mut slow = Vec::new();
    for user in &users {
        slow.push(slow_consumer(&world, user).await);
    }
    for _ in 0..10 {
        for user in &users {
            flood(&world, user, 20, 3_000).await;
        }
        assert!(world.metric("messenger_gateway_replay_buffer_bytes").await <= BACKLOG as u64);
    }
    until_lagging(&world, 3).await;
    for stream in &mut slow {
        receives(stream, 1..=200).await;
        // The page being read counts too, and its last event may exceed the bound.
        assert!(world.metric("messenger_gateway_replay_buffer_bytes").await <= BACKLOG as u64 + 3 * 4_000);
    }
    world.until_metric("messenger_gateway_replay_buffer_bytes", 0).await;
    world.leaves_nothing(slow).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_without_progress_ends_at_the_write_deadline() {
    let world = Setup::config(|config| config.delivery.write_deadline = Duration::from_secs(1)).start().await;
    let user = world.user(0);
    let mut slow = slow_consumer(&world, &user).await;
    let mut well = world.joined(&user).await;
    for round in 0..10 {
        flood(&world, &user, 10, 5_000).await;
        receives(&mut well, round * 10 + 1..=round * 10 + 10).await;
    }
    world.until_ended("slow_consumer", 1).await;
    until_lagging(&world, 0).await;
    let (events, _) = slow.rest().await;
    assert!(events.len() < 100, "closed before everything was sent");
    assert_without_gaps(&events);
    world.say(&user, 1).await;
    receives(&mut well, 101..=101).await;
    world.ends((slow, well)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_come_between_blocks_and_never_inside() {
    let world = Setup::config(|config| config.delivery.heartbeat = Duration::from_secs(1)).start().await;
    let user = world.user(0);
    let mut slow = slow_consumer(&world, &user).await;
    // The socket fills in the middle of a frame.
    let last = flood(&world, &user, 40, 15_000).await;
    until_lagging(&world, 1).await;
    // Another stream shows that two heartbeats are due meanwhile.
    let mut other = world.joined(&world.user(0)).await;
    soon("two heartbeats", async {
        while other.comments < 2 {
            other.block().await.unwrap();
        }
    })
    .await;
    receives(&mut slow, 1..=last).await;
    let before = slow.comments;
    soon("a heartbeat after it", async {
        while slow.comments == before {
            slow.block().await.unwrap();
        }
    })
    .await;
    world.ends((slow, other)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_goodbye_waits_for_the_frame_that_was_begun() {
    let world = Setup::config(|config| config.delivery.streams_per_user = 1).start().await;
    let user = world.user(0);
    let mut slow = slow_consumer(&world, &user).await;
    flood(&world, &user, 40, 15_000).await;
    until_lagging(&world, 1).await;
    let another = world.stream(&user).stream().await;
    let (mut events, end) = slow.rest().await;
    let goodbye = events.pop().unwrap();
    assert!(goodbye.is("goodbye") && goodbye.json()["reason"] == "replaced", "{goodbye:?}");
    assert_eq!(end, End::Clean);
    assert_without_gaps(&events);
    assert!(events.len() < 40, "frames that were not begun are dropped");
    world.until_ended("replaced", 1).await;
    world.leaves_nothing((slow, another)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unread_goodbye_is_not_waited_for() {
    let world = GatewayWorld::new().await;
    let user = world.user(0);
    let slow = slow_consumer(&world, &user).await;
    flood(&world, &user, 40, 15_000).await;
    until_lagging(&world, 1).await;
    world.publish(&user, json!({ "revoked": user.session }).to_string()).await;
    world.until_ended("revoked", 1).await;
    world.until_metric("messenger_gateway_streams", 0).await;
    world.leaves_nothing(slow).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_feed_resyncs_a_slow_consumer_after_its_frame() {
    let world = GatewayWorld::new().await;
    let (redrawn, pruned) = (world.user(0), world.user(0));
    let mut a = slow_consumer(&world, &redrawn).await;
    let mut b = slow_consumer(&world, &pruned).await;
    for user in [&redrawn, &pruned] {
        flood(&world, user, 300, 3_000).await;
    }
    until_lagging(&world, 2).await;
    world.api.restore(redrawn.id, ANOTHER_EPOCH, 299);
    world.say(&redrawn, 1).await;
    world.api.prune(pruned.id, 299);
    for (user, stream, reason) in [(&redrawn, &mut a, "unknown"), (&pruned, &mut b, "expired")] {
        let mut events = Vec::new();
        let resync = loop {
            let event = stream.next().await;
            if event.is("resync") {
                break event;
            }
            events.push(event);
        };
        assert_eq!(resync.json()["reason"], reason);
        assert_eq!(resync.id, Some(world.api.cursor(user.id, 300)));
        assert_without_gaps(&events);
        assert!(events.len() < 300);
        world.say(user, 1).await;
        receives(stream, 301..=301).await;
    }
    world.until_metric("messenger_gateway_replay_buffer_bytes", 0).await;
    world.ends((a, b)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_consumer_that_leaves_leaves_nothing() {
    let world = GatewayWorld::new().await;
    let user = world.user(0);
    let slow = [slow_consumer(&world, &user).await, slow_consumer(&world, &user).await];
    flood(&world, &user, 100, 5_000).await;
    until_lagging(&world, 2).await;
    assert!(world.metric("messenger_gateway_replay_buffer_bytes").await > 0);
    drop(slow);
    world.until_ended("client", 2).await;
    world.leaves_nothing(()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_backfill_is_paged_at_the_consumers_pace() {
    let world = GatewayWorld::new().await;
    let user = world.user(0);
    for _ in 0..400 {
        world.api.append_large(user.id, 3_000);
    }
    world.api.page(50);
    let mut slow = world.stream_after(&user, 0).tiny_receive_buffer().stream().await;
    ready(&mut slow, &world.api.cursor(user.id, 0), true).await;
    until_lagging(&world, 1).await;
    let pages = world.api.record().ranges(user.id).len();
    assert!(pages <= 3, "{pages} pages were fetched for a consumer that reads nothing");
    // Live events neither overtake the backfill nor are lost.
    world.say(&user, 3).await;
    receives(&mut slow, 1..=403).await;
    world.say(&user, 1).await;
    receives(&mut slow, 404..=404).await;
    world.ends(slow).await;
}
