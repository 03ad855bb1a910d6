//! The ingress over real sockets. The upstreams speak HTTP by hand, so that every byte and every end is seen.

use super::*;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(5);

async fn upstream() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

async fn dead() -> SocketAddr {
    upstream().await.1
}

async fn ingress(api: SocketAddr, gateways: Vec<SocketAddr>) -> SocketAddr {
    let listener = listen(0).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, Arc::new(Routes::new(api, gateways))));
    address
}

/// A client's request to this path, which has arrived at the upstream.
async fn arrived(path: &str) -> (TcpStream, TcpStream) {
    let (listener, there) = upstream().await;
    let address = ingress(there, vec![there]).await;
    let client = send(address, &format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")).await;
    let mut upstream = accept(&listener).await;
    read_until(&mut upstream, "\r\n\r\n").await;
    (client, upstream)
}

async fn send(to: SocketAddr, request: &str) -> TcpStream {
    let mut socket = TcpStream::connect(to).await.unwrap();
    socket.write_all(request.as_bytes()).await.unwrap();
    socket
}

async fn accept(listener: &TcpListener) -> TcpStream {
    timeout(SOON, listener.accept()).await.expect("no connection").unwrap().0
}

async fn read_until(socket: &mut TcpStream, end: &str) -> String {
    let mut read = Vec::new();
    let mut chunk = [0; 4096];
    while !String::from_utf8_lossy(&read).ends_with(end) {
        let count = timeout(SOON, socket.read(&mut chunk)).await;
        let count = count.unwrap_or_else(|_| panic!("{:?} came", String::from_utf8_lossy(&read))).unwrap();
        assert_ne!(count, 0, "ended after {:?}", String::from_utf8_lossy(&read));
        read.extend_from_slice(&chunk[..count]);
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
    assert_eq!(routes.candidates(STREAM_PATH), [one, two]);
    assert_eq!(routes.candidates(STREAM_PATH), [two, one]);
    assert_eq!(routes.candidates(STREAM_PATH), [one, two]);
    assert_eq!(Routes::new(api, vec![]).candidates(STREAM_PATH), []);
}

#[test]
fn headers_of_one_connection_are_not_passed_on() {
    let mut headers = HeaderMap::new();
    for (name, value) in
        [("connection", "close, X-Mine"), ("keep-alive", "1"), ("x-mine", "a"), ("x-other", "b")]
    {
        headers.insert(name, HeaderValue::from_static(value));
    }
    remove_hop_by_hop(&mut headers);
    assert_eq!(headers.keys().collect::<Vec<_>>(), ["x-other"]);
}

#[tokio::test]
async fn a_request_arrives_as_it_was_sent_and_says_for_whom() {
    let (api, api_address) = upstream().await;
    let address = ingress(api_address, vec![]).await;
    let mut client = send(
        address,
        "POST /api/login?a=%20b HTTP/1.1\r\nHost: localhost:3000\r\nX-Forwarded-For: 192.0.2.1\r\n\
         Origin: http://localhost:3000\r\nContent-Length: 2\r\n\r\n{}",
    )
    .await;
    let mut upstream = accept(&api).await;
    let request = read_until(&mut upstream, "{}").await;
    assert!(request.starts_with("POST /api/login?a=%20b HTTP/1.1\r\n"), "{request}");
    for line in
        ["host: localhost:3000", "x-forwarded-for: 192.0.2.1, 127.0.0.1", "origin: http://localhost:3000"]
    {
        assert!(request.contains(&format!("\r\n{line}\r\n")), "{request}");
    }
    upstream.write_all(b"HTTP/1.1 201 Created\r\nX-Mine: 1\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
    let answer = read_until(&mut client, "\r\n\r\nok").await;
    assert!(answer.starts_with("HTTP/1.1 201 Created\r\n"), "{answer}");
    assert!(answer.contains("x-mine: 1\r\n"), "{answer}");
}

#[tokio::test]
async fn each_piece_of_a_stream_passes_immediately() {
    let (mut client, mut upstream) = arrived(STREAM_PATH).await;
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
    let (api, api_address) = upstream().await;
    let address = ingress(api_address, vec![]).await;
    let size = 8 * 1024 * 1024;
    let mut client =
        send(address, &format!("POST /api/login HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\nfirst"))
            .await;
    let mut upstream = accept(&api).await;
    read_until(&mut upstream, "first").await;
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
async fn a_client_that_hangs_up_on_a_quiet_stream_closes_the_upstream() {
    let (mut client, mut upstream) = arrived(STREAM_PATH).await;
    upstream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: hi\n\n").await.unwrap();
    read_until(&mut client, ": hi\n\n\r\n").await;
    drop(client);
    sees_the_end(&mut upstream).await;
}

#[tokio::test]
async fn a_client_that_hangs_up_before_the_answer_closes_the_upstream() {
    let (client, mut upstream) = arrived("/api/auth_user").await;
    drop(client);
    sees_the_end(&mut upstream).await;
}

#[tokio::test]
async fn an_upstream_that_breaks_off_breaks_off_the_answer() {
    let (mut client, mut upstream) = arrived("/api/auth_user").await;
    upstream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf").await.unwrap();
    read_until(&mut client, "half").await;
    drop(upstream);
    sees_the_end(&mut client).await;
}

#[tokio::test]
async fn a_dead_gateway_is_skipped_every_time() {
    let (gateway, gateway_address) = upstream().await;
    let address = ingress(dead().await, vec![dead().await, gateway_address]).await;
    for _ in 0..4 {
        let mut client = send(address, "GET /api/messages HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let mut upstream = accept(&gateway).await;
        upstream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi").await.unwrap();
        read_until(&mut client, "\r\n\r\nhi").await;
    }
}

#[tokio::test]
async fn no_upstream_is_a_502_problem() {
    let address = ingress(dead().await, vec![dead().await]).await;
    for path in ["/api/login", STREAM_PATH] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nX-Request-Id: mine-1\r\n\r\n");
        let mut client = send(address, &request).await;
        let answer = read_until(&mut client, "}").await;
        assert!(answer.starts_with("HTTP/1.1 502 Bad Gateway\r\n"), "{answer}");
        assert!(answer.contains("content-type: application/problem+json\r\n"), "{answer}");
        assert!(answer.contains("x-request-id: mine-1\r\n"), "{answer}");
        assert!(
            answer.contains(r#""code":"bad_gateway""#) && answer.contains(r#""requestId":"mine-1""#),
            "{answer}"
        );
    }
}

#[tokio::test]
async fn a_connection_serves_one_request_after_another() {
    let (api, api_address) = upstream().await;
    let address = ingress(api_address, vec![]).await;
    let mut client = TcpStream::connect(address).await.unwrap();
    for _ in 0..3 {
        client.write_all(b"GET /api/auth_user HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let mut upstream = accept(&api).await;
        upstream
            .write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi")
            .await
            .unwrap();
        read_until(&mut client, "\r\n\r\nhi").await;
    }
}
