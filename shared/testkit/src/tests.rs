//! The test tools themselves.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::{
    proxy::Proxy,
    servers::{Postgres, Redis},
    soon,
    sse::{Block, End, EventSource, ReconnectBy, StreamRequest},
};

/// Answers each connection with the next of these texts and closes; sends the requests to the receiver.
async fn canned(answers: Vec<&'static str>) -> (SocketAddr, tokio::sync::mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, received) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        for answer in answers {
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(socket.read_u8().await.unwrap());
            }
            sender.send(String::from_utf8(request).unwrap()).await.unwrap();
            socket.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    (address, received)
}

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";

fn whole(body: &str) -> &'static str {
    format!("{HEAD}{body}").leak()
}

fn opening(address: SocketAddr) -> StreamRequest {
    StreamRequest::new(format!("http://{address}/api/messages"))
}

#[tokio::test]
async fn a_stream_shows_its_blocks_and_how_it_ended() {
    let body = "retry: 10\n:\nevent: ready\ndata: {}\nid: a-1\n\ndata: \"x: y\"\n\ndata: \"cut\"\nid: a-2";
    let (address, _requests) = canned(vec![whole(body)]).await;
    let mut stream = opening(address).stream().await;
    assert_eq!(stream.block().await, Ok(Block::Retry(Duration::from_millis(10))));
    assert_eq!(stream.block().await, Ok(Block::Comment));
    let ready = stream.named("ready").await;
    assert_eq!(ready.id.as_deref(), Some("a-1"));
    let message = stream.next().await;
    assert_eq!((message.id, message.name, message.data.as_str()), (None, None, "\"x: y\""));
    assert_eq!(stream.event().await, Err(End::Broken), "a block without its blank line is lost");
    assert_eq!(stream.last_id.as_deref(), Some("a-1"));
}

#[tokio::test]
async fn a_body_in_chunks_has_a_clean_end_only_by_its_last_chunk() {
    let chunks = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n";
    let (address, _requests) = canned(vec![chunks, format!("{chunks}0\r\n\r\n").leak()]).await;
    for end in [End::Broken, End::Clean] {
        let mut stream = opening(address).stream().await;
        assert_eq!(stream.next().await.data, "1");
        assert_eq!(stream.event().await, Err(end));
    }
}

#[tokio::test]
async fn event_source_resumes_by_id_and_gives_up_on_other_status() {
    let first = whole("retry: 10\ndata: 1\nid: a-1\n\n");
    let second = whole("data: 2\nid: a-2\n\n");
    let (address, mut received) =
        canned(vec![first, second, "HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n"]).await;
    let browser = EventSource::open(vec![opening(address)], ReconnectBy::Alternately, Duration::from_secs(1));
    browser.until("it gives up", |record| record.given_up == Some(401)).await;
    let requests =
        [received.recv().await.unwrap(), received.recv().await.unwrap(), received.recv().await.unwrap()];
    assert!(requests[0].starts_with("GET /api/messages HTTP/1.1") && !requests[0].contains("last-event-id"));
    assert!(!requests[1].contains("last-event-id"), "{}", requests[1]);
    assert!(requests[2].contains("last-event-id: a-2\r\n"), "{}", requests[2]);
    // The query of the last one is stale, as in a browser.
    for request in &requests[1..] {
        assert!(request.starts_with("GET /api/messages?lastEventId=a-1 "), "{request}");
    }
    assert_eq!(browser.record().ledger().count(), 2);
    assert_eq!(browser.record().opened, 2);
}

async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut from, mut to) = socket.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    address
}

async fn say(socket: &mut TcpStream, text: &[u8]) -> std::io::Result<Vec<u8>> {
    socket.write_all(text).await?;
    let mut back = vec![0; text.len()];
    socket.read_exact(&mut back).await?;
    Ok(back)
}

#[tokio::test]
async fn the_proxy_has_every_fault_it_claims() {
    let proxy = Proxy::start(echo().await).await;
    let connect = || TcpStream::connect(proxy.address());
    let mut socket = connect().await.unwrap();
    assert_eq!(say(&mut socket, b"hello").await.unwrap(), b"hello");

    proxy.silence();
    let mut late = connect().await.unwrap();
    let short = Duration::from_millis(200);
    assert!(tokio::time::timeout(short, say(&mut socket, b"lost?")).await.is_err(), "open and silent");
    assert!(tokio::time::timeout(short, say(&mut late, b"x")).await.is_err(), "silent from the start");
    proxy.resume();
    let mut back = [0; 5];
    soon("what was swallowed comes late", socket.read_exact(&mut back)).await.unwrap();
    assert_eq!(&back, b"lost?");

    proxy.slow(short);
    let mut answer = Box::pin(say(&mut socket, b"slow"));
    assert!(tokio::time::timeout(short / 2, &mut answer).await.is_err(), "each piece is delayed");
    assert_eq!(answer.await.unwrap(), b"slow");

    proxy.resume();
    proxy.cut();
    assert!(say(&mut socket, b"hello").await.is_err());

    proxy.cut_after(3);
    let mut socket = connect().await.unwrap();
    socket.write_all(b"hello").await.unwrap();
    let mut got = Vec::new();
    let _ = soon("it is cut", socket.read_to_end(&mut got)).await;
    assert!(b"hel".starts_with(got.as_slice()), "{got:?}");

    proxy.resume();
    let mut socket = connect().await.unwrap();
    proxy.cut_behind("cut");
    assert_eq!(say(&mut socket, b"this is not c").await.unwrap(), b"this is not c");
    assert!(say(&mut socket, b"ut off").await.is_err());

    proxy.refuse();
    crate::until("the port is closed", || async { connect().await.is_err() }).await;
    proxy.resume();
    crate::until("the port is open again", || async { connect().await.is_ok() }).await;
    let mut socket = connect().await.unwrap();
    assert_eq!(say(&mut socket, b"hello").await.unwrap(), b"hello");
}

#[test]
fn a_killed_redis_comes_back_empty() {
    let mut redis = Redis::start();
    assert_eq!(redis.command(&["SET", "a", "b"]).unwrap(), "+OK");
    redis.kill();
    assert!(redis.command(&["PING"]).is_err());
    redis.restart();
    assert_eq!(redis.command(&["EXISTS", "a"]).unwrap(), ":0");
    redis.freeze();
    assert!(redis.command(&["PING"]).is_err());
    redis.thaw();
    assert_eq!(redis.command(&["PING"]).unwrap(), "+PONG");
}

#[test]
fn a_killed_postgres_comes_back() {
    let mut postgres = Postgres::start();
    postgres.kill();
    assert!(std::net::TcpStream::connect(postgres.address()).is_err());
    postgres.restart();
    assert!(std::net::TcpStream::connect(postgres.address()).is_ok());
}
