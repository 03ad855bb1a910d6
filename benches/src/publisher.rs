//! Sends events to Redis, or to another server by its own protocol, each when it is due. Commands are made before, pipelined, and
//! their answers counted, so that the source is not what is measured.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::{fd::AsRawFd, unix::fs::FileExt as _},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use mio::{Events, Interest, Poll, Token, unix::SourceFd};

use crate::{
    clock::{Micros, micros, now, sleep_until},
    http,
};

/// Bursts that wait for their time: a million events at the highest rates.
const BURSTS: usize = 100_000;
const PATIENCE: Duration = Duration::from_mins(1);
const SHORT: Duration = Duration::from_micros(50);

/// How events are published, and how that is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// `PUBLISH`, answered by the number of receivers.
    Redis,
    /// POST to nchan.
    Http,
    /// To Pushpin's PULL socket, which answers nothing.
    Zmtp,
}

/// Events that are sent together, by connection.
pub struct Burst {
    pub due: Micros,
    pub events: u64,
    pub commands: Vec<Vec<u8>>,
}

/// No more than `most` events are under way: published and not delivered.
#[derive(Debug, Clone)]
pub struct Window {
    pub most: u64,
    /// The load process writes the number of delivered events here.
    pub delivered: PathBuf,
    /// What this number is at the start.
    pub already: u64,
    /// Ends the publication early.
    pub for_at_most: Option<Duration>,
}

#[derive(Debug)]
pub struct PublishReport {
    pub events: u64,
    /// The longest delay of a publication: above zero, the source could not keep up.
    pub latest: Micros,
    /// Receivers at Redis, over all events.
    pub heard: u64,
    /// To be kept until all events have arrived: `ZeroMQ` drops what it has not read when the other end closes.
    pub connections: Vec<TcpStream>,
}

pub struct Publisher {
    bursts: SyncSender<Burst>,
    thread: thread::JoinHandle<anyhow::Result<PublishReport>>,
}

#[derive(Default)]
struct Answered {
    events: AtomicU64,
    heard: AtomicU64,
    over: AtomicBool,
}

impl Publisher {
    /// With this many connections; due times are relative to `since`.
    pub fn start(
        wire: Wire,
        server: SocketAddr,
        connections: usize,
        since: Micros,
        window: Option<Window>,
    ) -> anyhow::Result<Self> {
        let sockets = (0..connections).map(|_| connect(wire, server)).collect::<io::Result<Vec<_>>>()?;
        let (sender, bursts) = sync_channel(BURSTS);
        let thread = thread::spawn(move || publish(wire, sockets, &bursts, since, window));
        Ok(Self { bursts: sender, thread })
    }

    pub fn send(&self, burst: Burst) -> anyhow::Result<()> {
        self.bursts.send(burst).context("the publisher has ended")
    }

    /// When all are published and answered.
    pub fn finish(self) -> anyhow::Result<PublishReport> {
        drop(self.bursts);
        self.thread.join().unwrap_or_else(|_| anyhow::bail!("the publisher panicked"))
    }
}

