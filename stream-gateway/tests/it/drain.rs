//! The drain: unready, a delay, goodbyes spread over a window, and a bound on all of it.

use std::time::Duration;

use futures_util::future::join_all;
use testkit::{PATIENCE, soon, until};

use crate::support::{RETRY_SOON, Setup, all_receive, assert_retry, distinct, goodbye, receives};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_stream_ends_with_a_goodbye_and_a_retry_of_its_own() {
    const STREAMS: usize = 24;
    let world = Setup::config(|config| config.drain.window = Duration::from_secs(3)).start().await;
    let user = world.user(3);
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        streams.push(world.joined(&user).await);
    }
    world.stop();
    let retries = join_all(streams.iter_mut().map(|stream| async move {
        assert_eq!(goodbye(stream, "drain").await["reconnect"], true);
        assert_retry(stream, RETRY_SOON);
        stream.retry
    }))
    .await;
    assert!(distinct(retries) > STREAMS / 2, "each has its own retry");
    drop(streams);
    world.stopped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_continue_until_load_balancers_stop_routing() {
    let world = Setup::config(|config| {
        config.drain.wait = Duration::from_secs(1);
        config.drain.window = Duration::from_secs(4);
    })
    .start()
    .await;
    let user = world.user(3);
    let mut streams = vec![world.joined(&user).await];
    world.stop();
    until("it says that it is going", || async { world.readiness().await.status == 503 }).await;
    assert_eq!(world.readiness().await.text(), "stopping\n");
    // New streams are still admitted, and events continue.
    streams.push(world.joined(&user).await);
    world.say(&user, 1).await;
    all_receive(&mut streams, 4..=4).await;
    // One closes immediately, the other after half the window.
    goodbye(&mut streams[0], "drain").await;
    let mut late = world.stream(&user).stream().await;
    goodbye(&mut late, "drain").await;
    assert_retry(&late, RETRY_SOON);
    assert!(world.rejected("drain").await >= 1);
    // An open stream receives events until its goodbye.
    world.say(&user, 1).await;
    receives(&mut streams[1], 5..=5).await;
    goodbye(&mut streams[1], "drain").await;
    drop((streams, late));
    world.stopped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_without_streams_stops_immediately() {
    let world = Setup::config(|config| config.drain.window = Duration::from_mins(5)).start().await;
    world.stop();
    soon("it ends", world.stopped()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_consumers_do_not_delay_the_drain() {
    // The write deadline is longer than the test waits.
    let world = Setup::config(|config| config.delivery.write_deadline = 10 * PATIENCE).start().await;
    let user = world.user(0);
    let mut streams = Vec::new();
    for _ in 0..3 {
        let mut stream = world.stream(&user).tiny_receive_buffer().stream().await;
        stream.named("ready").await;
        streams.push(stream);
    }
    world.until_subscribed(&user).await;
    for _ in 0..40 {
        let event = world.api.append_large(user.id, 15_000);
        world.publish_event(&user, &event).await;
    }
    world.until_metric("messenger_gateway_slow_consumers", 3).await;
    world.stop();
    soon("it ends", world.stopped()).await;
    drop(streams);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_stops_while_everything_else_is_away() {
    let world = Setup::default().redis_is_away().start().await;
    world.api.fault_feed_requests(crate::api::Fault::Holding);
    let user = world.user(3);
    let mut streams = [world.stream(&user).stream().await, world.stream_after(&user, 1).stream().await];
    world.until_metric("messenger_gateway_streams", 2).await;
    world.stop();
    for stream in &mut streams {
        goodbye(stream, "drain").await;
    }
    drop(streams);
    world.stopped().await;
}
