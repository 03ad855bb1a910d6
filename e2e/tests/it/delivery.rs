//! Delivery while only the clients' own connections break.

use std::{sync::Arc, time::Duration};

use e2e::{
    World,
    ledger::{StoredFeed, assert_exact},
};
use futures_util::future::join_all;
use testkit::{
    proxy::Proxy,
    servers::Redis,
    sse::{EventSource, ReconnectBy, StreamRequest},
};

use crate::support::{
    Crowd, RETRY, Traffic, assert_all_exact, browser, start, start_in, until_metric, watch,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_device_receives_exactly_its_users_feed() {
    let world = Arc::new(World::new().await);
    let (one, two) = tokio::join!(world.api().ready(), world.api().ready());
    let gateway = |internal| world.gateway(internal).ready();
    let (a, b, c) = tokio::join!(gateway(one.internal()), gateway(two.internal()), gateway(one.internal()));
    let crowd = Crowd::gather(&world, &one, 6).await;

    // One of the three delivery paths breaks in the middle of an event.
    let breaking = Proxy::start(a.public()).await;
    breaking.cut_after(3_500);
    let paths = |user: &e2e::TestUser, first: usize| -> Vec<StreamRequest> {
        let broken =
            StreamRequest::new(format!("http://{}/api/messages", breaking.address())).bearer(&user.token);
        let mut paths = vec![broken, b.stream(user), c.stream(user)];
        paths.rotate_left(first % 3);
        paths
    };
    let mut watching = Vec::new();
    for (number, user) in crowd.users.iter().enumerate() {
        for (device, resume) in
            [ReconnectBy::Header, ReconnectBy::Query, ReconnectBy::Alternately].into_iter().enumerate()
        {
            watching.push((user.clone(), EventSource::open(paths(user, number + device), resume, RETRY)));
        }
    }
    join_all(watching.iter().map(|(_, browser)| browser.ready())).await;

    let traffic = Traffic::start(&world, &[&one, &two], &crowd.lines, Duration::from_millis(20));
    for round in 0..60 {
        traffic.more(12).await;
        watching[round * 7 % watching.len()].1.cut().await;
        if round % 5 == 0 {
            let (reader, conversation) = &crowd.lines[round % crowd.lines.len()];
            let url = two.url(&format!("/api/conversations/{conversation}/read_messages"));
            world.client.post(url).bearer(&reader.token).expect(204).await;
        }
    }
    traffic.stop().await;
    breaking.resume();

    assert_all_exact(&world, &one, &crowd.lines, &watching).await;
    for user in &crowd.users {
        StoredFeed::read(&world.sql, user.id).await.assert_without_gaps();
    }
    let reconnects: usize = watching.iter().map(|(_, browser)| browser.record().opened - 1).sum();
    assert!(reconnects >= 60, "only {reconnects} reconnects: the test does not test");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn healthy_redis_delivers_every_event() {
    let (world, api, gateway, two) =
        start_in(World::new().await, |gateway| gateway.env("RECONCILE_SECONDS", 300)).await;
    let jane = watch(&gateway, &two.jane).await;
    until_metric(&gateway, "messenger_gateway_actual_subscriptions", 1.0).await;
    for _ in 0..50 {
        let posted = world.say(&api, &two.john, two.conversation).await;
        jane.until("the message", |record| {
            record.ledger().next_back().is_some_and(|event| event.json()["id"] == posted["id"])
        })
        .await;
    }
    for series in ["{path=\"redis\"}", ""] {
        let delivered = gateway.metric(&format!("messenger_gateway_events_delivered_total{series}")).await;
        assert_eq!(delivered, 50.0, "{series}");
    }
    assert_eq!(gateway.metric("messenger_gateway_reconcile_recovered_feeds_total").await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_arrives_whole_and_in_order() {
    let (world, api, gateway, two) = start().await;
    let jane = watch(&gateway, &two.jane).await;
    // All together, in any order for the publisher, Redis and the gateway.
    let apis = [api.url("")];
    let send = async |key: String| world.say_until_accepted(&apis, &two.john, two.conversation, &key).await;
    join_all((0..300).map(|number| send(number.to_string()))).await;
    assert_exact(&world.sql, two.jane.id, "jane", &jane).await;
    assert_eq!(jane.record().ledger().count(), 300);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn device_that_joins_under_traffic_misses_nothing() {
    let (world, api, gateway, two) = start().await;
    let world = Arc::new(world);
    let line = [(two.john.clone(), two.conversation)];
    let traffic = Traffic::start(&world, &[&api], &line, Duration::ZERO);
    let mut watching = Vec::new();
    for _ in 0..20 {
        traffic.more(3).await;
        watching.push((two.jane.clone(), browser(gateway.stream(&two.jane))));
    }
    traffic.more(10).await;
    traffic.stop().await;
    assert_all_exact(&world, &api, &line, &watching).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn message_posted_while_joining_is_not_missed() {
    // A slow subscription, so that the message comes before, between and after all steps of joining.
    let redis = Redis::start();
    let link = Proxy::start(redis.address()).await;
    let world = World::with_redis(redis.url()).await;
    let api = world.api().ready().await;
    // No reconcile and no later event shows a gap.
    let plan = world.gateway(api.internal()).env("RECONCILE_SECONDS", 300);
    let gateway = plan.env("REDIS_URL", format!("redis://{}/", link.address())).ready().await;
    until_metric(&gateway, "messenger_gateway_redis_degraded", 0.0).await;
    link.slow(Duration::from_millis(25));
    let john = world.user(&api, "john").await;
    let mut joining = Vec::new();
    for number in 0..60 {
        let user = world.user(&api, &format!("user{number}")).await;
        let conversation = world.conversation(&api, &john, &user).await;
        let cursor = StoredFeed::read(&world.sql, user.id).await.head_cursor();
        joining.push((user, conversation, cursor));
    }
    for wave in joining.chunks(6) {
        join_all(wave.iter().enumerate().map(async |(number, (user, conversation, cursor))| {
            let opening = gateway.stream(user);
            let opening = if number % 2 == 0 { opening.last_event_id(cursor) } else { opening };
            let watching = browser(opening);
            tokio::time::sleep(Duration::from_micros(rand::random_range(0..80_000))).await;
            world.say(&api, &john, *conversation).await;
            watching.ready().await;
            assert_exact(&world.sql, user.id, &user.name, &watching).await;
        }))
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn user_who_returns_to_the_same_gateway_misses_nothing() {
    let (world, api, gateway, two) = start().await;
    let first = watch(&gateway, &two.jane).await;
    two.say(&world, &api, 2).await;
    assert_exact(&world.sql, two.jane.id, "jane", &first).await;
    let cursor = first.record().last_id().unwrap().to_owned();
    drop(first);
    // The gateway keeps the user for a moment; both kinds of return must find everything.
    for lingers in [true, true, false] {
        if !lingers {
            until_metric(&gateway, "messenger_gateway_users", 0.0).await;
        }
        two.say(&world, &api, 3).await;
        let back = browser(gateway.stream(&two.jane).last_event_id(&cursor));
        assert_exact(&world.sql, two.jane.id, "jane", &back).await;
    }
}
