//! The process that holds streams: one thread, one epoll, no more work per event than to read it and keep its ledger, so that
//! ten thousand of them leave the machine to the services. Commands come by standard input.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    fs::File,
    io::{self, BufRead, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::FileExt as _,
    sync::mpsc::{Receiver, sync_channel},
    time::Duration,
};

use chrono::Utc;
use mio::{Events, Interest, Poll, Token, Waker, net::TcpStream};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    Audience, Opening, Order, Report, Status, StreamSummary, Viewer, read_lines,
    viewer::{DeliveredEvent, Ledger, StreamItem, StreamReader},
};
use crate::clock::{Micros, now};

/// Loopback has some 28,000 ports per source address, and ports of ended connections stay taken for a while.
const SOURCES: u8 = 8;
const ORDERS: Token = Token(usize::MAX);
/// Maximum latencies kept.
const SAMPLES: usize = 8_000_000;
const TICK: Duration = Duration::from_millis(10);
/// Connections opened before sockets are read again.
const OPENED_IN_A_ROW: usize = 32;

pub fn run() -> anyhow::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let poll = Poll::new()?;
    let waker = Waker::new(poll.registry(), ORDERS)?;
    let (sender, orders) = sync_channel(1);
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if sender.send(line).is_err() || waker.wake().is_err() {
                return;
            }
        }
        std::process::exit(0);
    });
    Holder::new(poll).run(&orders)
}

struct ViewerStream {
    viewer: Viewer,
    ledger: Ledger,
    connection: Option<StreamSocket>,
    heartbeats: bool,
    longest_delay: u32,
    goodbye: Option<String>,
    ended_at: Option<Micros>,
}

struct StreamSocket {
    socket: TcpStream,
    reader: StreamReader,
    requested: bool,
    ready: bool,
}

struct Holder {
    poll: Poll,
    streams: Vec<ViewerStream>,
    opening: Opening,
    foreign: bool,
    network: u8,
    waiting: VecDeque<usize>,
    opened_until: Micros,
    delivered: Option<File>,
    returning: BinaryHeap<Reverse<(Micros, usize)>>,
    by_itself: bool,
    since: Micros,
    status: Status,
    report: Report,
}

