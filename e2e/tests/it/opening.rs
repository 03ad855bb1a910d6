//! Opening a stream: an immediate response head whatever is down, or the documented error.

use chrono::Utc;
use e2e::{Service, World, ledger::StoredFeed};
use protocol::{
    claims::{Audience, Claims, SigningKeys},
    problem::Problem,
};
use testkit::{
    http::Answer,
    ports::free_port,
    servers::Redis,
    soon,
    sse::{Block, StreamRequest},
    until,
};

use crate::support::Two;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_opens_with_its_head_a_retry_and_ready() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let two = Two::meet(&world, &api).await;
    let mut retries = Vec::new();
    for _ in 0..8 {
        let mut stream = gateway.stream(&two.jane).stream().await;
        assert_eq!(stream.header("content-type"), Some("text/event-stream; charset=utf-8"));
        assert_eq!(stream.header("cache-control"), Some("no-cache, no-transform"));
        assert_eq!(stream.header("x-accel-buffering"), Some("no"));
        assert_eq!(stream.header("x-content-type-options"), Some("nosniff"));
        assert_eq!(stream.header("content-encoding"), None);
        assert!(stream.header("x-request-id").is_some());
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
        let time: chrono::DateTime<Utc> = time.parse().unwrap();
        assert!((Utc::now() - time).num_seconds().abs() < 60, "{time}");
        assert!(data["serverTime"].as_str().unwrap().ends_with('Z'));
    }
    retries.sort();
    retries.dedup();
    assert!(retries.len() > 1, "each connection draws its own retry");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_is_uncompressed_and_keeps_the_request_id() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let two = Two::meet(&world, &api).await;
    let opening =
        gateway.stream(&two.jane).header("accept-encoding", "gzip, br").header("x-request-id", "abc-123");
    let mut stream = opening.stream().await;
    assert_eq!(stream.header("content-encoding"), None);
    assert_eq!(stream.header("x-request-id"), Some("abc-123"));
    stream.named("ready").await;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_without_keys_is_unready_and_never_answers_401() {
    let world = World::new().await;
    let internal: std::net::SocketAddr = ([127, 0, 0, 1], free_port()).into();
    let gateway = world.gateway(internal).start().await;
    assert!(!gateway.is_ready().await);
    let claims = Claims {
        sub: 1.into(),
        sid: Some(1.into()),
        iat: Utc::now().timestamp(),
        exp: Utc::now().timestamp() + 1_000,
        aud: Audience::Api,
        iss: e2e::world::ORIGIN.into(),
        session_exp: None,
    };
    let early = StreamRequest::new(gateway.url("/api/messages")).bearer(&world.sign(&claims)).open().await;
    if let Ok(stream) = early {
        assert_ne!(stream.status, 401);
    }
    let api = world.api().env("INTERNAL_LISTEN", internal).ready().await;
    gateway.until_ready().await;
    let jane = world.user(&api, "jane").await;
    gateway.stream(&jane).stream().await.named("ready").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_streams_hear_heartbeats() {
    let world = World::new().await;
    let api = world.api().ready().await;
    let gateway = world.gateway(api.internal()).env("HEARTBEAT_SECONDS", 1).ready().await;
    let jane = world.user(&api, "jane").await;
    let mut stream = gateway.stream(&jane).stream().await;
    assert_eq!(stream.named("ready").await.json()["heartbeatSeconds"], 1);
    for _ in 0..3 {
        let heartbeat = soon("a heartbeat", stream.block()).await;
        assert_eq!(heartbeat, Ok(Block::Comment));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn first_credential_counts_even_if_it_is_bad() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let jane = world.user(&api, "jane").await;
    let john = world.user(&api, "john").await;
    let plain = || gateway.anonymous_stream();
    let stream_token = world.sign(&Claims { aud: Audience::Stream, ..world.claims(&jane) });
    for opening in [
        plain().bearer(&jane.token),
        plain().query_token(&jane.token),
        plain().cookie(&jane.cookie),
        plain().cookie(&format!("other=1; {}; more=2", jane.cookie)),
        plain().query_token(&stream_token),
        plain().bearer(&stream_token),
        plain().bearer(&jane.token).cookie(&john.cookie),
        plain().query_token(&jane.token).cookie(&world.cookie("bad")),
        plain().header("authorization", format!("bearer {}", jane.token)),
    ] {
        let mut stream = opening.stream().await;
        let head = StoredFeed::read(&world.sql, jane.id).await.head_cursor();
        assert_eq!(stream.named("ready").await.id, Some(head), "{opening:?}");
    }

    let now = Utc::now().timestamp();
    let claims = world.claims(&jane);
    let expired = world.sign(&Claims { iat: now - 100, exp: now - 1, ..claims.clone() });
    let external_issuer = world.sign(&Claims { iss: "http://elsewhere.example".into(), ..claims.clone() });
    let stranger =
        SigningKeys::from_pems(e2e::world::ORIGIN, testkit::secrets::signing_key().unwrap().as_bytes(), &[])
            .unwrap()
            .sign(&claims);
    let cut = &jane.token[..jane.token.len() - 2];
    for opening in [
        plain(),
        plain().bearer(""),
        plain().bearer("a.b.c"),
        plain().bearer(&expired),
        plain().query_token(&expired),
        plain().cookie(&world.cookie(&expired)),
        plain().bearer(&external_issuer),
        plain().bearer(&stranger),
        plain().bearer(cut),
        plain().query_token(""),
        plain().header("authorization", "Basic am9objpqYW5l"),
        plain().bearer("bad").query_token(&jane.token).cookie(&jane.cookie),
        plain().query_token("bad").cookie(&jane.cookie),
    ] {
        let problem = refused(&opening, 401).await;
        assert_eq!(problem.1.message, "Unauthorized", "{opening:?}");
        assert_eq!(problem.0.header("www-authenticate"), Some("Bearer"), "{opening:?}");
    }
}

/// The status and the one form of a refusal.
async fn refused(opening: &StreamRequest, status: u16) -> (Answer, Problem) {
    let stream = opening.open().await.unwrap();
    assert_eq!(stream.status, status, "{opening:?}");
    let headers = stream.headers.clone();
    let answer = Answer { status, headers, body: stream.text().await.into() };
    let problem = read_problem(&answer);
    (answer, problem)
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
        let (_, problem) = refused(&opening, 406).await;
        assert_eq!(problem.message, "This endpoint requires an EventSource connection");
        assert_eq!(problem.detail.as_deref(), Some("Send the header Accept: text/event-stream"));
    }
    for accept in ["text/event-stream;q=0.9", "application/json, text/event-stream", "Text/Event-Stream"] {
        plain().bearer(&jane.token).header("accept", accept).stream().await.named("ready").await;
    }
    plain().cookie(&jane.cookie).header("origin", e2e::world::ORIGIN).stream().await.named("ready").await;
    plain().cookie(&jane.cookie).header("sec-fetch-site", "cross-site").stream().await.named("ready").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_can_be_rotated_without_a_gateway_noticing_late() {
    let world = World::new().await;
    let (mut old, gateway) = world.pair().await;
    let john = world.user(&old, "john").await;
    // The new key signs, the old one is still published: both tokens are accepted.
    let new = world.api_with_another_key().env("INTERNAL_LISTEN", old.internal());
    old.kill();
    let new: Service = new.ready().await;
    let jane = world.user(&new, "jane").await;
    gateway.stream(&jane).stream().await.named("ready").await;
    gateway.stream(&john).stream().await.named("ready").await;
    until("both keys are there", || async { gateway.metric("messenger_gateway_public_keys").await >= 2.0 })
        .await;
}
