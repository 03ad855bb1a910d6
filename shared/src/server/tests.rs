//! Over real sockets: the deadlines, the orderly stop, and the handoff with what comes before and behind it.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use warp::Filter;

use super::*;

/// More than the kernel buffers for one connection.
const BIG: usize = 32 << 20;
const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\n\r\n";

fn limits() -> Limits {
    let ms = Duration::from_millis;
    Limits { connections: 8, head: ms(150), idle: ms(400), write: ms(300), stop: ms(500) }
}

struct Running {
    address: SocketAddr,
    stop: CancellationToken,
    done: tokio::task::JoinHandle<()>,
}

/// `/hello` answers, `/slow` answers after a while, `/big` answers a lot, `/take` hands the socket off.
fn start() -> Running {
    let hello = warp::path!("hello").map(|| Response::new("hello".into()));
    let slow = warp::path!("slow").then(|| async {
        sleep(Duration::from_millis(250)).await;
        Response::new("slow".into())
    });
    let big = warp::path!("big").map(|| Response::new("x".repeat(BIG).into()));
    let take = warp::path!("take").map(|| -> warp::reply::Response {
        hand_off(|mut socket| {
            tokio::spawn(async move {
                socket.write_all(HEAD).await.unwrap();
                socket.write_all(b"taken").await.unwrap();
                let mut rest = Vec::new();
                socket.read_to_end(&mut rest).await.unwrap();
                socket.write_all(&rest).await.unwrap();
            });
        })
    });
    let routes = hello.or(slow).unify().or(big).unify().or(take).unify();
    let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let done = tokio::spawn(serve(listener, warp::service(routes), limits(), stop.clone()));
    Running { address, stop, done }
}

async fn send(address: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    socket
}

/// Everything until the server closes; a reset counts as the end.
async fn rest(mut socket: TcpStream) -> String {
    let mut text = Vec::new();
    let _ = socket.read_to_end(&mut text).await;
    String::from_utf8(text).unwrap()
}

#[tokio::test]
async fn an_unfinished_head_is_cut_and_a_slow_handler_is_not() {
    let server = start();
    let began = Instant::now();
    let half = rest(send(server.address, b"GET /hello HTTP/1.1\r\nHo").await);
    let silent = rest(send(server.address, b"").await);
    let (half, silent) = tokio::join!(half, silent);
    assert_eq!((half.as_str(), silent.as_str()), ("", ""));
    assert!(began.elapsed() < Duration::from_secs(5));
    let slow = rest(send(server.address, b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n").await).await;
    assert!(slow.ends_with("slow"), "{slow}");
}

#[tokio::test]
async fn a_trickled_head_gets_no_extension() {
    let server = start();
    let mut socket = send(server.address, b"GET /hello HTTP/1.1\r\n").await;
    for _ in 0..100 {
        sleep(Duration::from_millis(20)).await;
        if socket.write_all(b"a: b\r\n").await.is_err() {
            return;
        }
    }
    panic!("still open after two seconds of trickling");
}

#[tokio::test]
async fn an_idle_connection_lives_longer_than_a_head_may_take_and_then_ends() {
    let server = start();
    let mut socket = send(server.address, b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n").await;
    sleep(Duration::from_millis(250)).await;
    socket.write_all(b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let text = rest(socket).await;
    assert_eq!(text.matches("hello").count(), 2, "{text}");
}

#[tokio::test]
async fn a_peer_that_takes_nothing_is_cut() {
    let server = start();
    let socket = send(server.address, b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n").await;
    sleep(Duration::from_secs(1)).await;
    assert!(rest(socket).await.len() < BIG);
}

#[tokio::test]
async fn a_socket_is_handed_over_after_what_came_before_it() {
    let server = start();
    let pipelined = b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\nGET /hello HTTP/1.1\r\nHost: a\r\n\r\nGET /take HTTP/1.1\r\nHost: a\r\n\r\n";
    let mut socket = send(server.address, pipelined).await;
    sleep(Duration::from_millis(500)).await;
    socket.write_all(b" later").await.unwrap();
    socket.shutdown().await.unwrap();
    let text = rest(socket).await;
    let places: Vec<_> = ["slow", "hello", "taken later"].iter().map(|part| text.find(part)).collect();
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{text}");
    assert!(text.ends_with("taken later"), "{text}");
}

#[tokio::test]
async fn an_unread_big_answer_is_flushed_before_a_handoff() {
    let server = start();
    let both = b"GET /big HTTP/1.1\r\nHost: a\r\n\r\nGET /take HTTP/1.1\r\nHost: a\r\n\r\n";
    let mut socket = send(server.address, both).await;
    let mut text = Vec::new();
    while !text.ends_with(b"taken") {
        assert!(socket.read_buf(&mut text).await.unwrap() > 0, "ended after {} bytes", text.len());
    }
    assert_eq!(text.iter().filter(|byte| **byte == b'x').count(), BIG);
}

#[tokio::test]
async fn garbage_ends_one_connection_and_nothing_else() {
    let server = start();
    for garbage in [&b"\0\0\0\0\r\n\r\n"[..], b"GET\r\n\r\n", &[b'a'; 100_000], b"GET / HTTP/9.9\r\n\r\n"] {
        let text = rest(send(server.address, garbage).await).await;
        assert!(text.is_empty() || text.starts_with("HTTP/1.1 4"), "{text}");
    }
    let text =
        rest(send(server.address, b"GET /hello HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await)
            .await;
    assert!(text.ends_with("hello"), "{text}");
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_for_a_place() {
    let server = start();
    let mut idle = Vec::new();
    for _ in 0..limits().connections {
        idle.push(send(server.address, b"").await);
    }
    let text = rest(send(server.address, b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n").await).await;
    assert!(text.ends_with("hello"), "{text}");
}

#[tokio::test]
async fn a_stop_lets_a_request_finish_and_takes_no_more() {
    let server = start();
    let socket = send(server.address, b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n").await;
    sleep(Duration::from_millis(100)).await;
    server.stop.cancel();
    let text = rest(socket).await;
    assert!(text.ends_with("slow"), "{text}");
    server.done.await.unwrap();
    assert!(TcpStream::connect(server.address).await.is_err());
}
