//! The session behind a stream: nothing is written before it is confirmed, and nothing is lost by waiting.

use std::time::Duration;

use futures_util::future::join_all;
use protocol::feed::{HEADS_PATH, RANGES_PATH};
use testkit::sse::Stream;

use crate::{
    api::Fault,
    support::{
        FeedUser, GatewayWorld, Setup, all_receive, claims, goodbye, keys, now, open_all, ready, receives,
        receives_only_a_goodbye, silence,
    },
};

/// Four streams: without a cursor, at the head, behind it, and with an invalid cursor.
async fn one_of_each(world: &GatewayWorld, user: &FeedUser, head: u64) -> Vec<Stream> {
    open_all([
        world.stream(user),
        world.stream_after(user, head),
        world.stream_after(user, head - 2),
        world.stream(user).last_event_id("invalid"),
    ])
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_written_before_the_session_is_confirmed() {
    let world = GatewayWorld::new().await;
    let user = world.user(5);
    let (ended, phone) = (world.another_session(user.id), world.another_session(user.id));
    let mut confirmed = world.joined(&user).await;
    world.api.end_session(ended.session);
    world.api.fault(HEADS_PATH, Fault::Holding);
    let mut of_ended = one_of_each(&world, &ended, 5).await;
    let mut of_phone = one_of_each(&world, &phone, 5).await;
    world.until_metric("messenger_gateway_streams", 9).await;
    // The position is known, and the first event directly follows the cursor.
    world.say(&user, 3).await;
    receives(&mut confirmed, 6..=8).await;
    join_all(of_ended.iter_mut().chain(&mut of_phone).map(silence)).await;
    assert!(world.api.record().ranges(user.id).is_empty(), "nothing is read, so nothing is held");
    world.api.fault(HEADS_PATH, Fault::None);
    for stream in &mut of_ended {
        receives_only_a_goodbye(stream, "revoked").await;
    }
    let [at_head, at_cursor, behind, senseless] = &mut of_phone[..] else { panic!("four") };
    ready(at_head, &world.api.cursor(user.id, 8), false).await;
    ready(at_cursor, &world.api.cursor(user.id, 5), true).await;
    receives(at_cursor, 6..=8).await;
    ready(behind, &world.api.cursor(user.id, 3), true).await;
    receives(behind, 4..=8).await;
    senseless.named("ready").await;
    senseless.named("resync").await;
    world.say(&user, 1).await;
    all_receive(of_phone.iter_mut().chain([&mut confirmed]), 9..=9).await;
    world.leaves_nothing((confirmed, of_ended, of_phone)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_waiting_for_api_are_complete_and_use_no_memory() {
    const USERS: usize = 40;
    let world = Setup::config(|config| config.delivery.reconcile = Duration::from_secs(1)).start().await;
    let users: Vec<_> = (0..USERS).map(|_| world.user(2)).collect();
    let ended: Vec<_> = users.iter().map(|user| world.another_session(user.id)).collect();
    ended.iter().for_each(|user| world.api.end_session(user.session));
    world.api.fault(HEADS_PATH, Fault::Failing);
    let mut waiting = open_all(users.iter().map(|user| world.stream_after(user, 0))).await;
    let mut refused = open_all(ended.iter().map(|user| world.stream_after(user, 0))).await;
    world.until_metric("messenger_gateway_actual_subscriptions", USERS as u64).await;
    // `api` fails for several reconciles while Redis delivers many events.
    for _ in 0..3 {
        for user in &users {
            let event = world.api.append_large(user.id, 10_000);
            world.publish_event(user, &event).await;
        }
        world.api.forget_requests();
        world.api.until_requested("another round", |record| record.requests().len() >= 3).await;
        assert_eq!(world.api.record().range_requests().count(), 0);
        assert_eq!(world.metric("messenger_gateway_replay_buffer_bytes").await, 0);
    }
    world.api.fault(HEADS_PATH, Fault::None);
    for (user, stream) in users.iter().zip(&mut waiting) {
        ready(stream, &world.api.cursor(user.id, 0), true).await;
        receives(stream, 1..=5).await;
    }
    for stream in &mut refused {
        receives_only_a_goodbye(stream, "revoked").await;
    }
    world.leaves_nothing((waiting, refused)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_check_does_not_wait_for_ranges() {
    let world = GatewayWorld::new().await;
    let reading = world.user(5);
    world.api.fault(RANGES_PATH, Fault::Holding);
    let mut readers = Vec::new();
    // More requests than may run together.
    for count in 1..=3 {
        readers.push(world.stream_after(&reading, 1).stream().await);
        world.api.until_requested("a range", |record| record.range_requests().count() >= count).await;
    }
    readers.push(world.stream_after(&reading, 1).stream().await);
    readers.push(world.stream_after(&reading, 1).stream().await);
    let (user, gone) = (world.user(3), world.user(3));
    world.api.end_session(gone.session);
    let mut stream = world.stream(&user).stream().await;
    ready(&mut stream, &world.api.cursor(user.id, 3), false).await;
    receives_only_a_goodbye(&mut world.stream(&gone).stream().await, "revoked").await;
    world.api.fault(RANGES_PATH, Fault::None);
    for reader in &mut readers {
        ready(reader, &world.api.cursor(reading.id, 1), true).await;
        receives(reader, 2..=5).await;
    }
    world.leaves_nothing((stream, readers)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_answer_does_not_confirm_a_newer_stream() {
    let world = Setup::config(|config| config.delivery.reconcile = Duration::from_secs(1)).start().await;
    let (user, mut early) = world.joined_user(5).await;
    // The session ends between the answer and its arrival.
    world.api.fault(HEADS_PATH, Fault::Holding);
    world.api.forget_requests();
    world.api.until_requested("the reconcile", |record| record.heads(user.id) > 0).await;
    world.api.end_session(user.session);
    let before = world.api.record().heads(user.id);
    let mut late = world.stream_after(&user, 2).stream().await;
    world.api.until_requested("the session", |record| record.heads(user.id) > before).await;
    world.api.fault(HEADS_PATH, Fault::None);
    receives_only_a_goodbye(&mut late, "revoked").await;
    goodbye(&mut early, "revoked").await;
    world.leaves_nothing((early, late)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_of_another_user_opens_nothing() {
    let world = GatewayWorld::new().await;
    let (user, thief) = (world.user(5), world.user(5));
    let token = keys().sign(&claims(user.id, thief.session, now() + 3_600));
    let (mut of_user, mut of_thief) = (world.joined(&user).await, world.joined(&thief).await);
    for opening in [
        world.opening().bearer(&token),
        world.opening().bearer(&token).last_event_id(world.api.cursor(user.id, 2)),
    ] {
        receives_only_a_goodbye(&mut opening.stream().await, "revoked").await;
    }
    for (owner, stream) in [(&user, &mut of_user), (&thief, &mut of_thief)] {
        world.say(owner, 1).await;
        receives(stream, 6..=6).await;
    }
    world.leaves_nothing((of_user, of_thief)).await;
}
