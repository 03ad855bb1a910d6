//! A process that gets SIGTERM closes its connections cleanly.

use std::{sync::Arc, time::Duration};

use e2e::World;
use futures_util::future::join_all;
use testkit::{sse::End, until};

use crate::support::{Crowd, Traffic, Two, assert_all_exact};

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
async fn stream_requested_while_draining_gets_a_goodbye() {
    let world = World::new().await;
    let api = world.api().ready().await;
    let plan = world.gateway(api.internal()).env("DRAIN_WAIT_SECONDS", 1).env("DRAIN_WINDOW_SECONDS", 4);
    let mut gateway = plan.ready().await;
    let jane = world.user(&api, "jane").await;
    let mut held = Vec::new();
    for _ in 0..4 {
        let mut stream = gateway.stream(&jane).stream().await;
        stream.named("ready").await;
        held.push(stream);
    }
    gateway.terminate();
    let ends = join_all(held.iter_mut().map(testkit::sse::Stream::rest)).await;
    for (events, end) in ends {
        assert_eq!(end, End::Clean);
        assert_eq!(events.last().unwrap().json()["reason"], "drain");
    }
    match gateway.stream(&jane).open().await {
        Err(_) => {}
        Ok(mut stream) => {
            assert_eq!(stream.status, 200);
            let (events, _) = stream.rest().await;
            assert_eq!(events.last().unwrap().json()["reason"], "drain");
        }
    }
    assert!(gateway.wait().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_reads_nothing_does_not_hold_up_a_drain() {
    let world = World::new().await;
    let api = world.api().ready().await;
    let plan = world.gateway(api.internal()).env("DRAIN_WAIT_SECONDS", 0).env("DRAIN_WINDOW_SECONDS", 1);
    // The drain may last longer than a test waits.
    let mut gateway = plan.env("WRITE_DEADLINE_SECONDS", 600).ready().await;
    let two = Two::meet(&world, &api).await;
    let mut slow = gateway.stream(&two.jane).tiny_receive_buffer().stream().await;
    slow.named("ready").await;
    // More than the kernel buffers for it.
    until("its socket is full", || async {
        two.say(&world, &api, 20).await;
        gateway.metric("messenger_gateway_slow_consumers").await == 1.0
    })
    .await;
    gateway.terminate();
    assert!(gateway.wait().await.success());
    slow.rest().await;
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
    let ids: Vec<i64> = accepted.iter().map(|id| id.parse().unwrap()).collect();
    let kept: i64 = sqlx::query_scalar("SELECT count(*) FROM messenger.messages WHERE id = ANY($1)")
        .bind(&ids)
        .fetch_one(&world.sql)
        .await
        .unwrap();
    assert_eq!(usize::try_from(kept).unwrap(), ids.len(), "every accepted message is there");
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
