//! How streams end: with a reason in band, or broken off.

use std::{sync::Arc, time::Duration};

use e2e::World;
use testkit::sse::End;

use crate::support::{Crowd, Traffic, assert_all_exact, goodbye, ready, start, start_in, watch};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_gateway_leaves_a_body_without_its_end() {
    let (_world, _api, mut gateway, two) = start().await;
    let mut stream = ready(gateway.stream(&two.jane)).await;
    gateway.kill();
    assert_eq!(stream.rest().await, (vec![], End::Broken));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleting_a_user_ends_only_their_streams() {
    let (world, api, gateway, two) =
        start_in(World::new().await, |gateway| gateway.env("RECONCILE_SECONDS", 1)).await;
    let ann = world.user(&api, "ann").await;
    let mut lost = ready(gateway.stream(&two.jane)).await;
    let johns = watch(&gateway, &two.john).await;
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
