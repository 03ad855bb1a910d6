//! Over real sockets: deadlines, bounds, the graceful stop, what is common to every request and answer, and the handoff.

use std::{
    io::{Read, Write},
    sync::atomic::{AtomicUsize, Ordering},
};

use prometheus_client::registry::Registry;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Notify,
};
use warp::Filter;

use super::*;
use testkit::{soon, until};

/// More than the kernel buffers for one connection.
const BIG: usize = 32 << 20;
const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\n\r\n";

fn limits() -> Limits {
    let ms = Duration::from_millis;
    Limits {
        connections: 8,
        head: ms(150),
        idle: ms(400),
        write: ms(300),
        stop: ms(500),
        ..Limits::default()
    }
}

/// A limit that no test reaches.
const NEVER: Duration = Duration::from_secs(3_600);

struct Running {
    address: SocketAddr,
    stop: CancellationToken,
    done: tokio::task::JoinHandle<()>,
    /// A handler that reads no body was called.
    asked: Arc<Notify>,
    /// `/slow` was called; it answers once it is released.
    slow: Arc<Notify>,
    release: Arc<Notify>,
    /// Requests of `/busy` in service: now, and at most.
    busy: Arc<[AtomicUsize; 2]>,
    registry: Registry,
}

impl Running {
    /// A metric of this listener, by the rest of its name and labels, as written.
    fn metric(&self, name: &str) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        let mut values = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        values.next().map_or(0, |value| value.parse().unwrap())
    }

    fn closed(&self, reason: &str) -> u64 {
        self.metric(&format!(r#"http_connections_closed_total{{listener="test",reason="{reason}"}}"#))
    }

    async fn until_closed(&self, reason: &str) {
        until(reason, || async { self.closed(reason) > 0 }).await;
    }

    /// Returns when `limits.head` has passed since the call: a head that began after it has timed out.
    async fn head_limit_passes(&self) {
        let partial = send(self.address, b"GET /hello HTTP/1.1\r\nHo").await;
        assert_eq!(soon("the head limit", rest(partial)).await, "");
    }
}

fn start() -> Running {
    start_with(limits())
}

/// `/hello` answers, `/slow` answers when it is released, `/big` answers a lot, `/read` answers with the length of the body, `/panic`
/// panics, `/take` hands the socket off.
fn start_with(limits: Limits) -> Running {
    let asked = Arc::new(Notify::new());
    let asking = asked.clone();
    let hello = warp::path!("hello").map(move || {
        asking.notify_one();
        Response::new("hello".into())
    });
    let (slow_called, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (calling, released) = (slow_called.clone(), release.clone());
    let slow = warp::path!("slow").then(move || {
        let (calling, released) = (calling.clone(), released.clone());
        async move {
            calling.notify_one();
            released.notified().await;
            Response::new("slow".into())
        }
    });
    let big = warp::path!("big").map(|| Response::new("#".repeat(BIG).into()));
    let read = warp::path!("read")
        .and(warp::body::bytes())
        .map(|body: bytes::Bytes| Response::new(format!("read {}", body.len()).into()));
    let panic = warp::path!("panic").map(|| -> warp::reply::Response { panic!("a handler's own fault") });
    let take = warp::path!("take").map(|| -> warp::reply::Response {
        hand_off(|socket| {
            let mut socket = TcpStream::from_std(socket).unwrap();
            tokio::spawn(async move {
                socket.write_all(HEAD).await.unwrap();
                socket.write_all(b"taken").await.unwrap();
                let mut rest = Vec::new();
                socket.read_to_end(&mut rest).await.unwrap();
                socket.write_all(&rest).await.unwrap();
            });
        })
    });
    let busy = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
    let served = busy.clone();
    let busy_route = warp::path!("busy").then(move || {
        let served = served.clone();
        async move {
            let [now, most] = &*served;
            most.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
            // As long as something that is done for many requests together.
            yield_now().await;
            now.fetch_sub(1, Ordering::Relaxed);
            Response::new("busy".into())
        }
    });
    let hello = hello.or(busy_route).unify();
    let routes = hello.or(slow).unify().or(big).unify().or(read).unify().or(panic).unify().or(take).unify();
    let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let mut registry = Registry::default();
    let metrics = ServerMetrics::register(&mut registry).listener("test");
    let done = tokio::spawn(serve(listener, warp::service(routes), limits, metrics, stop.clone()));
    Running { address, stop, done, asked, slow: slow_called, release, busy, registry }
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
async fn an_unfinished_head_times_out_and_a_slow_handler_does_not() {
    let server = start();
    let slow = send(server.address, b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n").await;
    soon("the slow handler", server.slow.notified()).await;
    let half = rest(send(server.address, b"GET /hello HTTP/1.1\r\nHo").await);
    let silent = rest(send(server.address, b"").await);
    let (half, silent) = soon("both time out", async { tokio::join!(half, silent) }).await;
    assert_eq!((half.as_str(), silent.as_str()), ("", ""));
    server.release.notify_one();
    let slow = soon("the slow answer", rest(slow)).await;
    assert!(slow.ends_with("slow"), "{slow}");
}

#[tokio::test]
async fn a_trickled_head_gets_no_extension() {
    let server = start();
    let socket = send(server.address, b"GET /hello HTTP/1.1\r\n").await;
    until("the trickled head times out", || async {
        let _ = socket.try_write(b"a: b\r\n");
        server.closed("slow_head") > 0
    })
    .await;
}

#[tokio::test]
async fn an_idle_connection_is_not_closed_by_the_head_limit() {
    let server = start_with(Limits { idle: NEVER, ..limits() });
    let mut socket = send(server.address, HELLO).await;
    assert_eq!(answer(&mut socket).await.1, "hello");
    server.head_limit_passes().await;
    socket.write_all(HELLO).await.unwrap();
    assert_eq!(answer(&mut socket).await.1, "hello");
}

#[tokio::test]
async fn a_peer_that_accepts_no_bytes_is_disconnected() {
    let server = start();
    let socket = send(server.address, b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n").await;
    server.until_closed("slow_reader").await;
    assert!(rest(socket).await.len() < BIG);
}

#[tokio::test]
async fn a_socket_is_handed_off_after_earlier_answers() {
    let server = start();
    server.release.notify_one();
    let pipelined = b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\nGET /hello HTTP/1.1\r\nHost: a\r\n\r\nGET /take HTTP/1.1\r\nHost: a\r\n\r\n";
    let mut socket = send(server.address, pipelined).await;
    let mut text = Vec::new();
    while !text.ends_with(b"taken") {
        assert!(soon("the handoff", socket.read_buf(&mut text)).await.unwrap() > 0);
    }
    socket.write_all(b" later").await.unwrap();
    socket.shutdown().await.unwrap();
    let text = String::from_utf8(text).unwrap() + &rest(socket).await;
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
    assert_eq!(text.split(|byte| *byte == b'#').count(), BIG + 1);
}

#[tokio::test]
async fn garbage_ends_one_connection_and_nothing_else() {
    let server = start();
    for garbage in [&b"\0\0\0\0\r\n\r\n"[..], b"GET\r\n\r\n", &vec![b'a'; 100_000], b"GET / HTTP/9.9\r\n\r\n"]
    {
        let text = rest(send(server.address, garbage).await).await;
        assert!(text.is_empty() || text.starts_with("HTTP/1.1 4"), "{text}");
    }
    let text =
        rest(send(server.address, b"GET /hello HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await)
            .await;
    assert!(text.ends_with("hello"), "{text}");
}

#[tokio::test]
async fn connections_beyond_the_limit_wait() {
    let server = start();
    let mut idle = Vec::new();
    for _ in 0..limits().connections {
        idle.push(send(server.address, b"").await);
    }
    let text = rest(send(server.address, b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n").await).await;
    assert!(text.ends_with("hello"), "{text}");
}

#[tokio::test]
async fn a_stop_lets_a_request_finish_and_accepts_no_more() {
    let server = start_with(Limits { stop: NEVER, ..limits() });
    let socket = send(server.address, b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n").await;
    soon("the slow handler", server.slow.notified()).await;
    server.stop.cancel();
    server.release.notify_one();
    let text = rest(socket).await;
    assert!(text.ends_with("slow"), "{text}");
    server.done.await.unwrap();
    assert!(TcpStream::connect(server.address).await.is_err());
}

/// The next whole answer on this connection: its head and a body of the length that it names.
async fn answer(socket: &mut TcpStream) -> (String, String) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon("an answer", socket.read_u8()).await.expect("a whole head"));
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let length = head
        .split("content-length: ")
        .nth(1)
        .map_or(0, |rest| rest.split("\r\n").next().unwrap().parse().unwrap());
    let mut body = vec![0; length];
    soon("the body", socket.read_exact(&mut body)).await.unwrap();
    (head, String::from_utf8(body).unwrap())
}

const HELLO: &[u8] = b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n";

#[tokio::test]
async fn a_pipelined_partial_head_has_the_head_limit() {
    let whole: [&[u8]; 4] = [
        HELLO,
        b"POST /read HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody",
        b"POST /read HTTP/1.1\r\nHost: a\r\nContent-Length: 40\r\n\r\n0123456789012345678901234567890123456789",
        b"POST /read HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    ];
    for request in whole {
        let name = String::from_utf8_lossy(request);
        let halves = start_with(Limits { head: Duration::from_millis(500), idle: NEVER, ..limits() });
        for half in [&b"G"[..], b"GET /hello HTTP/1.1\r\nHost: a\r\n"] {
            let text = soon(&name, rest(send(halves.address, &[request, half].concat()).await)).await;
            assert_eq!(text.matches("HTTP/1.1 200").count(), 1, "{text}");
        }
        assert_eq!((halves.closed("slow_head"), halves.closed("idle")), (2, 0), "{name}");
        // Nothing followed, or only whole requests: the connection is idle.
        let wholes = start_with(Limits { head: NEVER, idle: Duration::from_millis(50), ..limits() });
        for more in [&b""[..], request, HELLO] {
            let text = soon(&name, rest(send(wholes.address, &[request, more].concat()).await)).await;
            assert_eq!(text.matches("HTTP/1.1 200").count(), 2 - usize::from(more.is_empty()), "{text}");
        }
        assert_eq!((wholes.closed("slow_head"), wholes.closed("idle")), (0, 3), "{name}");
    }
}

#[tokio::test]
async fn a_partial_head_that_arrives_while_serving_has_the_head_limit() {
    let server = start_with(Limits { head: Duration::from_millis(500), idle: NEVER, ..limits() });
    let mut socket =
        send(server.address, b"POST /hello HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n").await;
    soon("the handler", server.asked.notified()).await;
    socket.write_all(b"bodyGET /hel").await.unwrap();
    let text = soon("the end", rest(socket)).await;
    assert!(text.ends_with("hello") && !text.contains("connection: close"), "{text}");
    assert_eq!(server.closed("slow_head"), 1);
}

#[tokio::test]
async fn a_head_limit_begins_after_the_previous_answer() {
    let server =
        start_with(Limits { head: Duration::from_millis(500), write: NEVER, idle: NEVER, ..limits() });
    let mut socket = send(server.address, b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let mut text = vec![0; 1_000];
    socket.read_exact(&mut text).await.unwrap();
    // It waits in a buffer while the answer is blocked for longer than the head limit.
    socket.write_all(HELLO).await.unwrap();
    server.head_limit_passes().await;
    while !text.ends_with(b"hello") {
        assert!(
            soon("the answers", socket.read_buf(&mut text)).await.unwrap() > 0,
            "ended after {}",
            text.len()
        );
    }
}

#[tokio::test]
async fn an_unwanted_body_is_read_and_the_connection_stays() {
    let server = start_with(Limits { idle: NEVER, ..limits() });
    let bodies: [(&str, &[u8]); 3] = [
        ("Content-Length: 4", b"body"),
        ("Content-Length: 300000", &vec![b'x'; 300_000]),
        ("Transfer-Encoding: chunked", b"4\r\nbody\r\n0\r\n\r\n"),
    ];
    for (framing, body) in bodies {
        let head = format!("POST /hello HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n");
        let mut socket = send(server.address, head.as_bytes()).await;
        // In a packet of its own, when the answer is known already.
        soon("the handler", server.asked.notified()).await;
        socket.write_all(body).await.unwrap();
        let (head, said) = answer(&mut socket).await;
        assert!(head.starts_with("http/1.1 200") && !head.contains("connection: close"), "{framing}: {head}");
        assert_eq!(said, "hello");
        socket.write_all(HELLO).await.unwrap();
        assert_eq!(answer(&mut socket).await.1, "hello", "{framing}");
        soon("the handler", server.asked.notified()).await;
    }
}

#[tokio::test]
async fn an_answer_before_the_end_of_the_body_closes() {
    let server = start_with(Limits { idle: NEVER, ..limits() });
    let bodies = [
        "Content-Length: 9000000\r\n\r\n",
        "Content-Length: 4\r\n\r\nbo",
        "Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n",
        "Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        // With 100 Continue, the client would send an unwanted body.
        "Expect: 100-continue\r\nContent-Length: 4\r\n\r\n",
    ];
    for body in bodies {
        let request = format!("POST /hello HTTP/1.1\r\nHost: a\r\n{body}");
        let mut socket = send(server.address, request.as_bytes()).await;
        let (head, said) = answer(&mut socket).await;
        assert!(head.starts_with("http/1.1 200") && head.contains("connection: close"), "{body:?}: {head}");
        assert_eq!((said.as_str(), soon("the end", rest(socket)).await.as_str()), ("hello", ""), "{body:?}");
    }
}

#[tokio::test]
async fn a_client_that_expects_continue_gets_it() {
    let server = start();
    let head = b"POST /read HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n";
    let mut socket = send(server.address, head).await;
    assert!(answer(&mut socket).await.0.starts_with("http/1.1 100"));
    socket.write_all(b"body").await.unwrap();
    let (head, said) = answer(&mut socket).await;
    assert!(said == "read 4" && !head.contains("connection: close"), "{head}{said}");
}

#[tokio::test]
async fn malformed_heads_are_rejected_and_the_connection_stays() {
    let server = start();
    for (request, code) in [
        ("GET foo HTTP/1.1\r\nHost: a\r\n\r\n", "bad_target"),
        ("GET h:1 HTTP/1.1\r\nHost: a\r\n\r\n", "bad_target"),
        ("CONNECT h:80 HTTP/1.1\r\nHost: a\r\n\r\n", "bad_target"),
        ("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "bad_target"),
        ("GET /hello HTTP/1.1\r\n\r\n", "bad_host"),
        ("GET /hello HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", "bad_host"),
        ("POST /hello HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody", "bad_host"),
    ] {
        let mut socket = send(server.address, request.as_bytes()).await;
        let (head, body) = answer(&mut socket).await;
        assert!(
            head.starts_with("http/1.1 400") && head.contains("application/problem+json"),
            "{request}: {head}"
        );
        let problem: Problem = serde_json::from_str(&body).unwrap();
        assert_eq!((problem.status, problem.code.as_str()), (400, code), "{request}");
        assert!(head.contains(&format!("x-request-id: {}\r\n", problem.request_id)), "{head}");
        socket.write_all(HELLO).await.unwrap();
        assert_eq!(answer(&mut socket).await.1, "hello", "{request}");
    }
    assert_eq!(server.metric(r#"http_malformed_requests_total{listener="test",reason="host"}"#), 3);
    assert_eq!(server.metric(r#"http_malformed_requests_total{listener="test",reason="target"}"#), 4);
    let old = rest(send(server.address, b"GET /hello HTTP/1.0\r\n\r\n").await).await;
    assert!(old.ends_with("hello"), "{old}");
}

#[tokio::test]
async fn a_handler_that_panics_is_answered_500_and_counted() {
    let server = start();
    let mut socket =
        send(server.address, b"GET /panic HTTP/1.1\r\nHost: a\r\nX-Request-Id: here\r\n\r\n").await;
    let (head, body) = answer(&mut socket).await;
    let problem: Problem = serde_json::from_str(&body).unwrap();
    assert_eq!(
        (problem.status, problem.code.as_str(), problem.request_id.as_str()),
        (500, "internal", "here")
    );
    assert!(head.contains("x-request-id: here") && !body.contains("fault"), "{head}{body}");
    assert_eq!(server.metric(r#"http_handler_panics_total{listener="test"}"#), 1);
    socket.write_all(HELLO).await.unwrap();
    assert_eq!(answer(&mut socket).await.1, "hello");
}

#[tokio::test]
async fn a_full_listener_closes_its_longest_idle_connection() {
    let server = start_with(Limits { connections: 2, idle: NEVER, head: NEVER, ..limits() });
    let mut idle = Vec::new();
    for _ in 0..2 {
        let mut socket = send(server.address, HELLO).await;
        answer(&mut socket).await;
        idle.push(socket);
    }
    let mut new = send(server.address, HELLO).await;
    assert_eq!(answer(&mut new).await.1, "hello");
    let [first, mut second] = idle.try_into().unwrap();
    assert_eq!(soon("the longest idle one ends", rest(first)).await, "");
    server.until_closed("made_room").await;
    second.write_all(HELLO).await.unwrap();
    assert_eq!(answer(&mut second).await.1, "hello");
}

#[tokio::test]
async fn a_full_listener_closes_the_next_connection_that_idles() {
    let server = start_with(Limits { connections: 1, idle: NEVER, head: NEVER, ..limits() });
    let mut busy = send(server.address, b"POST /read HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n").await;
    let mut waiting = send(server.address, HELLO).await;
    busy.write_all(b"x").await.unwrap();
    assert_eq!(answer(&mut busy).await.1, "read 1");
    assert_eq!(answer(&mut waiting).await.1, "hello");
}

#[tokio::test]
async fn an_address_over_its_limit_is_closed_and_a_proxy_is_not() {
    let bounded = Limits { per_address: 2, head: NEVER, idle: NEVER, ..limits() };
    let server = start_with(bounded.clone());
    let mut held = Vec::new();
    for _ in 0..2 {
        held.push(send(server.address, b"GET /hello HTTP/1.1\r\n").await);
    }
    let over = send(server.address, b"").await;
    assert_eq!(soon("the end", rest(over)).await, "");
    server.until_closed("address_limit").await;
    held[0].write_all(b"Host: a\r\n\r\n").await.unwrap();
    assert_eq!(answer(&mut held[0]).await.1, "hello");
    // Its own idle connection makes room.
    let mut new = send(server.address, HELLO).await;
    assert_eq!(answer(&mut new).await.1, "hello");

    let server = start_with(Limits { proxies: "127.0.0.0/8".parse().unwrap(), ..bounded });
    let mut held = Vec::new();
    for _ in 0..5 {
        held.push(send(server.address, b"GET /hello HTTP/1.1\r\n").await);
    }
    let mut new = send(server.address, HELLO).await;
    assert_eq!(answer(&mut new).await.1, "hello");
}

/// Each in service has buffers, which the process would keep.
#[tokio::test]
async fn a_storm_of_connections_is_served_in_small_groups() {
    let server = start_with(Limits { connections: 1_000, ..limits() });
    // Before the server runs.
    let connect = |_| {
        let mut socket = net::TcpStream::connect(server.address).unwrap();
        socket.write_all(b"GET /busy HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
        socket
    };
    let sockets: Vec<_> = (0..300).map(connect).collect();
    let answers = tokio::task::spawn_blocking(move || {
        let answer = |mut socket: net::TcpStream| {
            let mut text = String::new();
            socket.read_to_string(&mut text).map(|_| text.ends_with("busy")).unwrap()
        };
        sockets.into_iter().map(answer).filter(|whole| *whole).count()
    });
    assert_eq!(answers.await.unwrap(), 300);
    let most = server.busy[1].load(Ordering::Relaxed);
    assert!(most <= 2 * ACCEPTED_IN_A_ROW, "{most}");
}

#[tokio::test]
async fn a_client_may_close_its_side_if_the_listener_allows_it() {
    for half_close in [true, false] {
        let server = start_with(Limits { half_close, ..limits() });
        let mut socket = send(server.address, b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n").await;
        soon("the handler runs", server.slow.notified()).await;
        socket.shutdown().await.unwrap();
        // Without `half_close` the handler need not end: the connection does.
        if half_close {
            // Time for the server to see the end; with less the test only proves less.
            sleep(Duration::from_millis(50)).await;
            server.release.notify_one();
        }
        let answer = soon("an end", rest(socket)).await;
        assert_eq!(answer.ends_with("slow"), half_close, "{answer:?}");
    }
}
