//! Events from Redis: in order, out of order, lost, repeated, or invalid.

use std::time::Duration;

use protocol::event::Envelope;
use serde_json::{json, value::RawValue};
use testkit::until;

use crate::support::{ANOTHER_EPOCH, GatewayWorld, Setup, all_receive, goodbye, receives, resync, silence};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reordered_events_need_no_backfill() {
    let world = GatewayWorld::new().await;
    let (user, mut stream) = world.joined_user(5).await;
    world.api.forget_requests();
    let mut said = [world.api.append(user.id), world.api.append(user.id), world.api.append(user.id)];
    said.reverse();
    world.publish_together(&user, &said).await;
    world.publish_together(&user, &said).await;
    receives(&mut stream, 6..=8).await;
    silence(&mut stream).await;
    world.until_delivered("redis", 3).await;
    assert_eq!(world.api.record().requests(), []);
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_is_backfilled_by_one_request() {
    let world = GatewayWorld::new().await;
    let user = world.user(5);
    let mut streams = [world.joined(&user).await, world.joined(&user).await];
    world.api.forget_requests();
    world.lose(&user, 3);
    world.say(&user, 4).await;
    all_receive(&mut streams, 6..=12).await;
    world.say(&user, 1).await;
    all_receive(&mut streams, 13..=13).await;
    assert_eq!(world.api.record().ranges(user.id), [5]);
    assert_eq!(world.api.record().heads(user.id), 0);
    world.ends(streams).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_finds_events_that_redis_lost() {
    let world = Setup::config(|config| config.delivery.reconcile = Duration::from_secs(1)).start().await;
    let (user, other) = (world.user(5), world.user(5));
    let mut stream = world.joined(&user).await;
    let mut another = world.joined(&other).await;
    world.lose(&user, 3);
    receives(&mut stream, 6..=8).await;
    silence(&mut another).await;
    world.until_delivered("repair", 3).await;
    assert_eq!(world.metric("messenger_gateway_reconcile_recovered_feeds_total").await, 1);
    world.ends((stream, another)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pruned_events_that_were_not_delivered_end_in_a_resync() {
    let world = GatewayWorld::new().await;
    let (user, mut stream) = world.joined_user(5).await;
    world.lose(&user, 4);
    world.api.prune(user.id, 7);
    world.say(&user, 1).await;
    resync(&mut stream, &world.api.cursor(user.id, 10), "expired").await;
    world.say(&user, 1).await;
    receives(&mut stream, 11..=11).await;
    world.leaves_nothing(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_outside_the_feed_costs_one_request_and_is_dropped() {
    let world = GatewayWorld::new().await;
    let of_another_epoch = |seq| Envelope { epoch: ANOTHER_EPOCH, ..world.api.made_up(seq) };
    for outside in [vec![world.api.made_up(1_000_000)], [6, 1, 900].map(of_another_epoch).into()] {
        let (user, mut stream) = world.joined_user(5).await;
        world.publish_together(&user, &outside).await;
        world.api.until_requested("a backfill", |record| record.ranges(user.id) == [5]).await;
        silence(&mut stream).await;
        world.say(&user, 2).await;
        receives(&mut stream, 6..=7).await;
        silence(&mut stream).await;
        assert_eq!(world.api.record().ranges(user.id), [5]);
    }
    world.ends(()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_of_a_restored_backup_ends_in_a_resync() {
    let world = GatewayWorld::new().await;
    let (user, mut stream) = world.joined_user(6).await;
    world.api.restore(user.id, ANOTHER_EPOCH, 4);
    world.say(&user, 2).await;
    resync(&mut stream, &world.api.cursor(user.id, 6), "unknown").await;
    world.say(&user, 1).await;
    receives(&mut stream, 7..=7).await;
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invalid_payloads_on_a_channel_harm_no_stream() {
    let world = GatewayWorld::new().await;
    let (user, other) = (world.user(5), world.user(5));
    let mut stream = world.joined(&user).await;
    let mut another = world.joined(&other).await;
    world.api.forget_requests();
    let deep = "[".repeat(50_000);
    let payloads: [&[u8]; 9] = [
        b"",
        b"{}",
        b"null",
        b"[1,2",
        b"\x00\xff\xfe",
        deep.as_bytes(),
        br#"{"revoked":7}"#,
        br#"{"v":1,"epoch":"0000000000000abc","seq":-1,"event":"message","data":{},"createdAt":"2026-01-02T03:04:05Z"}"#,
        br#"{"v":1,"epoch":"abc","seq":6,"event":"message","data":{},"createdAt":"2026-01-02T03:04:05Z"}"#,
    ];
    for payload in payloads {
        world.publish(&user, payload).await;
    }
    world.until_metric("messenger_gateway_redis_invalid_messages_total", payloads.len() as u64).await;
    world.say(&user, 2).await;
    receives(&mut stream, 6..=7).await;
    world.say(&other, 1).await;
    receives(&mut another, 6..=6).await;
    // Only the user of that channel is backfilled.
    world.api.until_requested("a backfill", |record| !record.ranges(user.id).is_empty()).await;
    assert_eq!((world.api.record().ranges(other.id).len(), world.api.record().heads(other.id)), (0, 0));
    world.ends((stream, another)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreadable_envelope_is_backfilled_from_the_feed() {
    let world = GatewayWorld::new().await;
    let (user, mut stream) = world.joined_user(5).await;
    // The version of a newer api.
    let newer = Envelope { v: 2, ..world.api.append(user.id) };
    world.publish_event(&user, &newer).await;
    receives(&mut stream, 6..=6).await;
    // Larger than any message.
    let large = world.api.append_large(user.id, 100_000);
    world.publish_event(&user, &large).await;
    receives(&mut stream, 7..=7).await;
    world.until_delivered("repair", 2).await;
    world.until_delivered("redis", 0).await;
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_event_name_is_passed_on() {
    let world = GatewayWorld::new().await;
    let (user, mut stream) = world.joined_user(5).await;
    let new = world.api.append_named(user.id, "reaction.added");
    world.publish_event(&user, &new).await;
    let event = stream.named("reaction.added").await;
    assert_eq!(event.id, Some(world.api.cursor(user.id, 6)));
    // Line breaks between JSON tokens must not reach the stream.
    let broken = RawValue::from_string("{\r\n\"n\":\n7\r}".into()).unwrap();
    let event = Envelope { data: broken, ..world.api.append(user.id) };
    world.publish_event(&user, &event).await;
    receives(&mut stream, 7..=7).await;
    // The SSE reader of the tests rejects Unicode's line ends too.
    let breaks = "a\u{2028}b\u{2029}c\u{85}d";
    let raw = RawValue::from_string(format!("{{\"n\":8,\"text\":\"{breaks}\"}}")).unwrap();
    world.publish_event(&user, &Envelope { data: raw, ..world.api.append(user.id) }).await;
    assert_eq!(stream.next().await.json()["text"], breaks);
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_unfit_for_clients_ends_in_a_resync() {
    let world = GatewayWorld::new().await;
    let (user, mut stream) = world.joined_user(5).await;
    for (name, head) in [("error", 6), ("a\nid: x", 7)] {
        let bad = world.api.append_named(user.id, name);
        world.publish_event(&user, &bad).await;
        resync(&mut stream, &world.api.cursor(user.id, head), "expired").await;
    }
    world.say(&user, 1).await;
    receives(&mut stream, 8..=8).await;
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revocation_ends_the_streams_of_that_session_only() {
    let world = GatewayWorld::new().await;
    let user = world.user(5);
    let phone = world.another_session(user.id);
    let other = world.user(5);
    let mut ended = [world.joined(&user).await, world.joined(&user).await];
    let mut stays = world.joined(&phone).await;
    let mut others = world.joined(&other).await;
    world.publish(&user, json!({ "revoked": user.session }).to_string()).await;
    for stream in &mut ended {
        assert_eq!(goodbye(stream, "revoked").await["reconnect"], false);
    }
    // On another user's channel it ends nothing.
    world.publish(&other, json!({ "revoked": phone.session }).to_string()).await;
    world.say(&user, 1).await;
    receives(&mut stays, 6..=6).await;
    world.say(&other, 1).await;
    receives(&mut others, 6..=6).await;
    drop((ended, stays, others));
    world.until_ended("revoked", 2).await;
    world.leaves_nothing(()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_revocation_is_found_by_reconcile_and_at_join() {
    let world = Setup::config(|config| config.delivery.reconcile = Duration::from_secs(1)).start().await;
    let user = world.user(5);
    let phone = world.another_session(user.id);
    let mut ended = world.joined(&user).await;
    let mut stays = world.joined(&phone).await;
    world.api.end_session(user.session);
    goodbye(&mut ended, "revoked").await;
    let mut late = world.stream_after(&user, 5).stream().await;
    goodbye(&mut late, "revoked").await;
    world.say(&user, 1).await;
    receives(&mut stays, 6..=6).await;
    world.ends((ended, late, stays)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_continue_while_redis_is_down_and_after_it_returns() {
    let world =
        Setup::config(|config| config.delivery.degraded_reconcile = Duration::from_millis(200)).start().await;
    let users = [world.user(5), world.user(5)];
    let mut streams = [world.joined(&users[0]).await, world.joined(&users[1]).await];
    world.network.refuse();
    world.until_metric("messenger_gateway_redis_degraded", 1).await;
    assert!(world.readiness().await.text().starts_with("ready; degraded: Redis is unavailable"));
    assert_eq!(world.readiness().await.status, 200);
    for (user, stream) in users.iter().zip(&mut streams) {
        world.api.append(user.id);
        receives(stream, 6..=6).await;
    }
    world.network.resume();
    world.until_metric("messenger_gateway_redis_degraded", 0).await;
    for (user, stream) in users.iter().zip(&mut streams) {
        world.until_subscribed(user).await;
        world.say(user, 1).await;
        receives(stream, 7..=7).await;
    }
    world.until_delivered("redis", 2).await;
    world.leaves_nothing(streams).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_health_probe_detects_a_silently_dead_redis() {
    let world =
        Setup::config(|config| config.delivery.degraded_reconcile = Duration::from_millis(200)).start().await;
    let (user, mut stream) = world.joined_user(5).await;
    world.network.silence();
    world.say(&user, 1).await;
    receives(&mut stream, 6..=6).await;
    world.until_delivered("repair", 1).await;
    world.network.resume();
    world.until_metric("messenger_gateway_redis_degraded", 0).await;
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_gateway_follows_redis_to_a_new_address_of_its_name() {
    let world = GatewayWorld::new().await;
    let (user, mut stream) = world.joined_user(5).await;
    // As after a failover, the old Redis keeps our connection while api publishes to the new one.
    let promoted = testkit::servers::Redis::start();
    world.network.aim(promoted.address());
    let envelope = world.api.append(user.id);
    let payload = serde_json::to_string(&envelope).unwrap();
    let channel = world.channel(&user);
    until("the gateway subscribes at the new one", || async {
        promoted.command(&["PUBLISH", &channel, &payload]).unwrap() == ":1"
    })
    .await;
    receives(&mut stream, 6..=6).await;
    world.leaves_nothing(stream).await;
}
