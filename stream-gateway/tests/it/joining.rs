//! From the request to `ready`: where a stream begins, and what it waits for.

use std::time::Duration;

use protocol::feed::RANGES_PATH;
use testkit::{soon, sse::Block};
use tokio::io::AsyncWriteExt;

use crate::{
    api::Fault,
    support::{
        A_WHILE, ANOTHER_EPOCH, EPOCH, GatewayWorld, Raw, Setup, all_receive, goodbye, ready,
        ready_and_resync, receives, resync, silence,
    },
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_without_a_cursor_starts_at_the_head() {
    let world = GatewayWorld::new().await;
    let user = world.user(7);
    let mut stream = world.stream(&user).stream().await;
    ready(&mut stream, &world.api.cursor(user.id, 7), false).await;
    world.say(&user, 2).await;
    receives(&mut stream, 8..=9).await;

    // An empty cursor is an absent one; the position is known, so nothing is requested.
    let mut another = world.stream(&user).last_event_id("").last_event_id_in_query("").stream().await;
    ready(&mut another, &world.api.cursor(user.id, 9), false).await;
    world.say(&user, 1).await;
    receives(&mut another, 10..=10).await;
    receives(&mut stream, 10..=10).await;
    assert!(world.api.record().ranges(user.id).is_empty());
    world.ends((stream, another)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_with_a_cursor_is_backfilled_and_goes_live() {
    let world = GatewayWorld::new().await;
    let user = world.user(7);
    let mut by_header = world.stream_after(&user, 4).last_event_id_in_query("stale").stream().await;
    let mut by_query =
        world.stream(&user).last_event_id_in_query(&world.api.cursor(user.id, 0)).stream().await;
    let mut at_head = world.stream_after(&user, 7).stream().await;
    ready(&mut by_header, &world.api.cursor(user.id, 4), true).await;
    receives(&mut by_header, 5..=7).await;
    ready(&mut by_query, &world.api.cursor(user.id, 0), true).await;
    receives(&mut by_query, 1..=7).await;
    ready(&mut at_head, &world.api.cursor(user.id, 7), true).await;
    world.say(&user, 3).await;
    all_receive([&mut by_header, &mut by_query, &mut at_head], 8..=10).await;
    world.leaves_nothing((by_header, by_query, at_head)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_truncated_page_is_followed_by_the_next() {
    let world = GatewayWorld::new().await;
    let user = world.user(25);
    world.api.page(10);
    let mut stream = world.stream_after(&user, 0).stream().await;
    ready(&mut stream, &world.api.cursor(user.id, 0), true).await;
    receives(&mut stream, 1..=25).await;
    world.say(&user, 1).await;
    receives(&mut stream, 26..=26).await;
    assert_eq!(world.api.record().ranges(user.id), [0, 10, 20]);
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_that_cannot_be_followed_is_a_resync_to_the_head() {
    let world = GatewayWorld::new().await;
    let user = world.user(20);
    world.api.prune(user.id, 10);
    let head = world.api.cursor(user.id, 20);
    let other_epoch = format!("{ANOTHER_EPOCH}-20");
    let cases: [(&[u8], &str); 10] = [
        (b"invalid", "unknown"),
        (b"0000000000000abc-020", "unknown"),
        (b"0000000000000abc--1", "unknown"),
        (b"0000000000000abc-9223372036854775808", "unknown"),
        (b"\xff\xfe", "unknown"),
        (other_epoch.as_bytes(), "unknown"),
        (b"0000000000000abc-21", "future"),
        (b"0000000000000abc-9223372036854775807", "future"),
        (b"0000000000000abc-9", "expired"),
        (b"0000000000000abc-0", "expired"),
    ];
    let mut streams = Vec::new();
    for (cursor, reason) in cases {
        let mut stream = world.stream(&user).last_event_id(cursor).stream().await;
        ready_and_resync(&mut stream, &head, reason).await;
        streams.push(stream);
    }
    let mut stream = world.stream_after(&user, 10).stream().await;
    ready(&mut stream, &world.api.cursor(user.id, 10), true).await;
    receives(&mut stream, 11..=20).await;
    streams.push(stream);
    world.say(&user, 1).await;
    all_receive(&mut streams, 21..=21).await;
    for (reason, times) in [("unknown", 6), ("future", 2), ("expired", 2)] {
        let name = format!("messenger_gateway_resyncs_total{{reason=\"{reason}\"}}");
        assert_eq!(world.metric(&name).await, times, "{reason}");
    }
    world.ends(streams).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backfill_starts_after_redis_has_subscribed() {
    let world = GatewayWorld::new().await;
    let (with_cursor, without) = (world.user(3), world.user(3));
    world.until_health_probe().await; // The next probe is due in two seconds, so Redis is not degraded meanwhile.
    world.network.silence();
    let mut streams =
        [world.stream_after(&with_cursor, 1).stream().await, world.stream(&without).stream().await];
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(world.api.record().requests(), []);
    // The answer holds what was committed before the subscription, because the request follows it.
    world.api.append(with_cursor.id);
    world.api.append(without.id);
    world.network.resume();
    ready(&mut streams[0], &world.api.cursor(with_cursor.id, 1), true).await;
    receives(&mut streams[0], 2..=4).await;
    ready(&mut streams[1], &world.api.cursor(without.id, 4), false).await;
    assert!(world.is_subscribed(&with_cursor).await && world.is_subscribed(&without).await);
    world.ends(streams).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn joins_backfill_while_redis_is_away_and_when_it_returns() {
    let world = Setup::default().redis_is_away().start().await;
    let (with_cursor, without) = (world.user(3), world.user(3));
    let mut a = world.stream_after(&with_cursor, 1).stream().await;
    ready(&mut a, &world.api.cursor(with_cursor.id, 1), true).await;
    receives(&mut a, 2..=3).await;
    let mut b = world.stream(&without).stream().await;
    ready(&mut b, &world.api.cursor(without.id, 3), false).await;

    // Unpublished events are found when Redis returns.
    world.api.append(with_cursor.id);
    world.api.append(without.id);
    silence(&mut a).await;
    world.network.resume();
    receives(&mut a, 4..=4).await;
    receives(&mut b, 4..=4).await;
    world.until_subscribed(&with_cursor).await;
    world.say(&with_cursor, 1).await;
    receives(&mut a, 5..=5).await;
    world.until_delivered("redis", 1).await;
    world.leaves_nothing((a, b)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn joins_waiting_for_redis_backfill_when_it_is_lost() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    world.until_health_probe().await;
    world.network.silence();
    let mut stream = world.stream_after(&user, 1).stream().await;
    let mut another = world.stream(&user).stream().await;
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(world.api.record().requests(), []);
    world.network.refuse();
    ready(&mut stream, &world.api.cursor(user.id, 1), true).await;
    receives(&mut stream, 2..=3).await;
    ready(&mut another, &world.api.cursor(user.id, 3), false).await;
    world.ends((stream, another)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_directly_follows_the_cursor_needs_no_answer() {
    let world = GatewayWorld::new().await;
    let user = world.user(5);
    world.api.fault(RANGES_PATH, Fault::Holding);
    let mut stream = world.stream_after(&user, 5).stream().await;
    world.until_subscribed(&user).await;
    world.api.until_requested("what follows the cursor", |record| record.ranges(user.id) == [5]).await;
    world.say(&user, 3).await;
    ready(&mut stream, &world.api.cursor(user.id, 5), true).await;
    receives(&mut stream, 6..=8).await;
    // The late answers are older than the delivered events and change nothing.
    world.api.fault(RANGES_PATH, Fault::None);
    world.say(&user, 1).await;
    receives(&mut stream, 9..=9).await;
    silence(&mut stream).await;
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_beyond_the_cursor_waits_for_the_answer() {
    let world = GatewayWorld::new().await;
    let user = world.user(5);
    world.api.fault(RANGES_PATH, Fault::Holding);
    let mut stream = world.stream_after(&user, 3).stream().await;
    world.until_subscribed(&user).await;
    world.api.until_requested("what follows the cursor", |record| record.ranges(user.id) == [3]).await;
    world.say(&user, 2).await;
    silence(&mut stream).await;
    world.api.fault(RANGES_PATH, Fault::None);
    ready(&mut stream, &world.api.cursor(user.id, 3), true).await;
    receives(&mut stream, 4..=7).await;
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn response_heads_are_sent_whatever_is_down() {
    let world = Setup::default().redis_is_away().start().await;
    world.api.fault_feed_requests(Fault::Holding);
    let user = world.user(3);
    let mut stream = world.stream(&user).stream().await;
    let block = soon("the first block", stream.block()).await;
    assert!(
        matches!(block, Ok(Block::Retry(retry)) if (2_000..=5_000).contains(&retry.as_millis())),
        "{block:?}"
    );
    for (name, value) in [
        ("content-type", "text/event-stream; charset=utf-8"),
        ("cache-control", "no-cache, no-transform"),
        ("x-accel-buffering", "no"),
    ] {
        assert_eq!(stream.header(name), Some(value));
    }
    assert_eq!(stream.header("content-encoding"), None);
    world.api.fault_feed_requests(Fault::None);
    ready(&mut stream, &world.api.cursor(user.id, 3), false).await;
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_an_unknown_user_is_closed() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    world.api.remove(user.id);
    for opening in [world.stream(&user), world.stream(&user).last_event_id(format!("{EPOCH}-1"))] {
        let mut stream = opening.stream().await;
        let goodbye = goodbye(&mut stream, "revoked").await;
        assert_eq!(goodbye["reconnect"], false);
    }
    world.leaves_nothing(()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_or_replaced_feed_resyncs_connected_streams() {
    let world = Setup::config(|config| config.delivery.reconcile = Duration::from_secs(1)).start().await;
    let (back, redrawn) = (world.user(9), world.user(9));
    let mut a = world.joined(&back).await;
    let mut b = world.joined(&redrawn).await;
    world.api.restore(back.id, EPOCH, 6);
    resync(&mut a, &world.api.cursor(back.id, 6), "future").await;
    world.api.restore(redrawn.id, ANOTHER_EPOCH, 6);
    resync(&mut b, &world.api.cursor(redrawn.id, 6), "unknown").await;
    for (user, stream) in [(&back, &mut a), (&redrawn, &mut b)] {
        world.say(user, 1).await;
        receives(stream, 7..=7).await;
    }
    world.ends((a, b)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_returning_during_an_unsubscribe_joins() {
    let world = GatewayWorld::new().await;
    let (user, stream) = world.joined_user(3).await;
    world.until_health_probe().await;
    // The next probe hangs, and every command with it, but for less time than makes Redis degraded.
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    drop(stream);
    world.until_metric("messenger_gateway_streams", 0).await;
    world.network.silence();
    world.until_metric("messenger_gateway_users", 0).await;
    world.api.append(user.id);
    let mut again = world.stream_after(&user, 3).stream().await;
    world.network.resume();
    ready(&mut again, &world.api.cursor(user.id, 3), true).await;
    receives(&mut again, 4..=4).await;
    world.leaves_nothing(again).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_before_it_is_ready_leaves_nothing() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    world.api.fault_feed_requests(Fault::Holding);
    let streams = [world.stream(&user).stream().await, world.stream_after(&user, 1).stream().await];
    world.until_metric("messenger_gateway_streams", 2).await;
    world.api.until_requested("both", |record| record.heads(user.id) >= 2).await;
    drop(streams);
    world.until_ended("client", 2).await;
    world.api.fault_feed_requests(Fault::None);
    world.leaves_nothing(()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_closed_connection_ends_its_stream() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    let mut raw = Raw::request(&world, &user, "1.1").await;
    world.until_metric("messenger_gateway_streams", 1).await;
    raw.socket.shutdown().await.unwrap();
    let (head, _) = raw.whole().await;
    assert!(head.starts_with("http/1.1 200 ok\r\n"));
    world.until_ended("client", 1).await;
    world.leaves_nothing(()).await;
}
