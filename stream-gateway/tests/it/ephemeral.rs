//! Events that are in no feed: to the streams that are live, without an id, and without consequences.

use protocol::event::{Ephemeral, LARGEST_EPHEMERAL, VERSION};
use serde_json::{json, value::RawValue};
use testkit::{sse::Event, until};

use crate::{
    api::Fault,
    support::{FeedUser, GatewayWorld, all_receive, receives, silence},
};

fn message(name: &str, data: &str) -> Vec<u8> {
    let data = RawValue::from_string(data.into()).unwrap();
    serde_json::to_vec(&Ephemeral { ephemeral: name, v: VERSION, data: &data }).unwrap()
}

async fn types(world: &GatewayWorld, user: &FeedUser, number: u32) {
    world.publish(user, message("typing", &format!("{{\"number\":{number}}}"))).await;
}

fn typing(number: u32) -> Event {
    Event { id: None, name: Some("typing".into()), data: json!({ "number": number }).to_string() }
}

async fn dropped(world: &GatewayWorld, reason: &str) -> u64 {
    world.metric(&format!("messenger_gateway_ephemeral_events_dropped_total{{reason=\"{reason}\"}}")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ephemeral_event_reaches_live_streams_without_an_id() {
    let world = GatewayWorld::new().await;
    let user = world.user(5);
    let mut streams = [world.joined(&user).await, world.joined(&user).await];
    let (_, mut other) = world.joined_user(5).await;
    world.api.forget_requests();
    types(&world, &user, 1).await;
    world.say(&user, 1).await;
    types(&world, &user, 2).await;
    for stream in &mut streams {
        assert_eq!(stream.next().await, typing(1));
        receives(stream, 6..=6).await;
        assert_eq!(stream.next().await, typing(2));
    }
    silence(&mut other).await;
    assert_eq!(world.api.record().requests(), []);
    world.until_metric("messenger_gateway_ephemeral_events_delivered_total", 4).await;
    world.until_metric("messenger_gateway_redis_invalid_messages_total", 0).await;
    assert_eq!(dropped(&world, "not_live").await, 0);
    world.ends((streams, other)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_that_joins_misses_ephemeral_events_and_nothing_else() {
    let world = GatewayWorld::new().await;
    let user = world.user(5);
    let mut live = world.joined(&user).await;
    world.api.fault(protocol::feed::HEADS_PATH, Fault::Failing);
    world.api.fault(protocol::feed::RANGES_PATH, Fault::Failing);
    let mut joining = world.stream_after(&user, 4).stream().await;
    until("it is open", || async { world.metric("messenger_gateway_streams").await == 2 }).await;
    types(&world, &user, 1).await;
    assert_eq!(live.next().await, typing(1));
    until("it is dropped for the other one", || async { dropped(&world, "not_live").await == 1 }).await;
    world.api.fault(protocol::feed::HEADS_PATH, Fault::None);
    world.api.fault(protocol::feed::RANGES_PATH, Fault::None);
    joining.named("ready").await;
    receives(&mut joining, 5..=5).await;
    types(&world, &user, 2).await;
    for stream in [&mut live, &mut joining] {
        assert_eq!(stream.next().await, typing(2));
    }
    world.ends((live, joining)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invalid_ephemeral_event_is_dropped_without_a_request() {
    let world = GatewayWorld::new().await;
    let user = world.user(5);
    let mut streams = [world.joined(&user).await];
    world.api.forget_requests();
    let large = json!("x".repeat(LARGEST_EPHEMERAL)).to_string();
    let payloads = [
        message("error", "{}"),
        message("message", "{}"),
        message("a\nid: 7", "{}"),
        message("typing", &large),
        br#"{"ephemeral":"typing","v":2,"data":{}}"#.to_vec(),
        br#"{"ephemeral":"typing","v":1}"#.to_vec(),
        br#"{"ephemeral":"#.to_vec(),
    ];
    for payload in &payloads {
        world.publish(&user, payload).await;
    }
    world.say(&user, 1).await;
    all_receive(&mut streams, 6..=6).await;
    assert_eq!(dropped(&world, "invalid").await, payloads.len() as u64);
    world.until_metric("messenger_gateway_redis_invalid_messages_total", 0).await;
    assert_eq!(world.api.record().requests(), []);
    world.ends(streams).await;
}
