//! A process that gets SIGTERM closes its connections cleanly.

use std::{sync::Arc, time::Duration};

use e2e::World;
use testkit::until;

use crate::support::{Crowd, Traffic, Two, assert_all_exact, assert_stored};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drain_says_goodbye_to_each_stream_and_loses_nothing() {
    let world = Arc::new(World::new().await);
    let api = world.api().ready().await;
    let plan = || world.gateway(api.internal()).env("DRAIN_WAIT_SECONDS", 1).env("DRAIN_WINDOW_SECONDS", 3);
    let (mut leaving, staying) = tokio::join!(plan().ready(), plan().ready());
    let crowd = Crowd::gather(&world, &api, 5).await;
    let watching = crowd.watch_first(&[&leaving, &staying], 6).await;
    let traffic = Traffic::start(&world, &[&api], &crowd.lines, Duration::from_millis(40));
    traffic.more(40).await;

    leaving.terminate();
    until("it is unready", || async { !leaving.is_ready().await }).await;
    let status = leaving.wait().await;
    assert!(status.success(), "{status}");

    traffic.more(40).await;
    traffic.stop().await;
    assert_all_exact(&world, &api, &crowd.lines, &watching).await;

    for (user, browser) in &watching {
        let record = browser.record();
        let goodbyes: Vec<_> = record.named("goodbye").collect();
        assert_eq!(goodbyes.len(), 1, "{}: {goodbyes:?}", user.name);
        assert_eq!(goodbyes[0].id, None);
        assert_eq!(goodbyes[0].json()["reason"], "drain");
        assert_eq!(goodbyes[0].json()["reconnect"], true);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_stopped_under_load_finishes_accepted_requests() {
    let world = Arc::new(World::new().await);
    let (mut leaving, staying) =
        tokio::join!(world.api().env("SHUTDOWN_WAIT_SECONDS", 1).ready(), world.api().ready());
    let gateway = world.gateway(staying.internal()).env("RECONCILE_SECONDS", 1).ready().await;
    let crowd = Crowd::gather(&world, &staying, 4).await;
    let watching = crowd.watch(&[&gateway]).await;
    let traffic = Traffic::start(&world, &[&leaving, &staying], &crowd.lines, Duration::ZERO);
    traffic.more(100).await;
    leaving.terminate();
    let status = leaving.wait().await;
    assert!(status.success(), "{status}");
    traffic.more(50).await;
    let accepted = traffic.stop().await;
    assert_all_exact(&world, &staying, &crowd.lines, &watching).await;
    assert_stored(&world, &accepted).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_api_closes_keepalive_connections_and_ends() {
    let world = World::new().await;
    let mut api = world.api().env("SHUTDOWN_WAIT_SECONDS", 0).ready().await;
    let two = Two::meet(&world, &api).await; // The client keeps its connections.
    two.say(&world, &api, 1).await;
    api.terminate();
    assert!(api.wait().await.success());
}
