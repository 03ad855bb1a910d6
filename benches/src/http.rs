//! The least of an HTTP/1.1 client: one connection kept open, one request at a time, no cost beyond its system calls.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::Context as _;

const PATIENCE: Duration = Duration::from_secs(30);
const MAX_HEADERS: usize = 64;

pub struct AnswerHead {
    pub status: u16,
    pub length: Option<usize>,
    pub chunked: bool,
    pub closes: bool,
}

/// The head at the start of these bytes, and its size; `None` while it is incomplete.
pub fn parse_head(bytes: &[u8]) -> anyhow::Result<Option<(AnswerHead, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut answer = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(size) = answer.parse(bytes)? else { return Ok(None) };
    let status = answer.code.context("an answer has a status")?;
    let value = |name: &str| {
        let header = answer.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(header.value).ok()
    };
    let length = value("content-length").map(str::parse).transpose().context("a length is a number")?;
    let is = |name, wanted| value(name).is_some_and(|value| value.eq_ignore_ascii_case(wanted));
    let (chunked, closes) = (is("transfer-encoding", "chunked"), is("connection", "close"));
    Ok(Some((AnswerHead { status, length, chunked, closes }, size)))
}

pub struct HttpConnection {
    socket: TcpStream,
}

pub struct PostAnswer {
    pub head: AnswerHead,
    pub body: String,
}

impl HttpConnection {
    pub fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let socket = TcpStream::connect_timeout(&address, PATIENCE)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket })
    }

    pub fn exchange(&mut self, request: &[u8]) -> anyhow::Result<PostAnswer> {
        self.socket.write_all(request)?;
        let (mut bytes, mut buffer) = (Vec::new(), [0; 4_096]);
        loop {
            if let Some((head, size)) = parse_head(&bytes)?
                && bytes.len() >= size + head.length.unwrap_or(0)
            {
                let body = String::from_utf8(bytes.split_off(size)).context("bodies are UTF-8")?;
                return Ok(PostAnswer { head, body });
            }
            let count = self.socket.read(&mut buffer).context("no answer")?;
            anyhow::ensure!(count > 0, "the connection was closed before an answer");
            bytes.extend_from_slice(&buffer[..count]);
        }
    }

    /// Whether the other end has not closed an idle connection.
    pub fn is_open(&self) -> bool {
        let looked = self.socket.set_nonblocking(true).and_then(|()| self.socket.peek(&mut [0]));
        let silent = looked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
        silent && self.socket.set_nonblocking(false).is_ok()
    }
}
