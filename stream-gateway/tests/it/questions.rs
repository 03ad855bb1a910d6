//! How `api` is asked: many users in one request, no question without need, none for somebody who has gone; and what comes of
//! an `api` that fails, hangs, or answers nonsense.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use protocol::{
    feed::{HEADS_PATH, Login, MAX_PAIRS, RANGES_PATH, Range, RangesAnswer},
    ids::UserId,
    position::Position,
};
use testkit::sse::{Stream, StreamRequest};
use tokio::time::sleep;

use crate::{
    api::{Asked, Fault},
    support::{ANOTHER_EPOCH, GatewayWorld, Setup, ready, ready_and_resync, receives, resync},
};

async fn open_all(openings: impl IntoIterator<Item = StreamRequest>) -> Vec<Stream> {
    join_all(openings.into_iter().map(|opening| async move { opening.stream().await })).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_who_join_at_once_share_requests_of_bounded_size() {
    const USERS: usize = 600;
    stream_gateway::descriptors::raise().unwrap();
    let world = GatewayWorld::new().await;
    let users: Vec<_> = (0..USERS).map(|_| world.user(3)).collect();
    world.api.fault_of_feeds(Fault::Holding);
    let mut streams = Vec::new();
    for after in [1, 2] {
        let opened = open_all(users.iter().map(|user| world.stream_after(user, after))).await;
        streams.extend(users.iter().zip(opened).map(|(user, stream)| (user, after, stream)));
    }
    world.until_metric("messenger_gateway_streams", 2 * USERS as u64).await;
    world.until_metric("messenger_gateway_actual_subscriptions", USERS as u64).await;
    world.api.fault_of_feeds(Fault::None);
    for (user, after, stream) in &mut streams {
        ready(stream, &world.api.cursor(user.id, *after), true).await;
        receives(stream, *after + 1..=3).await;
    }
    let asked = world.api.asked();
    let sizes: Vec<_> = asked.requests().iter().map(Asked::size).collect();
    assert!(sizes.iter().all(|size| *size <= MAX_PAIRS), "{sizes:?}");
    // Two questions a stream. On a slow machine the first requests may have been given up and sent again.
    assert!(sizes.len() <= 20, "few requests for {} streams: {sizes:?}", streams.len());
    drop(streams);
    world.leaves_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_that_fails_is_asked_again_ever_more_rarely_and_not_multiplied() {
    let world = GatewayWorld::new().await;
    let (user, other) = (world.user(5), world.user(5));
    let mut well = world.joined(&other).await;
    world.api.fault(RANGES_PATH, Fault::Failing);
    let mut stream = world.stream_after(&user, 3).stream().await;
    world.api.until_asked("five times", |asked| asked.range_requests().count() >= 5).await;
    let asked = world.api.asked();
    assert!(asked.range_requests().all(|pairs| pairs.len() == 1), "{asked:?}");
    // What needs no answer goes on.
    world.say(&other, 2).await;
    receives(&mut well, 6..=7).await;
    world.api.fault_of_feeds(Fault::None);
    ready(&mut stream, &world.api.cursor(user.id, 3), true).await;
    receives(&mut stream, 4..=5).await;
    drop((stream, well));
    world.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_that_fails_is_left_alone_for_a_while_however_many_ask() {
    let world = GatewayWorld::new().await;
    world.api.fault_of_feeds(Fault::FailingAfter(Duration::from_millis(40)));
    let mut streams = Vec::new();
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(2) {
        let user = world.user(5);
        streams.push((world.stream_after(&user, 3).stream().await, user));
        sleep(Duration::from_millis(20)).await; // They come one by one.
    }
    let requests = world.api.asked().requests().len();
    assert!(requests <= 40, "{requests} requests in two seconds");
    world.api.fault_of_feeds(Fault::None);
    for (stream, user) in &mut streams {
        ready(stream, &world.api.cursor(user.id, 3), true).await;
        receives(stream, 4..=5).await;
    }
    drop(streams);
    world.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_come_and_go_while_api_is_down_leave_no_questions_behind() {
    let world = Setup::config(|config| config.delivery.reconcile = Duration::from_secs(1)).start().await;
    let user = world.user(5);
    let others: Vec<_> = (0..30).map(|_| world.user(5)).collect();
    let mut steady = world.joined(&user).await;
    world.api.fault_of_feeds(Fault::Failing);
    let mut streams = open_all(others.iter().map(|other| world.stream_after(other, 1))).await;
    for _ in 0..30 {
        let another = world.another_session(user.id);
        streams.push(world.stream_after(&another, 1).stream().await);
    }
    world
        .api
        .until_asked("everything", |asked| asked.requests().iter().any(|asked| asked.size() >= 60))
        .await;
    drop(streams);
    world.until_metric("messenger_gateway_users", 1).await;
    // Two ticks later all of it is forgotten.
    world
        .api
        .until_asked("those who are here", |asked| {
            asked.requests().last().is_some_and(|last| last.size() <= 2)
        })
        .await;
    world.api.forget_questions();
    world.api.append(user.id);
    world.api.fault_of_feeds(Fault::None);
    receives(&mut steady, 6..=6).await;
    let asked = world.api.asked();
    let pairs: usize = asked.requests().iter().map(Asked::size).sum();
    assert!(pairs <= 6, "{asked:?}");
    drop(steady);
    world.leaves_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_that_does_not_answer_is_given_up_and_asked_again() {
    let world = GatewayWorld::new().await;
    let (user, other) = (world.user(5), world.user(5));
    let mut well = world.joined(&other).await;
    world.api.fault(RANGES_PATH, Fault::Holding);
    let mut stream = world.stream_after(&user, 3).stream().await;
    world.api.until_asked("once", |asked| asked.ranges(user.id) == [3]).await;
    world.say(&other, 1).await;
    receives(&mut well, 6..=6).await;
    world.api.until_asked("again", |asked| asked.ranges(user.id) == [3, 3]).await;
    world.api.fault_of_feeds(Fault::None);
    ready(&mut stream, &world.api.cursor(user.id, 3), true).await;
    receives(&mut stream, 4..=5).await;
    drop((stream, well));
    world.leaves_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reconcile_asks_once_for_each_user_and_session() {
    let world = Setup::config(|config| config.delivery.reconcile = Duration::from_secs(1)).start().await;
    let user = world.user(5);
    let phone = world.another_session(user.id);
    let mut streams = Vec::new();
    for session in [&user, &user, &user, &phone] {
        streams.push(world.joined(session).await);
    }
    world.api.forget_questions();
    world.api.until_asked("three rounds", |asked| asked.requests().len() == 3).await;
    for asked in world.api.asked().requests() {
        let Asked::Heads { users, logins } = asked else { panic!("{asked:?}") };
        assert_eq!(users.len(), 2);
        let mut logins = logins.clone();
        logins.sort();
        let of = |session| Login { user: user.id, session };
        assert_eq!(logins, [of(user.session), of(phone.session)]);
    }
    drop(streams);
    world.ends().await;
}

type Falsify = fn(&mut RangesAnswer);

/// Ways in which an answer about a range can be wrong where a beginning of it can still be true, or the question asked again.
const HALF_TRUTHS: [(&str, Falsify); 7] = [
    ("with a hole", |answer| _ = answer.ranges[0].events.remove(1)),
    ("with an event twice", |answer| answer.ranges[0].events[1].seq -= 1),
    ("beyond the head", |answer| {
        let head = answer.ranges[0].head.unwrap();
        answer.ranges[0].head = Some(Position { seq: head.seq - 1, ..head });
    }),
    ("about somebody else", |answer| answer.ranges[0].user = UserId(i64::MAX)),
    ("about another place", |answer| answer.ranges[0].after += 1),
    ("about nobody", |answer| answer.ranges.clear()),
    ("about more than was asked", |answer| {
        let Range { user, after, .. } = answer.ranges[0];
        answer.ranges.push(Range { user, after, head: None, events: vec![], more: false });
    }),
];

/// Ways in which nothing of it can be.
const FALSEHOODS: [(&str, Falsify); 3] = [
    ("in reverse", |answer| answer.ranges[0].events.reverse()),
    ("of another epoch", |answer| {
        answer.ranges[0].events.iter_mut().for_each(|event| event.epoch = ANOTHER_EPOCH);
    }),
    ("from before the place", |answer| {
        answer.ranges[0].events.iter_mut().for_each(|event| event.seq -= 1);
    }),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_range_that_cannot_be_only_what_is_certain_is_believed() {
    join_all(HALF_TRUTHS.map(async |(what, falsify)| {
        println!("{what}"); // The last ones are those that failed.
        let world = GatewayWorld::new().await;
        let user = world.user(5);
        // To a stream that joins.
        world.api.falsify_ranges(falsify);
        let mut stream = world.stream_after(&user, 2).stream().await;
        ready(&mut stream, &world.api.cursor(user.id, 2), true).await;
        world.until_subscribed(&user).await;
        world.say(&user, 1).await;
        receives(&mut stream, 3..=6).await;
        // And to a hole.
        for _ in 0..2 {
            world.api.append(user.id);
        }
        world.api.falsify_ranges(falsify);
        world.say(&user, 1).await;
        receives(&mut stream, 7..=9).await;
        drop(stream);
        world.ends().await;
    }))
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_range_of_which_nothing_can_be_is_a_resync_and_no_endless_question() {
    join_all(FALSEHOODS.map(async |(what, falsify)| {
        println!("{what}");
        let world = GatewayWorld::new().await;
        let user = world.user(5);
        world.api.falsify_ranges(falsify);
        let mut stream = world.stream_after(&user, 2).stream().await;
        ready_and_resync(&mut stream, &world.api.cursor(user.id, 5), "expired").await;
        world.until_subscribed(&user).await;
        for _ in 0..2 {
            world.api.append(user.id);
        }
        world.api.falsify_ranges(falsify);
        world.say(&user, 1).await;
        resync(&mut stream, &world.api.cursor(user.id, 8), "expired").await;
        assert_eq!(world.api.asked().ranges(user.id), [2, 5]);
        world.say(&user, 1).await;
        receives(&mut stream, 9..=9).await;
        drop(stream);
        world.ends().await;
    }))
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_of_another_form_is_asked_for_again() {
    let huge = " ".repeat(40 << 20); // Beyond what is read of an answer.
    let forms = ["", "nonsense", "{}", "[]", r#"{"heads":[{"user":7}]}"#, r#"{"ranges":[{}]}"#, &huge];
    let nothing_said = [r#"{"heads":[],"ended":[]}"#, r#"{"ranges":[]}"#];
    join_all(forms.into_iter().chain(nothing_said).map(|form| async move {
        let world = GatewayWorld::new().await;
        let user = world.user(5);
        world.api.next_answer(RANGES_PATH, form.to_owned());
        let mut stream = world.stream_after(&user, 3).stream().await;
        ready(&mut stream, &world.api.cursor(user.id, 3), true).await;
        receives(&mut stream, 4..=5).await;
        assert_eq!(world.api.asked().ranges(user.id), [3, 3]);

        let user = world.user(5);
        world.api.next_answer(HEADS_PATH, form.to_owned());
        let mut another = world.stream(&user).stream().await;
        ready(&mut another, &world.api.cursor(user.id, 5), false).await;
        assert_eq!(world.api.asked().heads(user.id), 2);
        drop((stream, another));
        world.ends().await;
    }))
    .await;
}
