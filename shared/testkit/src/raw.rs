//! HTTP byte by byte, for what a well-behaved client would not send.

use std::io;

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, ToSocketAddrs},
};

use crate::{http::Answer, soon};

/// Sends this and reads until the other end closes, possibly before it has read everything.
pub async fn exchange(address: impl ToSocketAddrs, bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let mut socket = TcpStream::connect(address).await.expect("the port is open");
    let (mut from, mut to) = socket.split();
    let mut answer = Vec::new();
    let sending = async {
        let _ = to.write_all(bytes.as_ref()).await;
        std::future::pending::<io::Result<usize>>().await
    };
    soon("the other end closes", async {
        tokio::select! {
            _ = sending => {}
            _ = from.read_to_end(&mut answer) => {} // A reset is an end, too.
        }
    })
    .await;
    answer
}

pub async fn read_to_end(socket: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = soon("the connection is closed", socket.read_to_end(&mut bytes)).await;
    bytes
}

pub async fn answer(socket: &mut TcpStream) -> Answer {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon("an answer", socket.read_u8()).await.expect("a whole head"));
    }
    let mut answer = parse(&head);
    let length = answer.header("content-length").map_or(0, |length| length.parse().expect("a number"));
    let mut body = vec![0; length];
    soon("the body", socket.read_exact(&mut body)).await.expect("a whole body");
    answer.body = body.into();
    answer
}

pub fn parse(bytes: &[u8]) -> Answer {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("a whole head");
    let head = std::str::from_utf8(&bytes[..end]).expect("a head is ASCII");
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).expect("a status");
    let header = |line: &str| {
        let (name, value) = line.split_once(": ")?;
        Some((name.parse::<HeaderName>().ok()?, value.parse::<HeaderValue>().ok()?))
    };
    let headers: HeaderMap = lines.map(|line| header(line).expect("a header")).collect();
    Answer { status, headers, body: bytes[end + 4..].to_vec().into() }
}
