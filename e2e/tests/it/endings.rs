//! Every stream ends with a reason in band, and no later than its token or session.

use std::{sync::Arc, time::Duration};

use chrono::Utc;
use e2e::World;
use protocol::{
    claims::{Audience, Claims},
    ids::SessionId,
};
use testkit::{
    ports::free_port,
    sse::{End, Event, Stream},
    until,
};

use crate::support::{Crowd, Traffic, Two, assert_all_exact, browser};

/// The reason of the goodbye, and whether to reconnect.
pub(crate) async fn goodbye(stream: &mut Stream) -> (String, bool) {
    let (events, end) = stream.rest().await;
    assert_eq!(end, End::Clean);
    let goodbye: &Event = events.last().expect("a goodbye");
    assert!(goodbye.is("goodbye"), "{goodbye:?}");
    assert_eq!(goodbye.id, None);
    let data = goodbye.json();
    (data["reason"].as_str().unwrap().to_owned(), data["reconnect"].as_bool().unwrap())
}

pub(crate) async fn ready(mut stream: Stream) -> Stream {
    stream.named("ready").await;
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_ends_before_its_token_does_and_says_so() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let two = Two::meet(&world, &api).await;
    let claims = world.claims(&two.jane);
    let exp = Utc::now().timestamp() + 4;
    let token = world.sign(&Claims { exp, ..claims.clone() });
    let mut streams = Vec::new();
    for _ in 0..5 {
        streams.push(ready(gateway.anonymous_stream().bearer(&token).stream().await).await);
    }
    for stream in &mut streams {
        assert_eq!(goodbye(stream).await.0, "expired");
    }
    assert!(Utc::now().timestamp() <= exp, "never after");
    until("the token is refused", || async {
        gateway.anonymous_stream().bearer(&token).open().await.unwrap().status == 401
    })
    .await;

    // A stream token bounds only the opening; the stream lives as long as the session.
    let soon = Utc::now().timestamp() + 2;
    let token =
        world.sign(&Claims { aud: Audience::Stream, exp: soon, session_exp: Some(claims.exp), ..claims });
    let mut long = ready(gateway.anonymous_stream().query_token(&token).stream().await).await;
    until("the stream token is refused", || async {
        gateway.anonymous_stream().query_token(&token).open().await.unwrap().status == 401
    })
    .await;
    let posted = world.say(&api, &two.john, two.conversation).await;
    assert_eq!(long.next().await.json()["id"], posted["id"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_gateway_leaves_a_body_without_its_end() {
    let world = World::new().await;
    let (api, mut gateway) = world.pair().await;
    let jane = world.user(&api, "jane").await;
    let mut stream = ready(gateway.stream(&jane).stream().await).await;
    gateway.kill();
    assert_eq!(stream.rest().await, (vec![], End::Broken));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_stream_more_than_a_user_may_have_replaces_the_oldest() {
    let world = World::new().await;
    let api = world.api().ready().await;
    let gateway = world.gateway(api.internal()).env("MAX_STREAMS_PER_USER", 3).ready().await;
    let two = Two::meet(&world, &api).await;
    let mut john = ready(gateway.stream(&two.john).stream().await).await;
    let mut streams = Vec::new();
    for _ in 0..5 {
        streams.push(ready(gateway.stream(&two.jane).stream().await).await);
    }
    for stream in &mut streams[..2] {
        let (reason, _) = goodbye(stream).await;
        assert_eq!(reason, "replaced");
        assert!((60_000..=120_000).contains(&stream.retry.unwrap().as_millis()), "{:?}", stream.retry);
    }
    let posted = world.say(&api, &two.john, two.conversation).await;
    for stream in &mut streams[2..] {
        assert_eq!(stream.next().await.json()["id"], posted["id"]);
    }
    john.named("message.sent").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_over_the_process_limit_says_busy() {
    let world = World::new().await;
    let api = world.api().ready().await;
    let gateway = world.gateway(api.internal()).env("MAX_STREAMS", 3).ready().await;
    let two = Two::meet(&world, &api).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(ready(gateway.stream(&two.jane).stream().await).await);
    }
    for _ in 0..5 {
        let mut refused = gateway.stream(&two.john).stream().await;
        assert_eq!(refused.header("content-type"), Some("text/event-stream; charset=utf-8"));
        let (reason, reconnect) = goodbye(&mut refused).await;
        assert_eq!((reason.as_str(), reconnect), ("busy", true));
        assert!((60_000..=120_000).contains(&refused.retry.unwrap().as_millis()), "{:?}", refused.retry);
    }
    held.pop();
    until("a permit is free", || async {
        gateway.stream(&two.john).stream().await.event().await.is_ok_and(|event| event.is("ready"))
    })
    .await;
    let posted = world.say(&api, &two.john, two.conversation).await;
    for stream in &mut held {
        assert_eq!(stream.next().await.json()["id"], posted["id"], "those who are in notice nothing");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_over_the_address_limit_says_busy() {
    let world = World::new().await;
    let api = world.api().ready().await;
    let gateway = world.gateway(api.internal()).env("MAX_STREAMS_PER_ADDRESS", 2).ready().await;
    let jane = world.user(&api, "jane").await;
    let held = [
        ready(gateway.stream(&jane).stream().await).await,
        ready(gateway.stream(&jane).stream().await).await,
    ];
    assert_eq!(goodbye(&mut gateway.stream(&jane).stream().await).await.0, "busy");
    drop(held);
    until("a permit is free", || async {
        gateway.stream(&jane).stream().await.event().await.is_ok_and(|event| event.is("ready"))
    })
    .await;
}

async fn revoke(world: &World, session: SessionId) {
    let update =
        sqlx::query("UPDATE messenger.sessions SET revoked_at = now() WHERE id = $1").bind(session.0);
    update.execute(&world.sql).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revoked_session_ends_its_own_streams_only() {
    let dead_redis = format!("redis://127.0.0.1:{}/", free_port());
    for redis in [None, Some(dead_redis)] {
        let world = match redis {
            None => World::new().await,
            Some(url) => World::with_redis(url).await,
        };
        let api = world.api().ready().await;
        let gateway = world.gateway(api.internal()).env("RECONCILE_SECONDS", 1).ready().await;
        let two = Two::meet(&world, &api).await;
        let mut lost = ready(gateway.stream(&two.jane).stream().await).await;
        let kept = browser(gateway.stream(&world.login(&api, "jane").await));
        kept.ready().await;
        revoke(&world, world.claims(&two.jane).sid.unwrap()).await;
        assert_eq!(goodbye(&mut lost).await, ("revoked".to_owned(), false));
        // Opened before the end is known: a stream, and then a goodbye.
        assert_eq!(goodbye(&mut gateway.stream(&two.jane).stream().await).await.0, "revoked");
        two.say(&world, &api, 1).await;
        e2e::ledger::assert_exact(&world.sql, two.jane.id, "the other device", &kept).await;
        assert_eq!(kept.record().opened, 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleting_a_user_ends_only_their_streams() {
    let world = World::new().await;
    let api = world.api().ready().await;
    let gateway = world.gateway(api.internal()).env("RECONCILE_SECONDS", 1).ready().await;
    let two = Two::meet(&world, &api).await;
    let ann = world.user(&api, "ann").await;
    let mut lost = ready(gateway.stream(&two.jane).stream().await).await;
    let johns = browser(gateway.stream(&two.john));
    johns.ready().await;
    let delete = sqlx::query("DELETE FROM messenger.users WHERE id = $1").bind(two.jane.id.0);
    delete.execute(&world.sql).await.unwrap();
    assert_eq!(goodbye(&mut lost).await, ("revoked".to_owned(), false));
    let conversation = world.conversation(&api, &two.john, &ann).await;
    world.say(&api, &ann, conversation).await;
    e2e::ledger::assert_exact(&world.sql, two.john.id, "john", &johns).await;
    assert_eq!(johns.record().opened, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_end_at_a_random_age_and_come_back_without_a_loss() {
    let world = Arc::new(World::new().await);
    let api = world.api().ready().await;
    let gateway = world.gateway(api.internal()).env("MAX_STREAM_AGE_SECONDS", 2).ready().await;
    let crowd = Crowd::gather(&world, &api, 3).await;
    let watching = crowd.watch(&[&gateway]).await;
    let traffic = Traffic::start(&world, &[&api], &crowd.lines, Duration::from_millis(20));
    for (_, browser) in &watching {
        browser.until("it reconnected twice", |record| record.opened >= 3).await;
    }
    traffic.stop().await;
    assert_all_exact(&world, &api, &crowd.lines, &watching).await;
    for (_, browser) in &watching {
        let record = browser.record();
        let goodbye = record.named("goodbye").next().unwrap();
        assert_eq!(goodbye.json()["reason"], "rotate");
        assert_eq!(goodbye.json()["reconnect"], true);
    }
}
