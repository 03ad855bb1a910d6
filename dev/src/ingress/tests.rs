//! The ingress over real sockets. The upstreams speak HTTP by hand, so that every byte and every end is seen.

use super::*;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(5);
const STREAM: &str = "GET /api/messages HTTP/1.1\r\nHost: a\r\n\r\n";
const OTHER: &str = "GET /api/auth_user HTTP/1.1\r\nHost: a\r\n\r\n";

async fn upstream() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

async fn dead() -> SocketAddr {
    upstream().await.1
}

/// A client of an ingress before these upstreams, which has sent this.
async fn client(api: SocketAddr, gateways: Vec<SocketAddr>, request: &str) -> TcpStream {
    let listener = listen(0).await.unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    tokio::spawn(serve(listener, Arc::new(Routes::new(api, gateways))));
    client.write_all(request.as_bytes()).await.unwrap();
    client
}

/// The same, and the upstream at which the request has arrived up to `end`; and what arrived.
async fn arrived(request: &str, end: &str) -> (TcpStream, TcpStream, String) {
    let (listener, there) = upstream().await;
    let client = client(there, vec![there], request).await;
    let mut upstream = accept(&listener).await;
    let request = read_until(&mut upstream, end).await;
    (client, upstream, request)
}

async fn accept(listener: &TcpListener) -> TcpStream {
    timeout(SOON, listener.accept()).await.expect("no connection").unwrap().0
}

async fn read_until(socket: &mut TcpStream, end: &str) -> String {
    let mut read = Vec::new();
    while !read.ends_with(end.as_bytes()) {
        let count = timeout(SOON, socket.read_buf(&mut read)).await;
        let text = String::from_utf8_lossy(&read);
        assert_ne!(count.unwrap_or_else(|_| panic!("{text:?} came")).unwrap(), 0, "ended after {text:?}");
    }
    String::from_utf8(read).unwrap()
}

async fn sees_the_end(socket: &mut TcpStream) {
    let mut rest = Vec::new();
    let _ = timeout(SOON, socket.read_to_end(&mut rest)).await.expect("the connection stays open");
}

#[test]
fn only_the_exact_path_goes_to_gateways_and_in_turn() {
    let [api, one, two] = [1, 2, 3].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let routes = Routes::new(api, vec![one, two]);
    for path in
        ["/", "/api", "/api/messages/", "/api/messages/1", "/api/Messages", "/api/conversations/1/messages"]
    {
        assert_eq!(routes.candidates(path), [api], "{path}");
    }
    for turn in [[one, two], [two, one], [one, two]] {
        assert_eq!(routes.candidates(STREAM_PATH), turn);
    }
    assert_eq!(Routes::new(api, vec![]).candidates(STREAM_PATH), []);
}

#[tokio::test]
async fn a_request_arrives_as_it_was_sent_and_says_for_whom() {
    let (mut client, mut upstream, request) = arrived(
        "POST /api/login?a=%20b HTTP/1.1\r\nHost: localhost:3000\r\nX-Forwarded-For: 192.0.2.1\r\n\
         Connection: keep-alive, X-Mine\r\nKeep-Alive: 1\r\nX-Mine: a\r\n\
         Origin: http://localhost:3000\r\nContent-Length: 2\r\n\r\n{}",
        "{}",
    )
    .await;
    assert!(request.starts_with("POST /api/login?a=%20b HTTP/1.1\r\n"), "{request}");
    for line in
        ["host: localhost:3000", "x-forwarded-for: 192.0.2.1, 127.0.0.1", "origin: http://localhost:3000"]
    {
        assert!(request.contains(&format!("\r\n{line}\r\n")), "{request}");
    }
    let of_one_connection = ["connection: ", "keep-alive: ", "x-mine: "];
    assert!(!of_one_connection.iter().any(|header| request.contains(header)), "{request}");
    upstream.write_all(b"HTTP/1.1 201 Created\r\nX-Mine: 1\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
    let answer = read_until(&mut client, "\r\n\r\nok").await;
    assert!(answer.starts_with("HTTP/1.1 201 Created\r\n") && answer.contains("x-mine: 1\r\n"), "{answer}");
}

#[tokio::test]
async fn each_piece_of_a_stream_passes_immediately() {
    let (mut client, mut upstream, _) = arrived(STREAM, "\r\n\r\n").await;
    // Without a length, the end of the connection is the end of the body.
    upstream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n").await.unwrap();
    let head = read_until(&mut client, "\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    for piece in ["retry: 2000\n\n", "data: {}\n\n"] {
        // The next piece is sent only after this one has arrived.
        upstream.write_all(piece.as_bytes()).await.unwrap();
        read_until(&mut client, &format!("{piece}\r\n")).await;
    }
    drop(upstream);
    read_until(&mut client, "0\r\n\r\n").await;
}

#[tokio::test]
async fn an_upload_passes_while_it_is_being_sent_and_is_not_measured() {
    let size = 8 * 1024 * 1024;
    let head = format!("POST /api/login HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\nfirst");
    let (mut client, mut upstream, _) = arrived(&head, "first").await;
    let sending = tokio::spawn(async move {
        client.write_all(&vec![b'x'; size - 5]).await.unwrap();
        client
    });
    let mut body = vec![0; size - 5];
    timeout(SOON, upstream.read_exact(&mut body)).await.unwrap().unwrap();
    upstream.write_all(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    let answer = read_until(&mut sending.await.unwrap(), "\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

#[tokio::test]
async fn a_client_that_hangs_up_closes_the_upstream() {
    let (client, mut upstream, _) = arrived(OTHER, "\r\n\r\n").await;
    drop(client);
    sees_the_end(&mut upstream).await;
    let (mut client, mut upstream, _) = arrived(STREAM, "\r\n\r\n").await;
    upstream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: hi\n\n").await.unwrap();
    read_until(&mut client, ": hi\n\n\r\n").await;
    drop(client);
    sees_the_end(&mut upstream).await;
}

#[tokio::test]
async fn an_upstream_that_breaks_off_breaks_off_the_answer() {
    let (mut client, mut upstream, _) = arrived(OTHER, "\r\n\r\n").await;
    upstream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf").await.unwrap();
    read_until(&mut client, "half").await;
    drop(upstream);
    sees_the_end(&mut client).await;
}

#[tokio::test]
async fn a_connection_serves_many_requests_and_skips_a_dead_gateway() {
    let (gateway, address) = upstream().await;
    let mut client = client(dead().await, vec![dead().await, address], STREAM).await;
    for _ in 0..4 {
        let mut upstream = accept(&gateway).await;
        let answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi";
        upstream.write_all(answer).await.unwrap();
        read_until(&mut client, "\r\n\r\nhi").await;
        client.write_all(STREAM.as_bytes()).await.unwrap();
    }
}

#[tokio::test]
async fn no_upstream_is_a_502_problem() {
    for path in ["/api/login", STREAM_PATH] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nX-Request-Id: mine-1\r\n\r\n");
        let mut client = client(dead().await, vec![dead().await], &request).await;
        let answer = read_until(&mut client, "}").await;
        assert!(answer.starts_with("HTTP/1.1 502 Bad Gateway\r\n"), "{answer}");
        for part in [
            "content-type: application/problem+json\r\n",
            "x-request-id: mine-1\r\n",
            r#""code":"bad_gateway""#,
            r#""requestId":"mine-1""#,
        ] {
            assert!(answer.contains(part), "{answer}");
        }
    }
}
