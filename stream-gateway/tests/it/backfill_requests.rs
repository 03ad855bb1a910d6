//! Requests to `api`: batched, only when needed, none for closed streams; and an `api` that fails, hangs or answers with
//! invalid data.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use protocol::{
    feed::{HEADS_PATH, Login, MAX_PAIRS, RANGES_PATH, Range, RangesAnswer},
    ids::UserId,
    position::Position,
};
use tokio::time::sleep;

use crate::{
    api::{ApiRequest, Fault},
    support::{ANOTHER_EPOCH, GatewayWorld, Setup, open_all, ready, ready_and_resync, receives, resync},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn simultaneous_joins_share_bounded_requests() {
    const USERS: usize = 600;
    service_kit::descriptors::raise().unwrap();
    let world = GatewayWorld::new().await;
    let users: Vec<_> = (0..USERS).map(|_| world.user(3)).collect();
    world.api.fault_feed_requests(Fault::Holding);
    let mut streams = Vec::new();
    for after in [1, 2] {
        let opened = open_all(users.iter().map(|user| world.stream_after(user, after))).await;
        streams.extend(users.iter().zip(opened).map(|(user, stream)| (user, after, stream)));
    }
    world.until_metric("messenger_gateway_streams", 2 * USERS as u64).await;
    world.until_metric("messenger_gateway_actual_subscriptions", USERS as u64).await;
    world.api.fault_feed_requests(Fault::None);
    for (user, after, stream) in &mut streams {
        ready(stream, &world.api.cursor(user.id, *after), true).await;
        receives(stream, *after + 1..=3).await;
    }
    let record = world.api.record();
    let sizes: Vec<_> = record.requests().iter().map(ApiRequest::size).collect();
    assert!(sizes.iter().all(|size| *size <= MAX_PAIRS), "{sizes:?}");
    // Two pairs a stream. On a slow machine the first requests may have timed out and been sent again.
    assert!(sizes.len() <= 20, "few requests for {} streams: {sizes:?}", streams.len());
    world.leaves_nothing(streams).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unanswered_or_failed_request_is_retried_alone() {
    join_all([(Fault::Failing, 5), (Fault::Holding, 2)].map(async |(fault, times)| {
        let world = GatewayWorld::new().await;
        let (other, mut well) = world.joined_user(5).await;
        let user = world.user(5);
        world.api.fault(RANGES_PATH, fault);
        let mut stream = world.stream_after(&user, 3).stream().await;
        world.api.until_requested("a range", |record| !record.ranges(user.id).is_empty()).await;
        // Streams that need no answer continue.
        world.say(&other, 2).await;
        receives(&mut well, 6..=7).await;
        world.api.until_requested("again", |record| record.range_requests().count() >= times).await;
        let record = world.api.record();
        assert!(record.range_requests().all(|pairs| pairs.len() == 1), "{record:?}");
        world.api.fault_feed_requests(Fault::None);
        ready(&mut stream, &world.api.cursor(user.id, 3), true).await;
        receives(&mut stream, 4..=5).await;
        world.leaves_nothing((stream, well)).await;
    }))
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_api_gets_few_requests_however_many_join() {
    let world = GatewayWorld::new().await;
    world.api.fault_feed_requests(Fault::FailingAfter(Duration::from_millis(40)));
    let mut streams = Vec::new();
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(2) {
        let user = world.user(5);
        streams.push((world.stream_after(&user, 3).stream().await, user));
        sleep(Duration::from_millis(20)).await;
    }
    let requests = world.api.record().requests().len();
    assert!(requests <= 40, "{requests} requests in two seconds");
    world.api.fault_feed_requests(Fault::None);
    for (stream, user) in &mut streams {
        ready(stream, &world.api.cursor(user.id, 3), true).await;
        receives(stream, 4..=5).await;
    }
    world.ends(streams).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closed_streams_leave_no_pending_requests() {
    let world = Setup::config(|config| config.delivery.reconcile = Duration::from_secs(1)).start().await;
    let user = world.user(5);
    let others: Vec<_> = (0..30).map(|_| world.user(5)).collect();
    let mut steady = world.joined(&user).await;
    world.api.fault_feed_requests(Fault::Failing);
    let more = (0..30).map(|_| world.another_session(user.id)).collect::<Vec<_>>();
    let streams = open_all(others.iter().chain(&more).map(|user| world.stream_after(user, 1))).await;
    world
        .api
        .until_requested("all users and sessions", |record| {
            record.requests().iter().any(|request| request.size() >= 60)
        })
        .await;
    drop(streams);
    world.until_metric("messenger_gateway_users", 1).await;
    world
        .api
        .until_requested("the remaining user", |record| {
            record.requests().last().is_some_and(|last| last.size() <= 2)
        })
        .await;
    world.api.forget_requests();
    world.api.append(user.id);
    world.api.fault_feed_requests(Fault::None);
    receives(&mut steady, 6..=6).await;
    let record = world.api.record();
    let pairs: usize = record.requests().iter().map(ApiRequest::size).sum();
    assert!(pairs <= 6, "{record:?}");
    world.leaves_nothing(steady).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reconcile_requests_each_user_and_session_once() {
    let world = Setup::config(|config| config.delivery.reconcile = Duration::from_secs(1)).start().await;
    let user = world.user(5);
    let phone = world.another_session(user.id);
    let mut streams = Vec::new();
    for session in [&user, &user, &user, &phone] {
        streams.push(world.joined(session).await);
    }
    world.api.forget_requests();
    world.api.until_requested("three rounds", |record| record.requests().len() == 3).await;
    for request in world.api.record().requests() {
        let ApiRequest::Heads { users, logins } = request else { panic!("{request:?}") };
        assert_eq!(users.len(), 2);
        let mut logins = logins.clone();
        logins.sort();
        let of = |session| Login { user: user.id, session };
        assert_eq!(logins, [of(user.session), of(phone.session)]);
    }
    world.ends(streams).await;
}

type ChangeAnswer = fn(&mut RangesAnswer);

/// Faults after which the start of a range can be used or the request repeated.
const REPAIRABLE_FAULTS: [(&str, ChangeAnswer); 7] = [
    ("with a gap", |answer| _ = answer.ranges[0].events.remove(1)),
    ("with an event twice", |answer| answer.ranges[0].events[1].seq -= 1),
    ("beyond the head", |answer| {
        let head = answer.ranges[0].head.unwrap();
        answer.ranges[0].head = Some(Position { seq: head.seq - 1, ..head });
    }),
    ("of another user", |answer| answer.ranges[0].user = UserId(i64::MAX)),
    ("after another position", |answer| answer.ranges[0].after += 1),
    ("empty", |answer| answer.ranges.clear()),
    ("with a range that was not requested", |answer| {
        let Range { user, after, .. } = answer.ranges[0];
        answer.ranges.push(Range { user, after, head: None, events: vec![], more: false });
    }),
];

const UNUSABLE_RANGES: [(&str, ChangeAnswer); 3] = [
    ("in reverse", |answer| answer.ranges[0].events.reverse()),
    ("of another epoch", |answer| {
        answer.ranges[0].events.iter_mut().for_each(|event| event.epoch = ANOTHER_EPOCH);
    }),
    ("before the position", |answer| {
        answer.ranges[0].events.iter_mut().for_each(|event| event.seq -= 1);
    }),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_consistent_start_of_a_range_is_used() {
    join_all(REPAIRABLE_FAULTS.map(async |(what, falsify)| {
        println!("{what}");
        let world = GatewayWorld::new().await;
        let user = world.user(5);
        // For a joining stream.
        world.api.falsify_ranges(falsify);
        let mut stream = world.stream_after(&user, 2).stream().await;
        ready(&mut stream, &world.api.cursor(user.id, 2), true).await;
        world.until_subscribed(&user).await;
        world.say(&user, 1).await;
        receives(&mut stream, 3..=6).await;
        // For a gap.
        world.lose(&user, 2);
        world.api.falsify_ranges(falsify);
        world.say(&user, 1).await;
        receives(&mut stream, 7..=9).await;
        world.ends(stream).await;
    }))
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_range_without_a_consistent_start_ends_in_a_resync() {
    join_all(UNUSABLE_RANGES.map(async |(what, falsify)| {
        println!("{what}");
        let world = GatewayWorld::new().await;
        let user = world.user(5);
        world.api.falsify_ranges(falsify);
        let mut stream = world.stream_after(&user, 2).stream().await;
        ready_and_resync(&mut stream, &world.api.cursor(user.id, 5), "expired").await;
        world.until_subscribed(&user).await;
        world.lose(&user, 2);
        world.api.falsify_ranges(falsify);
        world.say(&user, 1).await;
        resync(&mut stream, &world.api.cursor(user.id, 8), "expired").await;
        assert_eq!(world.api.record().ranges(user.id), [2, 5]);
        world.say(&user, 1).await;
        receives(&mut stream, 9..=9).await;
        world.ends(stream).await;
    }))
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_malformed_answer_is_requested_again() {
    let huge = " ".repeat(40 << 20); // Above the limit of an answer.
    let forms = ["", "invalid", "{}", "[]", r#"{"heads":[{"user":7}]}"#, r#"{"ranges":[{}]}"#, &huge];
    let empty_answers = [r#"{"heads":[],"ended":[]}"#, r#"{"ranges":[]}"#];
    join_all(forms.into_iter().chain(empty_answers).map(|form| async move {
        let world = GatewayWorld::new().await;
        let user = world.user(5);
        world.api.next_answer(RANGES_PATH, form.to_owned());
        let mut stream = world.stream_after(&user, 3).stream().await;
        ready(&mut stream, &world.api.cursor(user.id, 3), true).await;
        receives(&mut stream, 4..=5).await;
        assert_eq!(world.api.record().ranges(user.id), [3, 3]);

        let user = world.user(5);
        world.api.next_answer(HEADS_PATH, form.to_owned());
        let mut another = world.stream(&user).stream().await;
        ready(&mut another, &world.api.cursor(user.id, 5), false).await;
        assert_eq!(world.api.record().heads(user.id), 2);
        world.ends((stream, another)).await;
    }))
    .await;
}