impl Holder {
    fn new(poll: Poll) -> Self {
        Self {
            poll,
            streams: Vec::new(),
            opening: Opening::at_rate(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), 1),
            foreign: false,
            network: 0,
            waiting: VecDeque::new(),
            opened_until: 0,
            delivered: None,
            returning: BinaryHeap::new(),
            by_itself: false,
            since: 0,
            status: Status::default(),
            report: Report::default(),
        }
    }

    fn run(mut self, orders: &Receiver<String>) -> anyhow::Result<()> {
        let mut events = Events::with_capacity(1_024);
        let mut buffer = vec![0; 64 * 1024];
        let (mut more_due, mut delivered) = (false, 0);
        loop {
            // Only timed work is a reason to wake up without an event.
            let tick = !self.waiting.is_empty() || !self.returning.is_empty();
            let wait = if more_due { Some(Duration::ZERO) } else { tick.then_some(TICK) };
            match self.poll.poll(&mut events, wait) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            }
            for event in &events {
                if event.token() == ORDERS {
                    while let Ok(line) = orders.try_recv() {
                        let answer = self.obey(serde_json::from_str(&line)?)?;
                        let mut stdout = io::stdout().lock();
                        writeln!(stdout, "{answer}")?;
                        stdout.flush()?;
                    }
                } else {
                    let over = event.is_read_closed() || event.is_error();
                    self.on_socket(event.token().0, over, &mut buffer);
                }
            }
            more_due = self.open_due();
            if let Some(file) = &self.delivered
                && delivered != self.status.events_ever
            {
                delivered = self.status.events_ever;
                file.write_all_at(&delivered.to_le_bytes(), 0)?;
            }
        }
    }

    fn obey(&mut self, order: Order) -> anyhow::Result<String> {
        match order {
            Order::Viewers(Audience { viewers, foreign, network, delivered }) => {
                (self.foreign, self.network) = (foreign, network);
                self.delivered = delivered.map(File::create).transpose()?;
                for viewer in read_lines(&viewers)? {
                    self.streams.push(ViewerStream {
                        viewer,
                        ledger: Ledger { foreign, ..Ledger::default() },
                        connection: None,
                        heartbeats: false,
                        longest_delay: 0,
                        goodbye: None,
                        ended_at: None,
                    });
                }
            }
            Order::Open(opening) => {
                (self.opening, self.opened_until) = (opening, now());
                let closed = |index: &usize| self.streams[*index].connection.is_none();
                self.waiting = (0..self.streams.len()).filter(closed).collect();
            }
            Order::Measure { since } => {
                self.since = since;
                let Report { statuses, faults, first_fault, resyncs, .. } = std::mem::take(&mut self.report);
                self.report = Report { statuses, faults, first_fault, resyncs, ..Report::default() };
                let Status { ready, opening, events_ever, .. } = self.status;
                self.status = Status { ready, opening, events_ever, ..Status::default() };
                for stream in &mut self.streams {
                    stream.heartbeats = false;
                    stream.longest_delay = 0;
                }
            }
            Order::ComeBack { by_itself } => self.by_itself = by_itself,
            Order::Reconnect => {
                self.by_itself = true;
                for index in 0..self.streams.len() {
                    if self.streams[index].connection.is_none() {
                        self.open(index);
                    }
                }
            }
            Order::Status => {}
            Order::Report => return Ok(serde_json::to_string(&self.report())?),
        }
        Ok(serde_json::to_string(&self.status)?)
    }

    fn report(&self) -> Report {
        let summary = |stream: &ViewerStream| StreamSummary {
            user: stream.viewer.user,
            began: stream.ledger.began.map(|position| position.to_string()),
            newest: stream.ledger.position.map(|position| position.to_string()),
            digest: stream.ledger.digest,
        };
        let longest = self.streams.iter().map(|stream| stream.longest_delay);
        Report {
            summaries: self.streams.iter().map(summary).collect(),
            longest_delays: longest.filter(|delay| *delay > 0).collect(),
            ..self.report.clone()
        }
    }

    /// `true`: more are due, but sockets come first.
    fn open_due(&mut self) -> bool {
        let now = now();
        let mut in_a_row = 0;
        while let Some(index) = self.waiting.front().copied()
            && self.opened_until <= now
            && self.status.opening < self.opening.at_once
        {
            if in_a_row == OPENED_IN_A_ROW {
                return true;
            }
            in_a_row += 1;
            self.waiting.pop_front();
            self.opened_until += Micros::from(1_000_000 / self.opening.per_second.max(1));
            self.open(index);
        }
        while let Some(Reverse((at, index))) = self.returning.peek().copied()
            && at <= now
        {
            self.returning.pop();
            self.open(index);
        }
        false
    }

    fn open(&mut self, index: usize) {
        let connection = connect(self.opening.server, self.network, index).and_then(|socket| {
            let mut connection =
                StreamSocket { socket, reader: StreamReader::default(), requested: false, ready: false };
            // On loopback a connection is usually there already.
            let stream = &self.streams[index];
            let sent = send_request(&mut connection, &stream.viewer, &stream.ledger, self.opening.server);
            let interest =
                if sent.is_ok() { Interest::READABLE } else { Interest::READABLE | Interest::WRITABLE };
            self.poll.registry().register(&mut connection.socket, Token(index), interest)?;
            Ok(connection)
        });
        match connection {
            Ok(connection) => {
                self.status.opening += 1;
                self.report.begun_at.push(now());
                self.streams[index].connection = Some(connection);
            }
            Err(error) => {
                self.fault(format!("cannot connect: {error}"));
                self.come_back(index);
            }
        }
    }

    /// `over`: the other side has closed, so there is an end to be read, and no further event.
    fn on_socket(&mut self, index: usize, over: bool, buffer: &mut [u8]) {
        let Some(stream) = self.streams.get_mut(index) else { return };
        let Some(connection) = &mut stream.connection else { return };
        if !connection.requested
            && let Err(error) = send_request(connection, &stream.viewer, &stream.ledger, self.opening.server)
        {
            if !is_early(&error) {
                self.end(index, "refused");
            }
            return;
        }
        loop {
            let Some(stream) = self.streams.get_mut(index) else { return };
            let Some(connection) = &mut stream.connection else { return };
            let count = match connection.socket.read(buffer) {
                Ok(0) => return self.end(index, "closed"),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return self.end(index, "reset"),
            };
            let (arrived, wall) = (now(), Utc::now().timestamp_micros());
            let mut items = Vec::new();
            connection.reader.read(&buffer[..count], &mut stream.ledger, |item| items.push(item));
            let body_ended = items.contains(&StreamItem::End);
            items.into_iter().for_each(|item| self.account(index, item, arrived, wall));
            if body_ended {
                return self.end(index, "ended");
            }
            // Less than the buffer holds: nothing is left, and more is another event.
            if count < buffer.len() && !over {
                return;
            }
        }
    }

    /// `arrived` by our clock, `wall` by that of Postgres.
    fn account(&mut self, index: usize, item: StreamItem, arrived: Micros, wall: i64) {
        let (stream, status, report) = (&mut self.streams[index], &mut self.status, &mut self.report);
        match item {
            StreamItem::Status(status) => *report.statuses.entry(status).or_default() += 1,
            StreamItem::Ready => {
                let Some(connection) = stream.connection.as_mut().filter(|connection| !connection.ready)
                else {
                    return;
                };
                connection.ready = true;
                status.ready += 1;
                status.opening -= 1;
                report.readies.push(arrived.saturating_sub(self.since) as u32);
                report.away.extend(stream.ended_at.take().map(|ended| arrived.saturating_sub(ended) as u32));
            }
            StreamItem::Event(DeliveredEvent { number, created_at }) => {
                status.events += 1;
                status.events_ever += 1;
                status.last_event_at = arrived;
                if let Some(number) = number.filter(|_| report.latencies.len() < SAMPLES) {
                    // An event that the reconcile delivered first is early.
                    report.latencies.push(arrived.saturating_sub(self.since + number) as u32);
                }
                if let Some(created_at) = created_at.filter(|_| report.delays.len() < SAMPLES) {
                    let delay = u32::try_from(wall - created_at).unwrap_or_default();
                    stream.longest_delay = stream.longest_delay.max(delay);
                    report.delays.push(delay);
                }
            }
            StreamItem::Heartbeat => {
                status.heartbeats += usize::from(!std::mem::replace(&mut stream.heartbeats, true));
            }
            StreamItem::Resync => report.resyncs += 1,
            StreamItem::Goodbye(reason) => stream.goodbye = Some(reason),
            StreamItem::End => {}
            StreamItem::Fault(fault) => {
                let fault = format!("stream of {}: {fault}", stream.viewer.user);
                self.fault(fault);
            }
        }
    }

    /// For the reason of its goodbye, if it got one.
    fn end(&mut self, index: usize, reason: &str) {
        let Some(connection) = self.streams[index].connection.take() else { return };
        if connection.ready {
            self.status.ready -= 1;
        } else {
            self.status.opening -= 1;
        }
        let reason = self.streams[index].goodbye.take().unwrap_or_else(|| reason.to_owned());
        *self.status.ended.entry(reason).or_default() += 1;
        // A rejected stream has been away since its last end.
        self.streams[index].ended_at.get_or_insert_with(now);
        self.report.ended_at.push(now());
        self.come_back(index);
    }

    fn come_back(&mut self, index: usize) {
        if self.by_itself {
            let wait = u64::from(self.streams[index].ledger.retry_millis()) * 1_000;
            self.returning.push(Reverse((now() + wait, index)));
        }
    }

    fn fault(&mut self, fault: String) {
        self.report.faults += 1;
        self.report.first_fault.get_or_insert(fault);
    }
}