fn connect(wire: Wire, server: SocketAddr) -> io::Result<TcpStream> {
    let mut socket = TcpStream::connect(server)?;
    socket.set_nodelay(true)?;
    if wire == Wire::Zmtp {
        zmtp::greet(&mut socket)?;
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn publish(
    wire: Wire,
    mut sockets: Vec<TcpStream>,
    bursts: &Receiver<Burst>,
    since: Micros,
    window: Option<Window>,
) -> anyhow::Result<PublishReport> {
    let mut published = PublishReport { events: 0, latest: 0, heard: 0, connections: Vec::new() };
    let mut window = window.map(OpenWindow::new).transpose()?;
    let answered = Arc::new(Answered::default());
    let reader = if wire == Wire::Zmtp {
        None
    } else {
        let sockets = sockets.iter().map(TcpStream::try_clone).collect::<io::Result<Vec<_>>>()?;
        let answered = answered.clone();
        Some(thread::spawn(move || count_answers(wire, &sockets, &answered)))
    };
    let ends = window.as_ref().and_then(|open| Some(since + micros(open.window.for_at_most?)));
    let sent = bursts.iter().try_for_each(|burst| {
        sleep_until(since + burst.due);
        if ends.is_some_and(|ends| now() >= ends) {
            return Ok(());
        }
        if let Some(window) = &mut window {
            window.wait(published.events)?;
        } else {
            published.latest = published.latest.max(now().saturating_sub(since + burst.due));
        }
        for (socket, commands) in sockets.iter_mut().zip(&burst.commands) {
            write_all(socket, commands)?;
        }
        published.events += burst.events;
        anyhow::Ok(())
    });
    let deadline = Instant::now() + PATIENCE;
    if let Some(reader) = reader {
        while sent.is_ok()
            && answered.events.load(Ordering::Relaxed) < published.events
            && !reader.is_finished()
            && Instant::now() < deadline
        {
            thread::sleep(Duration::from_millis(1));
        }
        answered.over.store(true, Ordering::Relaxed);
        reader.join().unwrap_or_else(|_| anyhow::bail!("the reader panicked"))?;
        let events = answered.events.load(Ordering::Relaxed);
        anyhow::ensure!(events >= published.events, "{events} of {} events are answered", published.events);
    }
    sent?;
    published.heard = answered.heard.load(Ordering::Relaxed);
    published.connections = sockets;
    Ok(published)
}

struct OpenWindow {
    file: File,
    delivered: u64,
    window: Window,
}

impl OpenWindow {
    fn new(window: Window) -> io::Result<Self> {
        Ok(Self { file: File::open(&window.delivered)?, delivered: 0, window })
    }

    /// Until fewer events are under way.
    fn wait(&mut self, published: u64) -> anyhow::Result<()> {
        let Window { most, already, .. } = self.window;
        let deadline = Instant::now() + PATIENCE;
        while published >= self.delivered + most {
            anyhow::ensure!(
                Instant::now() < deadline,
                "{published} events are published, and {} arrived",
                self.delivered
            );
            let mut number = [0; 8];
            // The file is empty until the first event.
            let size = self.file.read_at(&mut number, 0)?;
            let delivered = if size == number.len() { u64::from_le_bytes(number) } else { 0 };
            if delivered.saturating_sub(already) == self.delivered {
                thread::sleep(SHORT);
            }
            self.delivered = delivered.saturating_sub(already);
        }
        Ok(())
    }
}

fn count_answers(wire: Wire, sockets: &[TcpStream], answered: &Answered) -> anyhow::Result<()> {
    let mut poll = Poll::new()?;
    for (index, socket) in sockets.iter().enumerate() {
        poll.registry().register(&mut SourceFd(&socket.as_raw_fd()), Token(index), Interest::READABLE)?;
    }
    let mut rests = vec![Vec::new(); sockets.len()];
    let mut events = Events::with_capacity(64);
    let mut buffer = vec![0; 64 * 1024];
    while !answered.over.load(Ordering::Relaxed) {
        match poll.poll(&mut events, Some(Duration::from_millis(10))) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result?,
        }
        for event in &events {
            let (socket, rest) = (&sockets[event.token().0], &mut rests[event.token().0]);
            while let Some(count) = receive(socket, &mut buffer)? {
                rest.extend_from_slice(&buffer[..count]);
                let used = match wire {
                    Wire::Redis => count_replies(rest, answered)?,
                    Wire::Http => count_responses(rest, answered)?,
                    Wire::Zmtp => rest.len(),
                };
                rest.drain(..used);
            }
        }
    }
    Ok(())
}

/// `None`: nothing more for now.
fn receive(mut socket: &TcpStream, buffer: &mut [u8]) -> anyhow::Result<Option<usize>> {
    match socket.read(buffer) {
        Ok(0) => anyhow::bail!("the server has closed the connection"),
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Answers are read meanwhile on the same socket, which therefore does not block.
fn write_all(socket: &mut TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match socket.write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(SHORT),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Returns the size of all complete ones.
fn count_replies(bytes: &[u8], answered: &Answered) -> anyhow::Result<usize> {
    let mut used = 0;
    while let Some(length) = bytes[used..].windows(2).position(|window| window == b"\r\n") {
        let line = std::str::from_utf8(&bytes[used..used + length])?;
        let receivers = line.strip_prefix(':').with_context(|| format!("Redis says {line}"))?;
        answered.heard.fetch_add(receivers.parse().context("Redis counts")?, Ordering::Relaxed);
        answered.events.fetch_add(1, Ordering::Relaxed);
        used += length + 2;
    }
    Ok(used)
}

fn count_responses(bytes: &[u8], answered: &Answered) -> anyhow::Result<usize> {
    let mut used = 0;
    while let Some((head, size)) = http::parse_head(&bytes[used..])? {
        let size = size + head.length.unwrap_or(0);
        if used + size > bytes.len() {
            break;
        }
        anyhow::ensure!(matches!(head.status, 201 | 202), "a publication is answered {}", head.status);
        answered.events.fetch_add(1, Ordering::Relaxed);
        used += size;
    }
    Ok(used)
}

/// The little of `ZeroMQ`'s protocol (ZMTP 3.0, without security) that a PUSH socket needs.
pub mod zmtp {
    use std::io::{self, Read, Write};

    const GREETING: usize = 64;
    const COMMAND: u8 = 0x04;
    const LONG: u8 = 0x02;

    pub fn greet(socket: &mut (impl Read + Write)) -> io::Result<()> {
        let mut greeting = [0; GREETING];
        greeting[..12].copy_from_slice(b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0");
        greeting[12..16].copy_from_slice(b"NULL");
        socket.write_all(&greeting)?;
        let ready = b"\x05READY\x0bSocket-Type\0\0\0\x04PUSH";
        socket.write_all(&[COMMAND, ready.len() as u8])?;
        socket.write_all(ready)?;
        socket.read_exact(&mut greeting)?;
        let mut header = [0; 2];
        socket.read_exact(&mut header)?;
        socket.read_exact(&mut vec![0; header[1].into()])
    }

    pub fn write_message(message: &[u8], to: &mut Vec<u8>) {
        if let Ok(length) = u8::try_from(message.len()) {
            to.extend([0, length]);
        } else {
            to.push(LONG);
            to.extend((message.len() as u64).to_be_bytes());
        }
        to.extend_from_slice(message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(
        bytes: &[u8],
        counts: impl Fn(&[u8], &Answered) -> anyhow::Result<usize>,
    ) -> anyhow::Result<(usize, u64, u64)> {
        let answered = Answered::default();
        let used = counts(bytes, &answered)?;
        Ok((used, answered.events.load(Ordering::Relaxed), answered.heard.load(Ordering::Relaxed)))
    }

    #[test]
    fn only_complete_answers_count() {
        assert_eq!(count(b":1\r\n:0\r\n:2", count_replies).unwrap(), (8, 2, 1));
        assert!(count(b"-ERR unknown\r\n", count_replies).is_err());
        let response = "HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\nok";
        let half = &response[..response.len() - 1];
        assert_eq!(
            count(format!("{response}{half}").as_bytes(), count_responses).unwrap(),
            (response.len(), 1, 0)
        );
        assert!(count(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n", count_responses).is_err());
    }

    #[test]
    fn long_messages_have_a_long_length() {
        let mut bytes = Vec::new();
        zmtp::write_message(&[7; 255], &mut bytes);
        zmtp::write_message(&[8; 256], &mut bytes);
        assert_eq!(bytes[..3], [0, 255, 7]);
        assert_eq!(bytes[257..267], [2, 0, 0, 0, 0, 0, 0, 1, 0, 8]);
        assert_eq!(bytes.len(), 2 + 255 + 9 + 256);
    }
}
