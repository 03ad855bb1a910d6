//! How long a stream lasts, what is said on it while nothing happens, and what a client may send.

use std::time::Duration;

use protocol::claims::{Audience, Claims};
use testkit::{
    soon,
    sse::{Block, Stream},
    until,
};
use tokio::io::AsyncWriteExt;

use crate::support::{GatewayWorld, Raw, Setup, claims, goodbye, keys, now, ready, receives};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_come_as_often_as_asked_for() {
    let world = Setup::config(|config| config.delivery.heartbeat = Duration::from_secs(1)).start().await;
    let user = world.user(3);
    let mut often = world.joined(&user).await;
    let mut rarely = world.stream(&user).heartbeat("4").stream().await;
    let count = async |stream: &mut Stream, beats: usize| {
        while stream.comments < beats {
            stream.block().await.unwrap();
        }
    };
    soon("a heartbeat at the slower pace", async {
        tokio::select! {
            () = count(&mut rarely, 1) => {}
            () = count(&mut often, usize::MAX) => {}
        }
    })
    .await;
    assert!(often.comments > rarely.comments, "{} and {}", often.comments, rarely.comments);
    drop((often, rarely));
    world.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_for_it_gets_heartbeats_that_a_script_can_see_and_that_move_no_cursor() {
    let world = Setup::config(|config| config.delivery.heartbeat = Duration::from_secs(1)).start().await;
    let user = world.user(3);
    let mut stream = world.stream(&user).heartbeat("event").stream().await;
    ready(&mut stream, &world.api.cursor(user.id, 3), false).await;
    let Ok(Block::Event(beat)) = soon("a heartbeat", stream.block()).await else { panic!("not an event") };
    assert_eq!((beat.name.as_deref(), beat.id.as_deref()), (Some("heartbeat"), None));
    assert_eq!(beat.data, "{}");
    drop(stream);
    world.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_ends_before_its_token_does() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    let exp = now() + 4;
    let token = keys().sign(&claims(user.id, user.session, exp));
    let mut streams = Vec::new();
    for _ in 0..5 {
        streams.push(world.opening().bearer(&token).stream().await);
    }
    for stream in &mut streams {
        ready(stream, &world.api.cursor(user.id, 3), false).await;
        assert_eq!(goodbye(stream, "expired").await["reconnect"], false);
        assert!(now() < exp, "not after the token");
    }
    world.until_ended("expired", 5).await;
    assert_eq!(
        world
            .opening()
            .bearer(&keys().sign(&claims(user.id, user.session, now() - 1)))
            .open()
            .await
            .unwrap()
            .status,
        401
    );
    drop(streams);
    world.ends().await;
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
    // And one whose session ends soon.
    let brief = keys().sign(&Claims { aud: Audience::Stream, session_exp: Some(now() + 3), ..usual });
    let mut brief = world.opening().query_token(&brief).stream().await;
    goodbye(&mut brief, "expired").await;
    until("the token has expired", || async {
        world.opening().query_token(&token).open().await.unwrap().status == 401
    })
    .await;
    world.say(&user, 1).await;
    receives(&mut stream, 4..=4).await;
    drop((stream, brief));
    world.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_ends_at_a_random_age() {
    let world = Setup::config(|config| config.admission.max_age = Duration::from_secs(2)).start().await;
    let user = world.user(3);
    let mut streams = Vec::new();
    for _ in 0..5 {
        streams.push(world.stream(&user).stream().await);
    }
    for stream in &mut streams {
        ready(stream, &world.api.cursor(user.id, 3), false).await;
        assert_eq!(goodbye(stream, "rotate").await["reconnect"], true);
        let retry = stream.retry.unwrap().as_millis();
        assert!((2_000..=5_000).contains(&retry), "{retry}");
    }
    world.until_ended("rotate", 5).await;
    drop(streams);
    world.leaves_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_client_says_on_a_stream_is_ignored_and_too_much_of_it_ends_the_stream() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    let mut polite = Raw::open(&world, &user).await;
    let mut rude = Raw::open(&world, &user).await;
    world.until_subscribed(&user).await;
    let noise = vec![b'x'; 60 * 1024];
    polite.socket.write_all(&noise).await.unwrap();
    rude.socket.write_all(&noise).await.unwrap();
    world.say(&user, 1).await;
    polite.until("\"n\":4").await;
    rude.until("\"n\":4").await;
    rude.socket.write_all(&noise).await.unwrap();
    rude.until_end().await;
    world.until_ended("unexpected_input", 1).await;
    world.say(&user, 1).await;
    polite.until("\"n\":5").await;
    drop((polite, rude));
    world.leaves_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_leave_after_the_goodbye_is_left() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    let mut stays = Raw::open(&world, &user).await;
    world.until_subscribed(&user).await;
    world.publish(&user, serde_json::json!({ "revoked": user.session }).to_string()).await;
    stays.until("event: goodbye").await;
    stays.until_end().await; // Our half of it ends at once.
    world.until_ended("revoked", 1).await; // The rest a little later, though this client keeps its half open.
    world.until_metric("messenger_gateway_streams", 0).await;
    drop(stays);
    world.ends().await;
}
