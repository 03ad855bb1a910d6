//! Raw requests that a well-behaved client would not send.

use testkit::{http::Answer, raw};
use tokio::net::TcpStream;

use crate::support::App;

pub(crate) async fn connect(app: &App) -> TcpStream {
    connect_to(&app.public).await
}

pub(crate) async fn connect_to(base: &str) -> TcpStream {
    TcpStream::connect(address(base)).await.unwrap()
}

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

/// Sends these bytes and reads until the other end closes. `None`: nothing came.
pub(crate) async fn exchange(app: &App, bytes: impl AsRef<[u8]>) -> Option<Answer> {
    whole(&raw::exchange(address(&app.public), bytes).await)
}

pub(crate) async fn read_to_end(socket: &mut TcpStream) -> Option<Answer> {
    whole(&raw::read_to_end(socket).await)
}

fn whole(bytes: &[u8]) -> Option<Answer> {
    (!bytes.is_empty()).then(|| raw::parse(bytes))
}

fn address(base: &str) -> &str {
    base.strip_prefix("http://").unwrap()
}