fn connect(server: SocketAddr, network: u8, index: usize) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    let source = Ipv4Addr::new(127, network, 0, 2 + (index % usize::from(SOURCES)) as u8);
    socket.bind(&SocketAddr::new(IpAddr::V4(source), 0).into())?;
    match socket.connect(&server.into()) {
        Err(error) if error.raw_os_error() != Some(nix::errno::Errno::EINPROGRESS as i32) => Err(error),
        _ => Ok(TcpStream::from_std(socket.into())),
    }
}

/// The connection is not established yet.
fn is_early(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotConnected | io::ErrorKind::WouldBlock)
}

/// Sends the request if the connection is established.
fn send_request(
    connection: &mut StreamSocket,
    viewer: &Viewer,
    ledger: &Ledger,
    server: SocketAddr,
) -> io::Result<()> {
    let mut request = if ledger.foreign {
        format!("GET /sub/{} HTTP/1.1\r\n", viewer.user)
    } else {
        format!("GET /api/messages HTTP/1.1\r\nAuthorization: Bearer {}\r\n", viewer.token)
    };
    request.push_str(&format!("Host: {server}\r\nAccept: text/event-stream\r\nCache-Control: no-cache\r\n"));
    if let Some(position) = ledger.position.filter(|_| !ledger.foreign) {
        request.push_str(&format!("Last-Event-ID: {position}\r\n"));
    }
    request.push_str("\r\n");
    // The buffer of a new connection takes a request whole.
    let count = connection.socket.write(request.as_bytes())?;
    if count < request.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    connection.requested = true;
    Ok(())
}
