//! The stream's bytes on the wire. [`testkit::sse`] checks each block in all other tests.

use std::time::Duration;

use protocol::feed::HEADS_PATH;
use serde_json::json;
use testkit::{soon, sse::Block};

use crate::{
    api::Fault,
    support::{FeedUser, GatewayWorld, Raw, Setup, goodbye, ready, receives},
};

/// The bodies of these chunks. Panics unless the last one is empty and nothing follows it.
fn chunks(mut body: &str) -> Vec<&str> {
    let mut chunks = Vec::new();
    loop {
        let (length, rest) = body.split_once("\r\n").unwrap();
        let (chunk, rest) = rest.split_at(usize::from_str_radix(length, 16).unwrap());
        body = rest.strip_prefix("\r\n").unwrap();
        if chunk.is_empty() {
            assert_eq!(body, "", "behind the last chunk");
            return chunks;
        }
        chunks.push(chunk);
    }
}

async fn say_and_revoke(world: &GatewayWorld, user: &FeedUser, raw: &mut Raw) {
    raw.until("event: ready").await;
    world.until_subscribed(user).await;
    world.say(user, 3).await;
    raw.until("-6\n\n").await;
    world.publish(user, json!({ "revoked": user.session }).to_string()).await;
}

fn assert_whole_blocks(blocks: &[&str]) {
    let [retry, ready, messages @ .., goodbye] = blocks else { panic!("{blocks:?}") };
    let retry: u32 =
        retry.strip_prefix("retry: ").and_then(|line| line.strip_suffix('\n')).unwrap().parse().unwrap();
    assert!((2_000..=5_000).contains(&retry), "{retry}");
    assert!(ready.starts_with("event: ready\ndata: {"), "{ready}");
    assert_eq!(messages.len(), 3);
    assert!(messages.iter().all(|message| message.starts_with("data: {")), "{messages:?}");
    assert_eq!(
        *goodbye,
        "retry: 3600000\nevent: goodbye\ndata: {\"reason\":\"revoked\",\"reconnect\":false}\n\n"
    );
    let one_block = |block: &&str| block.find("\n\n") == Some(block.len() - 2);
    assert!(blocks[1..].iter().all(one_block), "{blocks:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_block_is_one_chunk_and_the_last_chunk_ends_the_body() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    let mut raw = Raw::request(&world, &user, "1.1").await;
    say_and_revoke(&world, &user, &mut raw).await;
    let (head, body) = raw.whole().await;
    assert!(head.contains("\r\ntransfer-encoding: chunked\r\n"), "{head}");
    assert!(head.contains("\r\ncontent-type: text/event-stream; charset=utf-8\r\n"), "{head}");
    assert_whole_blocks(&chunks(&body));
    world.leaves_nothing(()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_1_0_gets_the_same_blocks_without_chunks() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    let mut raw = Raw::request(&world, &user, "1.0").await;
    say_and_revoke(&world, &user, &mut raw).await;
    let (head, body) = raw.whole().await;
    assert!(!head.contains("transfer-encoding") && head.contains("\r\nconnection: close"), "{head}");
    // The `retry` line is part of the first block.
    let (retry, blocks) = body.split_once('\n').unwrap();
    let retry = format!("{retry}\n");
    let blocks: Vec<_> = [retry.as_str()].into_iter().chain(blocks.split_inclusive("\n\n")).collect();
    assert_whole_blocks(&blocks);
    world.leaves_nothing(()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rejected_stream_is_complete_in_both_http_versions() {
    let world = Setup::config(|config| config.admission.streams = 0).start().await;
    let user = world.user(3);
    let (head, body) = Raw::request(&world, &user, "1.1").await.whole().await;
    assert!(head.contains("\r\ntransfer-encoding: chunked\r\n"), "{head}");
    let [block] = chunks(&body)[..] else { panic!("{body}") };
    assert!(block.contains("event: goodbye\ndata: {\"reason\":\"busy\""), "{block}");
    let (head, body) = Raw::request(&world, &user, "1.0").await.whole().await;
    assert!(!head.contains("transfer-encoding"), "{head}");
    assert!(body.starts_with("retry: ") && body.ends_with("}\n\n"), "{body}");
    world.leaves_nothing(()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_follow_the_requested_interval() {
    let world = Setup::config(|config| config.delivery.heartbeat = Duration::from_mins(10)).start().await;
    let user = world.user(3);
    for (requested, granted) in [("3", 4), ("30", 30), ("61", 60), ("event", 600), ("often", 600), ("", 600)]
    {
        let mut stream = world.stream(&user).heartbeat(requested).stream().await;
        assert_eq!(stream.named("ready").await.json()["heartbeatSeconds"], granted, "{requested:?}");
    }
    let mut stream = world.stream(&user).heartbeat("4").stream().await;
    ready(&mut stream, &world.api.cursor(user.id, 3), false).await;
    for _ in 0..2 {
        assert_eq!(soon("a heartbeat", stream.block()).await, Ok(Block::Comment));
    }
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_before_ready_stand_in_its_block() {
    let world = Setup::config(|config| config.delivery.heartbeat = Duration::from_secs(1)).start().await;
    let user = world.user(3);
    world.api.fault(HEADS_PATH, Fault::Holding);
    let mut stream = world.stream(&user).stream().await;
    assert!(matches!(stream.block().await, Ok(Block::Retry(_))));
    for _ in 0..2 {
        assert_eq!(soon("a heartbeat", stream.block()).await, Ok(Block::Comment));
    }
    world.api.fault(HEADS_PATH, Fault::None);
    ready(&mut stream, &world.api.cursor(user.id, 3), false).await;
    world.say(&user, 2).await;
    receives(&mut stream, 4..=5).await;
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_ends_before_ready_is_complete() {
    let world = GatewayWorld::new().await;
    let user = world.user(3);
    world.api.fault(HEADS_PATH, Fault::Holding);
    let mut stream = world.stream(&user).stream().await;
    world.until_metric("messenger_gateway_streams", 1).await;
    world.publish(&user, json!({ "revoked": user.session }).to_string()).await;
    assert_eq!(goodbye(&mut stream, "revoked").await["reconnect"], false);
    world.api.fault(HEADS_PATH, Fault::None);
    world.leaves_nothing(stream).await;
}
