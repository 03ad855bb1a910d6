//! A slow consumer delays no other stream; it is closed in time, or catches up exactly.

use e2e::{
    Service, World,
    ledger::{StoredFeed, assert_exact},
};
use serde_json::json;
use testkit::{soon, sse::Event};

use crate::support::{Two, browser, ready, start, start_in, until_metric, watch};

/// Far more than a tiny receive buffer and the gateway's send buffer: about 1.2 MB.
const MESSAGES: usize = 600;

/// Long texts: 480 code points of four bytes.
async fn say_much(world: &World, api: &Service, two: &Two, messages: usize) {
    let url = api.url(&format!("/api/conversations/{}/messages", two.conversation));
    let mut text = world.text();
    while text.chars().count() < 480 {
        text.push('😀');
    }
    for _ in 0..messages / 20 {
        let calls = (0..20).map(|_| {
            world.client.post(&url).bearer(&two.john.token).json(&json!({ "content": text })).expect(201)
        });
        futures_util::future::join_all(calls).await;
    }
}

const SLOW: &str = "messenger_gateway_slow_consumers";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_consumer_delays_no_other_and_catches_up_exactly() {
    let (world, api, gateway, two) = start().await;
    let after = StoredFeed::read(&world.sql, two.jane.id).await.head;
    let mut slow = ready(gateway.stream(&two.jane).tiny_receive_buffer()).await;
    let well = watch(&gateway, &two.jane).await;
    let mut seen = Vec::new();
    for _ in 0..3 {
        say_much(&world, &api, &two, MESSAGES / 3).await;
        until_metric(&gateway, SLOW, 1.0).await;
        assert_exact(&world.sql, two.jane.id, "the healthy reader", &well).await;
        for _ in 0..MESSAGES / 3 {
            seen.push(slow.next().await);
        }
        until_metric(&gateway, SLOW, 0.0).await;
    }
    StoredFeed::read(&world.sql, two.jane.id).await.assert_is("the slow consumer", &seen, after);
    let posted = world.say(&api, &two.john, two.conversation).await;
    assert_eq!(slow.next().await.json()["id"], posted["id"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn write_deadline_closes_a_slow_consumer_which_resumes() {
    let (world, api, gateway, two) =
        start_in(World::new().await, |gateway| gateway.env("WRITE_DEADLINE_SECONDS", 2)).await;
    let after = StoredFeed::read(&world.sql, two.jane.id).await.head;
    let mut slow = ready(gateway.stream(&two.jane).tiny_receive_buffer()).await;
    let well = watch(&gateway, &two.jane).await;
    assert_eq!(gateway.metric("messenger_gateway_streams").await, 2.0);

    say_much(&world, &api, &two, MESSAGES).await;
    assert_exact(&world.sql, two.jane.id, "the healthy reader", &well).await;
    until_metric(&gateway, "messenger_gateway_streams", 1.0).await;

    // It received a prefix of the feed, and resumes at its last id.
    let feed = StoredFeed::read(&world.sql, two.jane.id).await;
    let (mut seen, _) = slow.rest().await;
    assert!(seen.len() < MESSAGES, "it was cut before everything was sent");
    let last = slow.last_id.unwrap();
    let mut again = gateway.stream(&two.jane).last_event_id(&last).stream().await;
    assert_eq!(again.named("ready").await.id.as_ref(), Some(&last));
    while seen.last().and_then(|event: &Event| event.id.clone()) != Some(feed.head_cursor()) {
        seen.push(again.next().await);
    }
    feed.assert_is("the one that was cut", &seen, after);
    assert_eq!(well.record().opened, 1, "the other stream stayed open");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_stays_bounded_with_many_slow_consumers() {
    let (world, api, gateway, two) =
        start_in(World::new().await, |gateway| gateway.env("REPLAY_BUFFER_BYTES", 1 << 20)).await;
    let mut readers = Vec::new();
    for _ in 0..20 {
        readers.push(ready(gateway.stream(&two.jane).tiny_receive_buffer()).await);
    }
    let before = gateway.memory().unwrap().rss;
    say_much(&world, &api, &two, MESSAGES).await;
    let beginning = StoredFeed::read(&world.sql, two.jane.id).await.cursor(0);
    let well = browser(gateway.stream(&two.jane).last_event_id(beginning));
    assert_exact(&world.sql, two.jane.id, "the healthy reader", &well).await;
    let grown = gateway.memory().unwrap().rss.saturating_sub(before);
    // A copy for each would be 24 MB.
    assert!(grown < 16 << 20, "{grown}");
    soon("they can still read", async {
        for reader in &mut readers {
            reader.next().await;
        }
    })
    .await;
}
