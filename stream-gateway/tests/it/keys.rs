//! The public keys: not there yet, rotated, unknown, unreachable. A lack of keys is never mistaken for a bad token.

use futures_util::future::join_all;
use shared::{
    claims::SigningKeys,
    feed::KEYS_PATH,
    test_support::{sse::Opening, until},
};

use crate::{
    api::Mood,
    support::{Setup, User, World, claims, goodbye, keys, now, ready, rotated_keys},
};

impl World {
    /// A stream of this user with a token of another key.
    fn signed_by(&self, keys: &SigningKeys, user: &User) -> Opening {
        self.opening().bearer(&keys.sign(&claims(user.id, user.session, now() + 3_600)))
    }
}

/// What becomes of many requests at once.
async fn statuses(opening: &Opening, times: usize) -> Vec<u16> {
    join_all((0..times).map(|_| async { opening.open().await.unwrap().status })).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_keys_streams_are_told_to_come_back_and_no_token_is_called_bad() {
    let world = Setup::default().no_keys().start().await;
    assert_eq!(world.readiness().await.status, 503);
    let user = world.user(3);
    for opening in [world.stream(&user), world.opening().bearer("nonsense")] {
        let mut stream = opening.stream().await;
        let told = goodbye(&mut stream, "busy").await;
        assert_eq!(told["reconnect"], true);
        let retry = stream.retry.unwrap().as_millis();
        assert!((2_000..=5_000).contains(&retry), "nobody is over a limit: {retry}");
    }
    assert_eq!(world.opening().open().await.unwrap().status, 401, "no credential is none with any key");
    world.api.mood(KEYS_PATH, Mood::Well);
    until("the gateway is ready", || async { world.readiness().await.status == 200 }).await;
    let mut stream = world.stream(&user).stream().await;
    ready(&mut stream, &world.api.cursor(user.id, 3), false).await;
    assert_eq!(world.opening().bearer("nonsense").open().await.unwrap().status, 401);
    drop(stream);
    world.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_while_a_gateway_starts_waits_for_its_first_keys() {
    let world = Setup::default().no_keys().start().await;
    let user = world.user(3);
    let coming = world.stream(&user);
    let (stream, ()) = tokio::join!(coming.stream(), async {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        world.api.mood(KEYS_PATH, Mood::Well);
    });
    let mut stream = stream;
    ready(&mut stream, &world.api.cursor(user.id, 3), false).await;
    assert_eq!(world.metric("gateway_streams_refused_total{reason=\"no_keys\"}").await, 0);
    drop(stream);
    world.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_nobody_publishes_is_asked_about_once_and_then_refused() {
    let world = World::new().await;
    let user = world.user(3);
    let opening = world.signed_by(&rotated_keys(), &user);
    assert_eq!(statuses(&opening, 20).await, [401; 20]);
    assert_eq!(world.api.asked().keys(), 1);
    assert_eq!(statuses(&opening, 20).await, [401; 20]);
    assert_eq!(world.api.asked().keys(), 1, "a stranger's tokens are no load on api");
    assert_eq!(world.metric("gateway_requests_rejected_total{reason=\"unauthorized\"}").await, 40);
    world.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_rotated_without_a_rejected_request() {
    let world = World::new().await;
    let user = world.user(3);
    let rotated = rotated_keys();
    world.api.publish_keys(rotated.jwks().clone());
    assert_eq!(statuses(&world.stream(&user), 3).await, [200; 3]);
    assert_eq!(world.api.asked().keys(), 0);
    assert_eq!(statuses(&world.signed_by(&rotated, &user), 20).await, [200; 20]);
    assert_eq!(world.api.asked().keys(), 1);
    assert_eq!(statuses(&world.stream(&user), 3).await, [200; 3]);
    world.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_cannot_be_asked_about_is_not_a_bad_token() {
    let world = World::new().await;
    let user = world.user(3);
    world.api.mood(KEYS_PATH, Mood::Failing);
    for _ in 0..3 {
        let mut stream = world.signed_by(&rotated_keys(), &user).stream().await;
        goodbye(&mut stream, "busy").await;
    }
    assert_eq!(world.api.asked().keys(), 1);
    // What is known stays good, and what is bad for another reason stays bad.
    assert_eq!(statuses(&world.stream(&user), 1).await, [200]);
    assert_eq!(statuses(&world.opening().bearer("nonsense"), 1).await, [401]);
    world.leaves_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_or_senseless_set_of_keys_does_not_take_the_place_of_good_ones() {
    let senseless = [
        "",
        "{}",
        "nonsense",
        r#"{"own":{"keys":[]}}"#,
        r#"{"own":{"keys":[{"kty":"oct","k":"AAAA","kid":"x"}]}}"#,
    ];
    join_all(senseless.map(async |text| {
        let world = World::new().await;
        let user = world.user(3);
        world.api.next_answer(KEYS_PATH, text);
        let mut stream = world.signed_by(&rotated_keys(), &user).stream().await;
        goodbye(&mut stream, "busy").await;
        assert_eq!(world.api.asked().keys(), 1);
        assert_eq!(statuses(&world.stream(&user), 1).await, [200]);
        assert_eq!(world.metric("gateway_keys").await, keys().jwks().keys.len() as u64);
        drop(stream);
        world.ends().await;
    }))
    .await;
}
