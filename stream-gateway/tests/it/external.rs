//! Streams opened by an external issuer's token: the gateway verifies it, `api` knows its user.

use std::time::Duration;

use futures_util::future::join_all;
use protocol::feed::{ExternalKeysAnswer, IDENTITY_PATH};
use service_kit::limiter::Limit;
use testkit::{
    PATIENCE,
    issuer::{AUDIENCE, ISSUER, IssuerKey, issuer, published},
    sse::StreamRequest,
};

use crate::{
    api::Fault,
    support::{FeedUser, GatewayWorld, RETRY_LATER, Setup, assert_retry, goodbye, now, open_all, ready},
};

const SUBJECT: &str = "auth0|jane";

/// A gateway that trusts the issuer, and a user who is known to `api`.
async fn world() -> (GatewayWorld, FeedUser) {
    world_with(Setup::default()).await
}

async fn world_with(setup: Setup) -> (GatewayWorld, FeedUser) {
    let world = setup.no_keys().start().await;
    world.api.trust(published(&IssuerKey::number(0)));
    world.until_ready_with_keys().await;
    world.api.forget_requests();
    let user = world.user(3);
    world.api.identify(SUBJECT, user.id);
    (world, user)
}

fn token() -> String {
    IssuerKey::number(0).token(SUBJECT, now() + 3_600)
}

impl GatewayWorld {
    fn with_token(&self, token: &str) -> StreamRequest {
        self.opening().bearer(token)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_external_token_opens_streams_by_one_identity_request() {
    let (world, user) = world().await;
    let mut first = world.with_token(&token()).stream().await;
    ready(&mut first, &world.api.cursor(user.id, 3), false).await;
    assert_eq!(world.api.record().identities(), [[SUBJECT.to_owned()].as_slice()]);
    let mut second = world.with_token(&token()).stream().await;
    ready(&mut second, &world.api.cursor(user.id, 3), false).await;
    assert_eq!(world.api.record().identities().len(), 1, "it is remembered");
    let event = world.api.append(user.id);
    world.publish_event(&user, &event).await;
    for stream in [&mut first, &mut second] {
        assert_eq!(stream.event().await.unwrap().id, Some(event.cursor().to_string()));
    }
    world.leaves_nothing((first, second)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn simultaneous_external_streams_share_identity_requests() {
    let (world, _) = world().await;
    let subjects: Vec<_> = (0..100).map(|number| format!("s{number}")).collect();
    for subject in &subjects {
        world.api.identify(subject, world.user(1).id);
    }
    world.api.fault(IDENTITY_PATH, Fault::Holding);
    let token = |subject| IssuerKey::number(0).token(subject, now() + 3_600);
    let streams = open_all(subjects.iter().map(|subject| world.with_token(&token(subject)))).await;
    world.api.fault(IDENTITY_PATH, Fault::None);
    join_all(streams.into_iter().map(|mut stream| async move { stream.named("ready").await })).await;
    let record = world.api.record();
    let requests = record.identities();
    assert_eq!(requests.iter().map(|subjects| subjects.len()).sum::<usize>(), 100);
    assert!(requests.len() < 20, "{}", requests.len());
    world.leaves_nothing(()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unresolved_identity_gets_a_head_and_then_busy() {
    let (world, user) = world().await;
    world.api.fault(IDENTITY_PATH, Fault::Failing);
    let mut stream = world.with_token(&token()).stream().await;
    assert_eq!(goodbye(&mut stream, "busy").await["reconnect"], true);
    assert_retry(&stream, RETRY_LATER);
    assert_eq!(world.rejected("no_identity").await, 1);
    world.api.fault(IDENTITY_PATH, Fault::None);
    let mut stream = world.with_token(&token()).stream().await;
    ready(&mut stream, &world.api.cursor(user.id, 3), false).await;
    world.leaves_nothing(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unresolved_subject_is_rate_limited() {
    let per_user = Limit::new(3, Duration::from_hours(1));
    let (world, user) = world_with(Setup::config(move |config| {
        config.opening =
            stream_gateway::config::Opening { per_user, per_address: Limit::Off, patience: PATIENCE };
    }))
    .await;
    world.api.fault(IDENTITY_PATH, Fault::Holding);
    let mut waiting = open_all(vec![world.with_token(&token()); 3]).await;
    goodbye(&mut world.with_token(&token()).stream().await, "busy").await;
    assert_eq!(world.rejected("user_rate").await, 1);
    world.api.fault(IDENTITY_PATH, Fault::None);
    for stream in &mut waiting {
        ready(stream, &world.api.cursor(user.id, 3), false).await;
    }
    world.leaves_nothing(waiting).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_valid_tokens_of_the_issuer_are_accepted() {
    let (world, _) = world().await;
    let key = IssuerKey::number(0);
    let claims = |iss: &str, aud: &str, exp: i64| serde_json::json!({ "iss": iss, "aud": aud, "sub": SUBJECT, "exp": exp });
    for bad in [
        key.sign(&claims("https://other.example", AUDIENCE, now() + 60)),
        key.sign(&claims(ISSUER, "another", now() + 60)),
        key.sign(&claims(ISSUER, AUDIENCE, now() - 1)),
        IssuerKey::number(1).sign(&claims(ISSUER, AUDIENCE, now() + 60)),
        // Our claims, signed by the issuer's key.
        key.sign(&claims(crate::support::ORIGIN, "api", now() + 60)),
    ] {
        assert_eq!(world.with_token(&bad).open().await.unwrap().status, 401, "{bad}");
    }
    assert_eq!(world.api.record().identities().len(), 0);
    world.ends(()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_issuers_keys_may_rotate_and_arrive_late() {
    let (world, user) = world().await;
    let rotated = IssuerKey::number(1);
    world.api.trust(published(&rotated));
    let token = rotated.token(SUBJECT, now() + 3_600);
    let mut stream = world.with_token(&token).stream().await;
    ready(&mut stream, &world.api.cursor(user.id, 3), false).await;
    assert_eq!(world.api.record().keys(), 1);
    world.ends(stream).await;

    let world = Setup::default().no_keys().start().await;
    world.api.trust(ExternalKeysAnswer { issuer: issuer(), jwks: None });
    world.until_ready_with_keys().await;
    let mut stream = world.with_token(&token).stream().await;
    goodbye(&mut stream, "drain").await;
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_ends_before_its_external_token_does() {
    let (world, user) = world().await;
    let exp = now() + 4;
    let mut stream = world.with_token(&IssuerKey::number(0).token(SUBJECT, exp)).stream().await;
    ready(&mut stream, &world.api.cursor(user.id, 3), false).await;
    goodbye(&mut stream, "expired").await;
    assert!(now() <= exp);
    world.leaves_nothing(stream).await;
}
