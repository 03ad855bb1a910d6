//! `GET /admin/explain`: what a gateway did with one event, asked by an operator.

use protocol::position::Seq;
use serde_json::{Value, json};

use crate::{
    api::Fault,
    support::{ANOTHER_EPOCH, FeedUser, GatewayWorld, Setup, ready, receives, resync},
};

impl GatewayWorld {
    async fn explain(&self, user: &FeedUser, seq: Seq) -> Value {
        let question = format!("http://{}/admin/explain?user={}&seq={seq}", self.ops, user.id);
        self.client.get(question).expect(200).await.json()
    }
}

/// What is said of each stream.
fn says(streams: &Value) -> Vec<&str> {
    streams.as_array().unwrap().iter().map(|stream| stream["says"].as_str().unwrap()).collect()
}

const WRITTEN: &str = "The event was written to it";
const BEFORE: &str = "The event is before its start: the client had it, or reads it by REST";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_is_told_which_streams_had_an_event_and_what_the_others_wait_for() {
    let world = GatewayWorld::new().await;
    let user = world.user(10);
    assert_eq!(
        world.explain(&user, 11).await["says"],
        json!([format!("User {} has no stream here", user.id)])
    );

    let mut early = world.joined(&user).await;
    world.say(&user, 2).await;
    receives(&mut early, 11..=12).await;
    let mut late = world.joined(&user).await;
    world.say(&user, 1).await;
    receives(&mut early, 13..=13).await;
    receives(&mut late, 13..=13).await;
    let told = world.explain(&user, 12).await;
    assert_eq!(says(&told["streams"]), [WRITTEN, BEFORE], "{told}");
    assert_eq!(says(&world.explain(&user, 13).await["streams"]), [WRITTEN, WRITTEN]);
    let waiting = "Not written yet: it waits for the event";
    assert_eq!(says(&world.explain(&user, 14).await["streams"]), [waiting, waiting]);
    let first = &told["streams"][0];
    assert_eq!((&first["after"], &first["upto"]), (&json!(10), &json!(13)), "{told}");
    assert_eq!(first["session"], json!(user.session));
    assert_eq!((&told["position"]["seq"], &told["subscribed"]), (&json!(13), &json!(true)), "{told}");

    // What has ended is remembered.
    drop(early);
    world.until_ended("client", 1).await;
    world.say(&user, 1).await;
    receives(&mut late, 14..=14).await;
    let told = world.explain(&user, 14).await;
    assert_eq!(says(&told["streams"]), [WRITTEN]);
    assert_eq!(says(&told["ended"]), ["It ended before the event was written to it"]);
    assert_eq!(told["ended"][0]["reason"], "client");
    assert_eq!(says(&world.explain(&user, 13).await["ended"]), [WRITTEN]);
    assert_eq!(says(&world.explain(&user, 10).await["ended"]), ["The event is before its start"]);

    // Another history begins, and with it other numbers.
    world.api.restore(user.id, ANOTHER_EPOCH, 3);
    let unknown = world.api.append(user.id);
    world.publish_event(&user, &unknown).await;
    resync(&mut late, &world.api.cursor(user.id, 4), "unknown").await;
    let told = world.explain(&user, 4).await;
    assert_eq!(says(&told["streams"]), [BEFORE], "{told}");
    assert_eq!(says(&told["ended"]), ["Its positions are from another history of the feed"], "{told}");
    drop(late);
    world.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_is_told_who_is_to_blame_for_an_event_that_does_not_come() {
    let world = Setup::default().start().await;
    let (user, slow, new) = (world.user(0), world.user(0), world.user(5));

    // The client: it reads nothing.
    let mut stalled = world.stream(&slow).tiny_receive_buffer().stream().await;
    ready(&mut stalled, &world.api.cursor(slow.id, 0), false).await;
    world.until_subscribed(&slow).await;
    for _ in 0..200 {
        let event = world.api.append_large(slow.id, 3_000);
        world.publish_event(&slow, &event).await;
    }
    world.until_metric("messenger_gateway_slow_consumers", 1).await;
    let told = world.explain(&slow, 200).await;
    assert_eq!(
        says(&told["streams"]),
        ["Not written yet: its socket cannot take bytes now (a slow consumer)"],
        "{told}"
    );
    receives(&mut stalled, 1..=200).await;

    // api: it does not answer, and an event is missing.
    let mut stream = world.joined(&user).await;
    world.api.fault_of_feeds(Fault::Failing);
    world.api.append(user.id);
    let second = world.api.append(user.id);
    world.publish_event(&user, &second).await;
    world.api.until_asked("what follows?", |asked| !asked.ranges(user.id).is_empty()).await;
    let joining = world.stream_after(&new, 3).stream().await;
    world.until_subscribed(&new).await;
    let told = world.explain(&user, 2).await;
    let said = told["says"].to_string();
    for sentence in [
        "Event 2 has not been delivered here: position is 0",
        "This feed is uncertain",
        "api does not answer",
    ] {
        assert!(said.contains(sentence), "{sentence}: {told}");
    }
    let told = world.explain(&new, 4).await;
    assert!(told["says"].to_string().contains("is not known yet"), "{told}");
    assert!(says(&told["streams"])[0].starts_with("Joining"), "{told}");
    world.api.fault_of_feeds(Fault::None);
    receives(&mut stream, 1..=2).await;

    // Redis: it is away.
    world.network.refuse();
    world.network.cut();
    world.until_metric("messenger_gateway_redis_degraded", 1).await;
    let told = world.explain(&user, 3).await;
    assert!(told["says"].to_string().contains("Redis is degraded") && told["subscribed"] == false, "{told}");
    let asked_by_message = format!("http://{}/admin/explain?user={}&message=1", world.ops, user.id);
    assert_eq!(world.client.get(asked_by_message).send().await.unwrap().status, 400);
    drop((stream, stalled, joining));
    world.ends().await;
}
