//! `GET /admin/explain`: what a gateway did with one event.

use protocol::position::Seq;
use serde_json::{Value, json};

use crate::{
    api::Fault,
    support::{ANOTHER_EPOCH, FeedUser, GatewayWorld, Setup, ready, receives, resync},
};

impl GatewayWorld {
    async fn explain(&self, user: &FeedUser, seq: Seq) -> Value {
        let url = format!("http://{}/admin/explain?user={}&seq={seq}", self.ops, user.id);
        self.client.get(url).expect(200).await.json()
    }
}

fn says(streams: &Value) -> Vec<&str> {
    streams.as_array().unwrap().iter().map(|stream| stream["says"].as_str().unwrap()).collect()
}

const WRITTEN: &str = "The event was written to it";
const BEFORE: &str = "The event is before its start: the client had it, or reads it by REST";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn explain_reports_what_each_stream_did_with_an_event() {
    let world = GatewayWorld::new().await;
    let user = world.user(10);
    let none = format!("User {} has no stream here", user.id);
    assert_eq!(world.explain(&user, 11).await["says"], json!([none]));

    let mut early = world.joined(&user).await;
    world.say(&user, 2).await;
    receives(&mut early, 11..=12).await;
    let mut late = world.joined(&user).await;
    world.say(&user, 1).await;
    receives(&mut early, 13..=13).await;
    receives(&mut late, 13..=13).await;
    let report = world.explain(&user, 12).await;
    assert_eq!(says(&report["streams"]), [WRITTEN, BEFORE], "{report}");
    assert_eq!(says(&world.explain(&user, 13).await["streams"]), [WRITTEN, WRITTEN]);
    let waiting = "Not written yet: it waits for the event";
    assert_eq!(says(&world.explain(&user, 14).await["streams"]), [waiting, waiting]);
    let first = &report["streams"][0];
    assert_eq!((&first["after"], &first["upto"]), (&json!(10), &json!(13)), "{report}");
    assert_eq!(first["session"], json!(user.session));
    assert_eq!((&report["position"]["seq"], &report["subscribed"]), (&json!(13), &json!(true)), "{report}");

    drop(early);
    world.until_ended("client", 1).await;
    world.say(&user, 1).await;
    receives(&mut late, 14..=14).await;
    let report = world.explain(&user, 14).await;
    assert_eq!(says(&report["streams"]), [WRITTEN]);
    assert_eq!(says(&report["ended"]), ["It ended before the event was written to it"]);
    assert_eq!(report["ended"][0]["reason"], "client");
    assert_eq!(says(&world.explain(&user, 13).await["ended"]), [WRITTEN]);
    assert_eq!(says(&world.explain(&user, 10).await["ended"]), ["The event is before its start"]);

    world.api.restore(user.id, ANOTHER_EPOCH, 3);
    let unknown = world.api.append(user.id);
    world.publish_event(&user, &unknown).await;
    resync(&mut late, &world.api.cursor(user.id, 4), "unknown").await;
    let report = world.explain(&user, 4).await;
    assert_eq!(says(&report["streams"]), [BEFORE], "{report}");
    assert_eq!(says(&report["ended"]), ["Its positions are from another history of the feed"], "{report}");
    world.ends(late).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn explain_names_the_cause_of_a_missing_event() {
    let world = Setup::default().start().await;
    let (user, slow, new) = (world.user(0), world.user(0), world.user(5));

    let mut lagging = world.stream(&slow).tiny_receive_buffer().stream().await;
    ready(&mut lagging, &world.api.cursor(slow.id, 0), false).await;
    world.until_subscribed(&slow).await;
    for _ in 0..200 {
        let event = world.api.append_large(slow.id, 3_000);
        world.publish_event(&slow, &event).await;
    }
    world.until_metric("messenger_gateway_slow_consumers", 1).await;
    let report = world.explain(&slow, 200).await;
    let slow_consumer = "Not written yet: its socket cannot take bytes now (a slow consumer)";
    assert_eq!(says(&report["streams"]), [slow_consumer], "{report}");
    receives(&mut lagging, 1..=200).await;

    // api does not answer, and an event is missing.
    let mut stream = world.joined(&user).await;
    world.api.fault_feed_requests(Fault::Failing);
    world.api.append(user.id);
    let second = world.api.append(user.id);
    world.publish_event(&user, &second).await;
    world.api.until_requested("a range", |record| !record.ranges(user.id).is_empty()).await;
    let joining = world.stream_after(&new, 3).stream().await;
    world.until_subscribed(&new).await;
    let report = world.explain(&user, 2).await;
    let said = report["says"].to_string();
    for sentence in [
        "Event 2 has not been delivered here: position is 0",
        "This feed is uncertain",
        "api does not answer",
    ] {
        assert!(said.contains(sentence), "{sentence}: {report}");
    }
    let report = world.explain(&new, 4).await;
    assert!(report["says"].to_string().contains("is not known yet"), "{report}");
    assert!(says(&report["streams"])[0].starts_with("Joining"), "{report}");
    world.api.fault_feed_requests(Fault::None);
    receives(&mut stream, 1..=2).await;

    world.network.refuse();
    world.network.cut();
    world.until_metric("messenger_gateway_redis_degraded", 1).await;
    let report = world.explain(&user, 3).await;
    assert!(report["says"].to_string().contains("Redis is degraded"), "{report}");
    assert_eq!(report["subscribed"], false, "{report}");
    let by_message = format!("http://{}/admin/explain?user={}&message=1", world.ops, user.id);
    assert_eq!(world.client.get(by_message).send().await.unwrap().status, 400);
    world.ends((stream, lagging, joining)).await;
}
