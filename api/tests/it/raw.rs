//! Requests byte by byte, for what a well-behaved client would not send.

use http::{HeaderMap, HeaderName, HeaderValue};
use testkit::{http::Answer, soon};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::App;

/// A connection to the public listener.
pub(crate) async fn connect(app: &App) -> TcpStream {
    connect_to(&app.public).await
}

pub(crate) async fn connect_to(base: &str) -> TcpStream {
    TcpStream::connect(base.strip_prefix("http://").unwrap()).await.unwrap()
}

/// Sends this body, whatever it is.
pub(crate) async fn post(app: &App, path: &str, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Answer {
    let body = body.as_ref();
    let mut head = format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    );
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    exchange(app, [head.as_bytes(), b"\r\n", body].concat()).await.expect("an answer")
}

/// Sends these bytes, and reads what comes until the other end closes. `None`: it was nothing.
pub(crate) async fn exchange(app: &App, bytes: impl AsRef<[u8]>) -> Option<Answer> {
    let mut socket = connect(app).await;
    // The other end may close before it has read everything.
    let _ = socket.write_all(bytes.as_ref()).await;
    read_to_end(&mut socket).await
}

pub(crate) async fn read_to_end(socket: &mut TcpStream) -> Option<Answer> {
    let mut bytes = Vec::new();
    let _ = soon("the connection is closed", socket.read_to_end(&mut bytes)).await;
    (!bytes.is_empty()).then(|| parse(&bytes))
}

fn parse(bytes: &[u8]) -> Answer {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("a whole head");
    let head = std::str::from_utf8(&bytes[..end]).unwrap();
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers: HeaderMap = lines
        .map(|line| line.split_once(": ").unwrap())
        .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse::<HeaderValue>().unwrap()))
        .collect();
    Answer { status, headers, body: bytes[end + 4..].to_vec().into() }
}
