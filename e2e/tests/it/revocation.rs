//! Ending a session ends REST access immediately on every replica, and its streams as soon as gateways learn of it.

use chrono::Utc;
use e2e::{
    Service, TestUser, World,
    ledger::{StoredFeed, assert_exact},
};
use protocol::claims::Claims;
use testkit::{ports::free_port, soon, sse::Stream, until};

use crate::support::{Two, browser, goodbye, ready, start, until_metric, watch};

async fn call(world: &World, api: &Service, user: &TestUser, method: &str, path: &str, status: u16) {
    world.client.call(method, api.url(path)).bearer(&user.token).expect(status).await;
}

fn session_of(world: &World, user: &TestUser) -> String {
    world.claims(user).sid.expect("a session of ours").to_string()
}

pub(crate) async fn stream_token(world: &World, api: &Service, token: &str) -> String {
    let answer = world.client.post(api.url("/api/stream_token")).bearer(token).expect(200).await.json();
    let token = answer["token"].as_str().unwrap().to_owned();
    world.remember(&token);
    token
}

async fn until_revoked(streams: &mut [Stream]) {
    for stream in streams {
        let end = soon("the stream of an ended session ends", goodbye(stream)).await;
        assert_eq!(end, ("revoked".to_owned(), false));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ended_session_is_refused_and_its_streams_end() {
    let world = World::new().await;
    let (mut one, other) = tokio::join!(world.api().ready(), world.api().ready());
    let gateway = || world.gateway(one.internal()).env("RECONCILE_SECONDS", 300).ready();
    let gateways = tokio::join!(gateway(), gateway());
    let two = Two::meet(&world, &one).await;
    let (kept, desk) = (watch(&gateways.0, &two.john).await, watch(&gateways.1, &two.jane).await);
    for ending in ["one", "others", "logout"] {
        let phone = world.login(&one, "jane").await;
        let mut streams = [ready(gateways.0.stream(&phone)).await, ready(gateways.1.stream(&phone)).await];
        // The replica that the gateways use is silent, so only Redis can notify them.
        one.freeze();
        match ending {
            "one" => {
                let path = format!("/api/sessions/{}", session_of(&world, &phone));
                call(&world, &other, &two.jane, "DELETE", &path, 204).await;
            }
            "others" => call(&world, &other, &two.jane, "DELETE", "/api/sessions", 204).await,
            _ => call(&world, &other, &phone, "POST", "/api/logout", 204).await,
        }
        until_revoked(&mut streams).await;
        one.thaw();
        call(&world, &other, &phone, "GET", "/api/auth_user", 401).await;
        call(&world, &one, &phone, "GET", "/api/auth_user", 401).await;
        // The gateway learns after opening a stream that its session has ended.
        let mut late = gateways.0.stream(&phone).stream().await;
        assert_eq!(goodbye(&mut late).await, ("revoked".to_owned(), false));
    }
    two.say(&world, &one, 3).await;
    for (who, browser) in [(&two.john, &kept), (&two.jane, &desk)] {
        assert_exact(&world.sql, who.id, &who.name, browser).await;
        assert_eq!(browser.record().opened, 1, "the streams of other sessions live on");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ended_session_receives_nothing_while_api_is_away() {
    let world = World::new().await;
    let (mut one, other) = tokio::join!(world.api().ready(), world.api().ready());
    let gateway = world.gateway(one.internal()).ready().await;
    let two = Two::meet(&world, &one).await;
    let (phone, tablet) = (world.login(&one, "jane").await, world.login(&one, "jane").await);
    // This gateway has no subscription for jane, so it does not learn of the end.
    call(&world, &other, &phone, "POST", "/api/logout", 204).await;
    let desk = watch(&gateway, &two.jane).await;
    one.freeze();
    let cursor = StoredFeed::read(&world.sql, two.jane.id).await.head_cursor();
    let mut late =
        [gateway.stream(&phone).stream().await, gateway.stream(&phone).last_event_id(&cursor).stream().await];
    let waiting = browser(gateway.stream(&tablet).last_event_id(&cursor));
    until_metric(&gateway, "messenger_gateway_streams", 4.0).await;
    two.say(&world, &other, 3).await;
    assert_exact(&world.sql, two.jane.id, "jane", &desk).await;
    one.thaw();
    for stream in &mut late {
        let (events, _) = stream.rest().await;
        let names: Vec<_> = events.iter().map(|event| event.name.as_deref()).collect();
        assert_eq!(names, [Some("goodbye")], "{events:?}");
        assert_eq!(events[0].json()["reason"], "revoked");
    }
    // A stream that only had to wait misses nothing.
    waiting.ready().await;
    two.say(&world, &other, 1).await;
    for browser in [&desk, &waiting] {
        assert_exact(&world.sql, two.jane.id, "jane", browser).await;
        assert_eq!(browser.record().opened, 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_an_ended_session_end_without_redis() {
    let world = World::with_redis(format!("redis://127.0.0.1:{}/", free_port())).await;
    let (one, other) = tokio::join!(world.api().ready(), world.api().ready());
    // Only the short reconcile of a gateway without Redis falls within a test.
    let gateway = world.gateway(one.internal()).env("DEGRADED_RECONCILE_MILLIS", 1_000);
    let gateway = gateway.env("RECONCILE_SECONDS", 300).ready().await;
    let two = Two::meet(&world, &one).await;
    let kept = watch(&gateway, &two.jane).await;
    let phone = world.login(&one, "jane").await;
    let mut streams = [ready(gateway.stream(&phone)).await];
    // The session check at the opening has been answered when the next reconcile delivers this.
    let posted = world.say(&one, &two.john, two.conversation).await;
    assert_eq!(streams[0].next().await.json()["id"], posted["id"]);
    call(&world, &one, &phone, "POST", "/api/logout", 204).await;
    call(&world, &other, &phone, "GET", "/api/auth_user", 401).await;
    until_revoked(&mut streams).await;
    two.say(&world, &one, 2).await;
    assert_exact(&world.sql, two.jane.id, "jane", &kept).await;
    assert_eq!(kept.record().opened, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_a_stream_token_last_as_long_as_the_session() {
    let (world, api, gateway, two) = start().await;
    let jane = world.login(&api, "jane").await;
    let token = stream_token(&world, &api, &jane.token).await;
    world.client.get(api.url("/api/auth_user")).bearer(&token).expect(401).await;

    let claims = world.claims(&TestUser { token: token.clone(), ..jane.clone() });
    let brief = world.sign(&Claims { exp: Utc::now().timestamp() + 2, ..claims.clone() });
    let mut outlives = ready(gateway.anonymous_stream().query_token(&brief)).await;

    // Repeatedly, as a browser reconnects to the same URL.
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(ready(gateway.anonymous_stream().query_token(&token)).await);
    }
    streams.push(ready(gateway.anonymous_stream().bearer(&token)).await);

    until("the brief one has expired", || async {
        gateway.anonymous_stream().query_token(&brief).open().await.unwrap().status == 401
    })
    .await;
    let posted = world.say(&api, &two.john, two.conversation).await;
    assert_eq!(outlives.next().await.json()["id"], posted["id"]);
    for stream in &mut streams {
        assert_eq!(stream.next().await.json()["id"], posted["id"]);
    }

    world.client.post(api.url("/api/logout")).bearer(&jane.token).expect(204).await;
    streams.push(outlives);
    until_revoked(&mut streams).await;
    let mut late = gateway.anonymous_stream().query_token(&token).stream().await;
    assert_eq!(goodbye(&mut late).await.0, "revoked");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_by_a_stream_token_ends_before_its_session_does() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let jane = world.user(&api, "jane").await;
    let expire = "UPDATE messenger.sessions SET expires_at = now() + interval '4 s' RETURNING extract(epoch FROM expires_at)::bigint";
    let ends: i64 = sqlx::query_scalar(expire).fetch_one(&world.sql).await.unwrap();
    let token = stream_token(&world, &api, &jane.token).await;
    let mut stream = ready(gateway.anonymous_stream().query_token(&token)).await;
    let (reason, _) = soon("the stream ends", goodbye(&mut stream)).await;
    assert_eq!(reason, "expired");
    assert!(Utc::now().timestamp() <= ends, "never after");
}
