//! Readers that take nothing, little, or late: they cost others nothing, and get exactly what is theirs when they read on.

use std::time::Duration;

use protocol::position::Seq;
use serde_json::json;
use testkit::{
    soon,
    sse::{End, Stream},
};

use crate::support::{ANOTHER_EPOCH, FeedUser, GatewayWorld, Setup, ready, receives};

/// A stream whose client reads nothing until the test does. It is ready.
async fn stalled(world: &GatewayWorld, user: &FeedUser) -> Stream {
    let head = world.api.cursor(user.id, world.api.head(user.id).seq);
    let mut stream = world.stream(user).tiny_receive_buffer().stream().await;
    ready(&mut stream, &head, false).await;
    world.until_subscribed(user).await;
    stream
}

/// Commits and publishes so many events of so many bytes; the last one's number.
async fn flood(world: &GatewayWorld, user: &FeedUser, events: usize, bytes: usize) -> Seq {
    for _ in 0..events {
        let event = world.api.append_large(user.id, bytes);
        world.publish_event(user, &event).await;
    }
    world.api.head(user.id).seq
}

/// Until the stream's socket takes no more.
async fn until_behind(world: &GatewayWorld, readers: u64) {
    world.until_metric("messenger_gateway_slow_consumers", readers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stops_costs_others_nothing_and_reads_on_exactly() {
    let world = GatewayWorld::new().await;
    let (user, other) = (world.user(0), world.user(0));
    let mut slow = stalled(&world, &user).await;
    let mut same = world.joined(&user).await;
    let mut others = world.joined(&other).await;
    world.api.forget_questions();
    for round in 0..40 {
        flood(&world, &user, 10, 3_000).await;
        receives(&mut same, round * 10 + 1..=round * 10 + 10).await;
        flood(&world, &other, 1, 10).await;
        receives(&mut others, round + 1..=round + 1).await;
    }
    // All of that, and nobody had to be asked.
    assert_eq!(world.api.asked().requests(), []);
    until_behind(&world, 1).await;
    receives(&mut slow, 1..=400).await;
    until_behind(&world, 0).await;
    // The ring is not as long: the rest was read from the feed.
    let ranges = world.api.asked().ranges(user.id);
    assert!(!ranges.is_empty() && ranges.is_sorted(), "{ranges:?}");
    assert!(world.api.asked().ranges(other.id).is_empty());
    // It is live again.
    world.say(&user, 1).await;
    receives(&mut slow, 401..=401).await;
    receives(&mut same, 401..=401).await;
    world.until_metric("messenger_gateway_replay_buffer_bytes", 0).await;
    drop((slow, same, others));
    world.leaves_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_kept_for_slow_readers_is_bounded_over_all_of_them() {
    const BACKLOG: usize = 100_000;
    let world = Setup::config(|config| config.delivery.replay_buffer_bytes = BACKLOG).start().await;
    let users = [world.user(0), world.user(0), world.user(0)];
    let mut slow = Vec::new();
    for user in &users {
        slow.push(stalled(&world, user).await);
    }
    for _ in 0..10 {
        for user in &users {
            flood(&world, user, 20, 3_000).await;
        }
        assert!(world.metric("messenger_gateway_replay_buffer_bytes").await <= BACKLOG as u64);
    }
    until_behind(&world, 3).await;
    for stream in &mut slow {
        receives(stream, 1..=200).await;
        // A page that is being read counts; one event may be more than there is room for.
        assert!(world.metric("messenger_gateway_replay_buffer_bytes").await <= BACKLOG as u64 + 3 * 4_000);
    }
    world.until_metric("messenger_gateway_replay_buffer_bytes", 0).await;
    drop(slow);
    world.leaves_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_makes_no_progress_is_cut_at_the_write_deadline() {
    let world = Setup::config(|config| config.delivery.write_deadline = Duration::from_secs(1)).start().await;
    let user = world.user(0);
    let mut slow = stalled(&world, &user).await;
    let mut well = world.joined(&user).await;
    for round in 0..10 {
        flood(&world, &user, 10, 5_000).await;
        receives(&mut well, round * 10 + 1..=round * 10 + 10).await;
    }
    world.until_ended("slow_consumer", 1).await;
    until_behind(&world, 0).await;
    let (events, _) = slow.rest().await;
    assert!(events.len() < 100, "cut before everything was sent");
    let numbers: Vec<_> = events.iter().map(|event| event.json()["n"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=events.len() as u64).collect::<Vec<_>>());
    world.say(&user, 1).await;
    receives(&mut well, 101..=101).await;
    drop((slow, well));
    world.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_come_between_blocks_and_never_inside() {
    let world = Setup::config(|config| config.delivery.heartbeat = Duration::from_secs(1)).start().await;
    let user = world.user(0);
    let mut slow = stalled(&world, &user).await;
    // The kernel holds some of it, so the socket is full in the middle of a frame.
    let last = flood(&world, &user, 40, 15_000).await;
    until_behind(&world, 1).await;
    // Two heartbeats are due meanwhile, as another stream shows.
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
    drop((slow, other));
    world.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_goodbye_waits_for_the_frame_that_was_begun() {
    let world = Setup::config(|config| config.delivery.streams_per_user = 1).start().await;
    let user = world.user(0);
    let mut slow = stalled(&world, &user).await;
    flood(&world, &user, 40, 15_000).await;
    until_behind(&world, 1).await;
    let another = world.stream(&user).stream().await;
    let (mut events, end) = slow.rest().await;
    let goodbye = events.pop().unwrap();
    assert!(goodbye.is("goodbye") && goodbye.json()["reason"] == "replaced", "{goodbye:?}");
    assert_eq!(end, End::Clean);
    let numbers: Vec<_> = events.iter().map(|event| event.json()["n"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=events.len() as u64).collect::<Vec<_>>());
    assert!(events.len() < 40, "what the socket had not begun to take is not sent any more");
    world.until_ended("replaced", 1).await;
    drop((slow, another));
    world.leaves_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_goodbye_that_nobody_reads_is_not_waited_for() {
    let world = GatewayWorld::new().await;
    let user = world.user(0);
    let slow = stalled(&world, &user).await;
    flood(&world, &user, 40, 15_000).await;
    until_behind(&world, 1).await;
    world.publish(&user, json!({ "revoked": user.session }).to_string()).await;
    world.until_ended("revoked", 1).await;
    world.until_metric("messenger_gateway_streams", 0).await;
    drop(slow);
    world.leaves_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_whose_feed_was_lost_gets_the_begun_frame_and_a_resync() {
    let world = GatewayWorld::new().await;
    let (redrawn, pruned) = (world.user(0), world.user(0));
    let mut a = stalled(&world, &redrawn).await;
    let mut b = stalled(&world, &pruned).await;
    for user in [&redrawn, &pruned] {
        flood(&world, user, 300, 3_000).await;
    }
    until_behind(&world, 2).await;
    world.api.restore(redrawn.id, ANOTHER_EPOCH, 299);
    world.say(&redrawn, 1).await;
    world.api.prune(pruned.id, 299);
    for (user, stream, reason) in [(&redrawn, &mut a, "unknown"), (&pruned, &mut b, "expired")] {
        let mut seen = 0;
        loop {
            let event = stream.next().await;
            if event.is("resync") {
                assert_eq!(event.json()["reason"], reason);
                assert_eq!(event.id, Some(world.api.cursor(user.id, 300)));
                break;
            }
            seen += 1;
            assert_eq!(event.json()["n"].as_u64(), Some(seen));
        }
        assert!(seen < 300, "{seen}");
        world.say(user, 1).await;
        receives(stream, 301..=301).await;
    }
    world.until_metric("messenger_gateway_replay_buffer_bytes", 0).await;
    drop((a, b));
    world.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_leaves_while_it_is_behind_leaves_nothing() {
    let world = GatewayWorld::new().await;
    let user = world.user(0);
    let slow = [stalled(&world, &user).await, stalled(&world, &user).await];
    flood(&world, &user, 100, 5_000).await;
    until_behind(&world, 2).await;
    assert!(world.metric("messenger_gateway_replay_buffer_bytes").await > 0);
    drop(slow);
    world.until_ended("client", 2).await;
    world.leaves_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_past_is_read_page_by_page_as_the_reader_takes_it() {
    let world = GatewayWorld::new().await;
    let user = world.user(0);
    for _ in 0..400 {
        world.api.append_large(user.id, 3_000);
    }
    world.api.page(50);
    let mut slow = world.stream_after(&user, 0).tiny_receive_buffer().stream().await;
    ready(&mut slow, &world.api.cursor(user.id, 0), true).await;
    until_behind(&world, 1).await;
    let asked = world.api.asked().ranges(user.id).len();
    assert!(asked <= 3, "{asked} pages were fetched for a reader that takes nothing");
    // Live events meanwhile neither overtake nor are lost.
    world.say(&user, 3).await;
    receives(&mut slow, 1..=403).await;
    world.say(&user, 1).await;
    receives(&mut slow, 404..=404).await;
    drop(slow);
    world.ends().await;
}
