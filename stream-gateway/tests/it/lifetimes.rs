//! Lifetimes, heartbeats, and input that a client may send.

use std::time::Duration;

use protocol::claims::{Audience, Claims};
use testkit::{soon, sse::Block, until};
use tokio::io::AsyncWriteExt;

use crate::support::{
    GatewayWorld, RETRY_SOON, Raw, Setup, assert_retry, claims, goodbye, keys, now, open_all, ready, receives,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeat_events_are_sent_on_request_and_move_no_cursor() {
    let world = Setup::config(|config| config.delivery.heartbeat = Duration::from_secs(1)).start().await;
    let user = world.user(3);
    let mut stream = world.stream(&user).heartbeat("event").stream().await;
    ready(&mut stream, &world.api.cursor(user.id, 3), false).await;
    let Ok(Block::Event(heartbeat)) = soon("a heartbeat", stream.block()).await else {
        panic!("not an event")
    };
    assert_eq!((heartbeat.name.as_deref(), heartbeat.id.as_deref()), (Some("heartbeat"), None));
    assert_eq!(heartbeat.data, "{}");
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_ends_before_its_token_does() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    let exp = now() + 4;
    let token = keys().sign(&claims(user.id, user.session, exp));
    let mut streams = open_all(vec![world.opening().bearer(&token); 5]).await;
    for stream in &mut streams {
        ready(stream, &world.api.cursor(user.id, 3), false).await;
        assert_eq!(goodbye(stream, "expired").await["reconnect"], false);
        assert!(now() < exp, "not after the token");
    }
    world.until_ended("expired", 5).await;
    let expired = keys().sign(&claims(user.id, user.session, now() - 1));
    assert_eq!(world.opening().bearer(&expired).open().await.unwrap().status, 401);
    world.ends(streams).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_tokens_end_bounds_the_opening_and_not_the_stream() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    let usual = claims(user.id, user.session, now() + 2);
    let token =
        keys().sign(&Claims { aud: Audience::Stream, session_exp: Some(now() + 3_600), ..usual.clone() });
    let mut stream = world.opening().query_token(&token).stream().await;
    ready(&mut stream, &world.api.cursor(user.id, 3), false).await;
    let brief = keys().sign(&Claims { aud: Audience::Stream, session_exp: Some(now() + 3), ..usual });
    let mut brief = world.opening().query_token(&brief).stream().await;
    goodbye(&mut brief, "expired").await;
    until("the token has expired", || async {
        world.opening().query_token(&token).open().await.unwrap().status == 401
    })
    .await;
    world.say(&user, 1).await;
    receives(&mut stream, 4..=4).await;
    world.ends((stream, brief)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_ends_at_a_random_age() {
    let world = Setup::config(|config| config.admission.max_age = Duration::from_secs(2)).start().await;
    let user = world.user(3);
    let mut streams = open_all(vec![world.stream(&user); 5]).await;
    for stream in &mut streams {
        ready(stream, &world.api.cursor(user.id, 3), false).await;
        assert_eq!(goodbye(stream, "rotate").await["reconnect"], true);
        assert_retry(stream, RETRY_SOON);
    }
    world.until_ended("rotate", 5).await;
    world.leaves_nothing(streams).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unexpected_input_is_ignored_up_to_a_limit() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    let mut polite = Raw::open(&world, &user).await;
    let mut rude = Raw::open(&world, &user).await;
    world.until_subscribed(&user).await;
    let input = vec![b'x'; 60 * 1024];
    polite.socket.write_all(&input).await.unwrap();
    rude.socket.write_all(&input).await.unwrap();
    world.say(&user, 1).await;
    polite.until("\"n\":4").await;
    rude.until("\"n\":4").await;
    rude.socket.write_all(&input).await.unwrap();
    rude.until_end().await;
    world.until_ended("unexpected_input", 1).await;
    world.say(&user, 1).await;
    polite.until("\"n\":5").await;
    world.leaves_nothing((polite, rude)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_stays_after_the_goodbye_is_disconnected() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    let mut stays = Raw::open(&world, &user).await;
    world.until_subscribed(&user).await;
    world.publish(&user, serde_json::json!({ "revoked": user.session }).to_string()).await;
    stays.until("event: goodbye").await;
    stays.until_end().await; // The gateway closes its half immediately.
    world.until_ended("revoked", 1).await; // The connection follows, though the client keeps its half open.
    world.until_metric("messenger_gateway_streams", 0).await;
    world.ends(stays).await;
}
