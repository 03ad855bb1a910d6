//! Opening a stream: an immediate response head whatever is down, or the documented error.

use e2e::{World, ledger::StoredFeed};
use protocol::problem::Problem;
use testkit::{
    http::Answer,
    servers::Redis,
    soon,
    sse::{Block, StreamRequest},
};

use crate::support::{Two, ready, start};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_opens_with_its_head_a_retry_and_ready() {
    let (world, _api, gateway, two) = start().await;
    let mut retries = Vec::new();
    for _ in 0..8 {
        let opening = gateway.stream(&two.jane).header("accept-encoding", "gzip, br");
        let mut stream = opening.header("x-request-id", "abc-123").stream().await;
        for (name, value) in [
            ("content-type", Some("text/event-stream; charset=utf-8")),
            ("cache-control", Some("no-cache, no-transform")),
            ("x-accel-buffering", Some("no")),
            ("x-content-type-options", Some("nosniff")),
            ("content-encoding", None),
            ("x-request-id", Some("abc-123")),
        ] {
            assert_eq!(stream.header(name), value, "{name}");
        }
        let Ok(Block::Retry(retry)) = stream.block().await else { panic!("`retry` comes first") };
        assert!((2_000..=5_000).contains(&retry.as_millis()), "{retry:?}");
        retries.push(retry);
        let ready = stream.named("ready").await;
        let head = StoredFeed::read(&world.sql, two.jane.id).await.head_cursor();
        assert_eq!(ready.id, Some(head.clone()));
        let data = ready.json();
        assert_eq!(data["cursor"], head.as_str());
        assert_eq!(data["resumed"], false);
        assert_eq!(data["heartbeatSeconds"], 15);
        let time = data["serverTime"].as_str().unwrap();
        assert!(time.ends_with('Z') && time.parse::<chrono::DateTime<chrono::Utc>>().is_ok(), "{time}");
    }
    retries.sort();
    retries.dedup();
    assert!(retries.len() > 1, "each connection draws its own retry");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn head_and_retry_do_not_wait_for_api_or_redis() {
    let mut redis = Redis::start();
    let world = World::with_redis(redis.url()).await;
    let (mut api, gateway) = world.pair().await;
    let two = Two::meet(&world, &api).await;
    two.say(&world, &api, 2).await;
    api.kill();
    redis.kill();

    let mut streams = Vec::new();
    for _ in 0..20 {
        let mut stream = gateway.stream(&two.jane).stream().await;
        assert!(matches!(soon("the first block", stream.block()).await, Ok(Block::Retry(_))));
        streams.push(stream);
    }
    assert!(gateway.is_ready().await, "a gateway without Redis and api is degraded, and still ready");

    api.restart().await;
    let head = StoredFeed::read(&world.sql, two.jane.id).await.head_cursor();
    for stream in &mut streams {
        assert_eq!(stream.named("ready").await.id.as_ref(), Some(&head));
    }
    // Redis is still down: the reconcile delivers it.
    let posted = world.say(&api, &two.john, two.conversation).await;
    for stream in &mut streams {
        assert_eq!(stream.next().await.json()["id"], posted["id"]);
    }
}

/// The one form of a refusal.
async fn refused(opening: &StreamRequest, status: u16) -> Problem {
    let stream = opening.open().await.unwrap();
    assert_eq!(stream.status, status, "{opening:?}");
    let headers = stream.headers.clone();
    read_problem(&Answer { status, headers, body: stream.text().await.into() })
}

fn read_problem(answer: &Answer) -> Problem {
    assert!(answer.header("content-type").unwrap().starts_with("application/problem+json"));
    let problem: Problem = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(problem.status, answer.status);
    assert_eq!(answer.header("x-request-id"), Some(problem.request_id.as_str()));
    assert!(!problem.code.is_empty() && problem.code.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'));
    problem
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_come_in_the_contracts_order() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let jane = world.user(&api, "jane").await;
    let call = |method: &str, path: &str| world.client.call(method, gateway.url(path));

    for path in ["/api/nothing", "/api/messages/1", "/api/conversations"] {
        let answer = call("GET", path).send().await.unwrap();
        assert_eq!(answer.status, 404, "{path}");
        assert_eq!(read_problem(&answer).message, "Not found");
    }
    for method in ["POST", "PUT", "DELETE", "PATCH"] {
        let answer = call(method, "/api/messages").header("content-type", "text/plain").send().await.unwrap();
        assert_eq!(answer.status, 405, "{method}");
        assert!(answer.header("allow").unwrap().split(", ").any(|method| method == "GET"));
        read_problem(&answer);
    }

    // 401 before 403 before 406.
    let plain = || gateway.anonymous_stream();
    let other_site = "https://evil.example";
    refused(&plain().without_header("accept").header("origin", other_site), 401).await;
    refused(&plain().cookie(&jane.cookie).without_header("accept").header("origin", other_site), 403).await;
    refused(&plain().cookie(&jane.cookie).header("origin", "null"), 403).await;
    for accept in [None, Some("*/*"), Some("application/json"), Some("text/event-streams")] {
        let opening = plain().bearer(&jane.token).without_header("accept");
        let opening = if let Some(accept) = accept { opening.header("accept", accept) } else { opening };
        let problem = refused(&opening, 406).await;
        assert_eq!(problem.message, "This endpoint requires an EventSource connection");
        assert_eq!(problem.detail.as_deref(), Some("Send the header Accept: text/event-stream"));
    }
    for accept in ["text/event-stream;q=0.9", "application/json, text/event-stream", "Text/Event-Stream"] {
        ready(plain().bearer(&jane.token).header("accept", accept)).await;
    }
    ready(plain().cookie(&jane.cookie).header("origin", e2e::world::ORIGIN)).await;
    ready(plain().cookie(&jane.cookie).header("sec-fetch-site", "cross-site")).await;
}
