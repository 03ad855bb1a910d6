//! The least of an HTTP/1.1 client: one connection kept open, one request at a time, no cost beyond its system calls.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::Context as _;

const PATIENCE: Duration = Duration::from_secs(30);

pub struct HttpConnection {
    socket: BufReader<TcpStream>,
}

pub struct PostAnswer {
    pub status: u16,
    pub body: String,
    pub last: bool,
}

impl HttpConnection {
    pub fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let socket = TcpStream::connect_timeout(&address, PATIENCE)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket: BufReader::new(socket) })
    }

    pub fn exchange(&mut self, request: &[u8]) -> anyhow::Result<PostAnswer> {
        self.socket.get_mut().write_all(request)?;
        let status_line = self.line()?;
        let status = status_line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.with_context(|| format!("no status in {status_line:?}"))?;
        let (mut length, mut last) = (0, false);
        loop {
            let line = self.line()?;
            if line.is_empty() {
                break;
            }
            let Some((name, value)) = line.split_once(':') else { continue };
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse().context("a length is a number")?;
            } else if name.eq_ignore_ascii_case("connection") {
                last = value.trim().eq_ignore_ascii_case("close");
            }
        }
        let mut body = vec![0; length];
        self.socket.read_exact(&mut body)?;
        Ok(PostAnswer { status, body: String::from_utf8(body).context("bodies are UTF-8")?, last })
    }

    /// Whether the other end has not closed an idle connection.
    pub fn is_open(&self) -> bool {
        let socket = self.socket.get_ref();
        let looked = socket.set_nonblocking(true).and_then(|()| socket.peek(&mut [0]));
        let silent = looked.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
        silent && socket.set_nonblocking(false).is_ok()
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        let count = self.socket.read_line(&mut line).context("no answer")?;
        anyhow::ensure!(count > 0, "the connection was closed before an answer");
        line.truncate(line.trim_end().len());
        Ok(line)
    }
}
