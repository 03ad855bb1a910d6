//! A slow consumer delays no other stream; it is closed in time, or catches up exactly.

use std::time::Duration;

use e2e::{
    Service, User, World,
    ledger::{StoredFeed, assert_exact},
};
use serde_json::json;
use testkit::{
    soon,
    sse::{Event, Stream},
    until,
};

use crate::support::{Two, browser};

/// Far more than a tiny receive buffer and the gateway's send buffer: about 1.2 MB.
const MESSAGES: usize = 600;

/// The longest text: 480 code points of four bytes.
async fn say_much(world: &World, api: &Service, two: &Two) {
    let url = api.url(&format!("/api/conversations/{}/messages", two.conversation));
    let mut text = world.text();
    while text.chars().count() < 480 {
        text.push('😀');
    }
    for _ in 0..MESSAGES / 20 {
        let calls = (0..20).map(|_| {
            world.client.post(&url).bearer(&two.john.token).json(&json!({ "content": text })).expect(201)
        });
        futures_util::future::join_all(calls).await;
    }
}

async fn slow_consumer(gateway: &Service, user: &User) -> Stream {
    let mut stream = gateway.stream(user).tiny_receive_buffer().stream().await;
    stream.named("ready").await;
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_consumer_delays_no_other_and_catches_up_exactly() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let two = Two::meet(&world, &api).await;
    let after = StoredFeed::read(&world.sql, two.jane.id).await.head;
    let mut slow_consumer = slow_consumer(&gateway, &two.jane).await;
    let well = browser(gateway.stream(&two.jane));
    well.ready().await;

    say_much(&world, &api, &two).await;
    assert_exact(&world.sql, two.jane.id, "the healthy reader", &well).await;
    assert_eq!(gateway.metric("messenger_gateway_slow_consumers").await, 1.0);

    let feed = StoredFeed::read(&world.sql, two.jane.id).await;
    let mut seen = Vec::new();
    for _ in after..feed.head {
        seen.push(slow_consumer.next().await);
    }
    feed.assert_is("the slow consumer", &seen, after);
    let posted = world.say(&api, &two.john, two.conversation).await;
    assert_eq!(slow_consumer.next().await.json()["id"], posted["id"]);
    until("no consumer is slow", || async {
        gateway.metric("messenger_gateway_slow_consumers").await == 0.0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn write_deadline_closes_a_slow_consumer_which_resumes() {
    let world = World::new().await;
    let api = world.api().ready().await;
    let gateway = world.gateway(api.internal()).env("WRITE_DEADLINE_SECONDS", 2).ready().await;
    let two = Two::meet(&world, &api).await;
    let after = StoredFeed::read(&world.sql, two.jane.id).await.head;
    let mut slow_consumer = slow_consumer(&gateway, &two.jane).await;
    let well = browser(gateway.stream(&two.jane));
    well.ready().await;
    assert_eq!(gateway.metric("messenger_gateway_streams").await, 2.0);

    say_much(&world, &api, &two).await;
    assert_exact(&world.sql, two.jane.id, "the healthy reader", &well).await;
    until("it is cut", || async { gateway.metric("messenger_gateway_streams").await == 1.0 }).await;

    // It received a prefix of the feed, and resumes at its last id.
    let feed = StoredFeed::read(&world.sql, two.jane.id).await;
    let (mut seen, _) = slow_consumer.rest().await;
    assert!(seen.len() < MESSAGES, "it was cut before everything was sent");
    let last = slow_consumer.last_id.unwrap();
    let mut again = gateway.stream(&two.jane).last_event_id(&last).stream().await;
    assert_eq!(again.named("ready").await.id.as_ref(), Some(&last));
    while seen.last().and_then(|event: &Event| event.id.clone()) != Some(feed.head_cursor()) {
        seen.push(again.next().await);
    }
    feed.assert_is("the one that was cut", &seen, after);
    assert_eq!(well.record().opened, 1, "the other stream stayed open");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_reader_among_fast_ones_receives_everything() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let two = Two::meet(&world, &api).await;
    let after = StoredFeed::read(&world.sql, two.jane.id).await.head;
    let mut slow = slow_consumer(&gateway, &two.jane).await;
    let well = browser(gateway.stream(&two.jane));
    well.ready().await;
    // Repeatedly lagging and live.
    let reading = async {
        let mut seen = Vec::new();
        while seen.len() < MESSAGES {
            seen.push(slow.next().await);
            if seen.len() % 50 < 10 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        seen
    };
    let (seen, ()) = tokio::join!(reading, say_much(&world, &api, &two));
    let feed = StoredFeed::read(&world.sql, two.jane.id).await;
    feed.assert_is("the slow one", &seen, after);
    assert_exact(&world.sql, two.jane.id, "the healthy reader", &well).await;
    assert!(gateway.metric("messenger_gateway_slow_consumer_episodes_total").await > 1.0, "it was slow");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_stays_bounded_with_many_slow_consumers() {
    let world = World::new().await;
    let api = world.api().ready().await;
    let gateway = world.gateway(api.internal()).env("REPLAY_BUFFER_BYTES", 1 << 20).ready().await;
    let two = Two::meet(&world, &api).await;
    let mut readers = Vec::new();
    for _ in 0..20 {
        readers.push(slow_consumer(&gateway, &two.jane).await);
    }
    let before = gateway.memory().unwrap().rss;
    say_much(&world, &api, &two).await;
    let well = browser(
        gateway.stream(&two.jane).last_event_id(StoredFeed::read(&world.sql, two.jane.id).await.cursor(0)),
    );
    assert_exact(&world.sql, two.jane.id, "the healthy reader", &well).await;
    let grown = gateway.memory().unwrap().rss.saturating_sub(before);
    println!("20 slow consumers, 1.2 MB of events: the gateway grew by {} KB", grown / 1024);
    // A copy for each would be 24 MB.
    assert!(grown < 16 << 20, "{grown}");
    soon("they can still read", async {
        for reader in &mut readers {
            reader.next().await;
        }
    })
    .await;
}
