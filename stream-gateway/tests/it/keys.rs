//! The public keys: missing, rotated, unknown, unreachable. A missing key never makes a token invalid.

use std::time::Duration;

use futures_util::future::join_all;
use protocol::{claims::SigningKeys, feed::KEYS_PATH};
use testkit::{issuer::IssuerKey, sse::StreamRequest, until};

use crate::{
    api::Fault,
    support::{
        FeedUser, GatewayWorld, RETRY_SOON, Setup, all_receive, assert_retry, claims, goodbye, keys,
        new_keys, now, ready, receives, rotated_keys, silence,
    },
};

impl GatewayWorld {
    fn signed_by(&self, keys: &SigningKeys, user: &FeedUser) -> StreamRequest {
        self.opening().bearer(&keys.sign(&claims(user.id, user.session, now() + 3_600)))
    }
}

async fn statuses(opening: &StreamRequest, times: usize) -> Vec<u16> {
    join_all((0..times).map(|_| async { opening.open().await.unwrap().status })).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_keys_streams_reconnect_later_and_never_get_401() {
    let world = Setup::default().no_keys().start().await;
    assert_eq!(world.readiness().await.status, 503);
    let user = world.user(3);
    for opening in [world.stream(&user), world.opening().bearer("invalid")] {
        let mut stream = opening.stream().await;
        let event = goodbye(&mut stream, "drain").await;
        assert_eq!(event["reconnect"], true);
        assert_retry(&stream, RETRY_SOON);
    }
    assert_eq!(world.opening().open().await.unwrap().status, 401, "no credential is none with any key");
    world.until_ready_with_keys().await;
    let mut stream = world.stream(&user).stream().await;
    ready(&mut stream, &world.api.cursor(user.id, 3), false).await;
    assert_eq!(world.opening().bearer("invalid").open().await.unwrap().status, 401);
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_during_start_up_wait_for_the_first_keys() {
    let world = Setup::default().no_keys().start().await;
    let user = world.user(3);
    let coming = world.stream(&user);
    let (stream, ()) = tokio::join!(coming.stream(), async {
        let before = world.api.record().keys();
        world.api.until_requested("for keys again", |record| record.keys() > before).await;
        world.api.fault(KEYS_PATH, Fault::None);
    });
    let mut stream = stream;
    ready(&mut stream, &world.api.cursor(user.id, 3), false).await;
    assert_eq!(world.rejected("no_keys").await, 0);
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unpublished_key_costs_one_request_and_is_rejected() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    let opening = world.signed_by(&rotated_keys(), &user);
    assert_eq!(statuses(&opening, 20).await, [401; 20]);
    assert_eq!(world.api.record().keys(), 1);
    assert_eq!(statuses(&opening, 20).await, [401; 20]);
    assert_eq!(world.api.record().keys(), 1, "tokens of unknown keys are no load on api");
    let refused = "messenger_gateway_stream_request_errors_total{code=\"unauthorized\"}";
    assert_eq!(world.metric(refused).await, 40);
    world.ends(()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_rotated_without_a_rejected_request() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    let rotated = rotated_keys();
    world.api.publish_keys(rotated.jwks().clone());
    assert_eq!(statuses(&world.stream(&user), 3).await, [200; 3]);
    assert_eq!(world.api.record().keys(), 0);
    assert_eq!(statuses(&world.signed_by(&rotated, &user), 20).await, [200; 20]);
    assert_eq!(world.api.record().keys(), 1);
    assert_eq!(statuses(&world.stream(&user), 3).await, [200; 3]);
    world.ends(()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_not_invalid_while_its_key_cannot_be_fetched() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    world.api.fault(KEYS_PATH, Fault::Failing);
    for _ in 0..3 {
        let mut stream = world.signed_by(&rotated_keys(), &user).stream().await;
        goodbye(&mut stream, "drain").await;
    }
    assert_eq!(world.api.record().keys(), 1);
    // Known keys stay valid, and tokens with other faults stay invalid.
    assert_eq!(statuses(&world.stream(&user), 1).await, [200]);
    assert_eq!(statuses(&world.opening().bearer("invalid"), 1).await, [401]);
    world.leaves_nothing(()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_or_invalid_key_set_replaces_no_valid_one() {
    let senseless = [
        "",
        "{}",
        "invalid",
        r#"{"own":{"keys":[]}}"#,
        r#"{"own":{"keys":[{"kty":"oct","k":"AAAA","kid":"x"}]}}"#,
    ];
    join_all(senseless.map(async |text| {
        let world = GatewayWorld::new().await;
        let user = world.user(3);
        world.api.next_answer(KEYS_PATH, text);
        let mut stream = world.signed_by(&rotated_keys(), &user).stream().await;
        goodbye(&mut stream, "drain").await;
        assert_eq!(world.api.record().keys(), 1);
        assert_eq!(statuses(&world.stream(&user), 1).await, [200]);
        assert_eq!(world.metric("messenger_gateway_public_keys").await, keys().jwks().keys.len() as u64);
        world.ends(stream).await;
    }))
    .await;
}

/// A gateway with both keys, from replicas configured at time 1.
async fn world_of_two_keys(setup: Setup) -> GatewayWorld {
    let world = setup.no_keys().start().await;
    world.api.publish_keys_since(rotated_keys().jwks().clone(), 1);
    world.until_ready_with_keys().await;
    world.api.forget_requests();
    world
}

/// Removing the usual key closes its streams; `notify` is how the gateway learns of it.
async fn a_removed_key_ends_what_it_opened(world: GatewayWorld, notify: impl AsyncFnOnce(&GatewayWorld)) {
    let (leaked, user) = (world.user(3), world.user(3));
    let mut opened = [
        world.stream(&leaked).stream().await,
        world.stream_after(&leaked, 1).stream().await,
        world.stream(&user).stream().await,
    ];
    for stream in &mut opened {
        stream.named("ready").await;
    }
    let mut by_new_key = world.signed_by(&new_keys(), &user).stream().await;
    ready(&mut by_new_key, &world.api.cursor(user.id, 3), false).await;
    world.api.publish_keys_since(new_keys().jwks().clone(), 2);
    notify(&world).await;
    for stream in &mut opened {
        assert_eq!(goodbye(stream, "revoked").await["reconnect"], false);
    }
    assert_eq!(statuses(&world.stream(&user), 3).await, [401; 3]);
    world.say(&user, 1).await;
    receives(&mut by_new_key, 4..=4).await;
    world.ends((opened, by_new_key)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_key_is_learned_by_redis() {
    let world = world_of_two_keys(Setup::default()).await;
    a_removed_key_ends_what_it_opened(world, async |world| {
        let version = world.api.publish_keys_since(new_keys().jwks().clone(), 2);
        world.announce(&version).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_key_is_learned_by_the_reconcile() {
    let setup = Setup::config(|config| config.delivery.reconcile = Duration::from_secs(1));
    let world = world_of_two_keys(setup).await;
    a_removed_key_ends_what_it_opened(world, async |_| {}).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_an_older_configuration_do_not_come_back() {
    let world = world_of_two_keys(Setup::default()).await;
    let user = world.user(3);
    let new = world.api.publish_keys_since(new_keys().jwks().clone(), 2);
    // A replica of the older configuration answers first; the gateway repeats the request until the newer one does.
    let old = world.api.publish_keys_since(rotated_keys().jwks().clone(), 1);
    world.announce(&new).await;
    world.api.until_requested("twice", |record| record.keys() >= 2).await;
    assert_eq!(statuses(&world.stream(&user), 1).await, [200]);
    world.api.publish_keys_since(new_keys().jwks().clone(), 2);
    until("the key is removed", || async { world.stream(&user).open().await.unwrap().status == 401 }).await;

    let mut stream = world.signed_by(&new_keys(), &user).stream().await;
    ready(&mut stream, &world.api.cursor(user.id, 3), false).await;
    let version = world.api.publish_keys_since(keys().jwks().clone(), 1);
    for older in [&old, &version] {
        world.announce(older).await;
    }
    world.announce(&new).await;
    // A token of the removed key makes the gateway fetch keys too.
    assert_eq!(statuses(&world.stream(&user), 3).await, [401; 3]);
    silence(&mut stream).await;
    assert_eq!(statuses(&world.signed_by(&new_keys(), &user), 1).await, [200]);
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_added_key_ends_no_stream() {
    let world = world_of_two_keys(Setup::default()).await;
    world.api.publish_keys_since(keys().jwks().clone(), 2);
    let version = world.api.publish_keys_since(rotated_keys().jwks().clone(), 3);
    let user = world.user(3);
    let mut stream = world.stream(&user).stream().await;
    ready(&mut stream, &world.api.cursor(user.id, 3), false).await;
    world.announce(&version).await;
    // Equal keys are not fetched again, whatever their configuration's time.
    silence(&mut stream).await;
    assert_eq!(world.api.record().keys(), 0);
    assert_eq!(statuses(&world.signed_by(&new_keys(), &user), 1).await, [200]);
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_key_of_an_external_issuer_ends_its_streams() {
    let world = Setup::default().no_keys().start().await;
    let [old, new] = [0, 1].map(IssuerKey::number);
    world.api.publish_keys_since(keys().jwks().clone(), 1);
    let both = jsonwebtoken::jwk::JwkSet { keys: [old.jwks().keys, new.jwks().keys].concat() };
    world.api.fetched_since(Some(both), 1);
    world.until_ready_with_keys().await;
    let user = world.user(3);
    world.api.identify("jane", user.id);
    let open = |key: &IssuerKey| {
        let opening = world.opening().bearer(&key.token("jane", now() + 3_600));
        async move { opening.stream().await }
    };
    let (mut removed, mut stays) = (open(&old).await, open(&new).await);
    let mut own = world.stream(&user).stream().await;
    for stream in [&mut removed, &mut stays, &mut own] {
        ready(stream, &world.api.cursor(user.id, 3), false).await;
    }
    // A replica without the issuer's keys is not evidence of their removal.
    let none_yet = world.api.fetched_since(None, 2);
    world.announce(&none_yet).await;
    silence(&mut removed).await;
    let version = world.api.fetched_since(Some(new.jwks()), 2);
    world.announce(&version).await;
    goodbye(&mut removed, "revoked").await;
    world.say(&user, 1).await;
    all_receive([&mut stays, &mut own], 4..=4).await;
    world.ends((removed, stays, own)).await;
}
