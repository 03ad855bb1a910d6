//! The stream as a browser sees it. [`StreamRequest`] and [`Stream`] are one connection: status, headers, and every block, checked
//! against docs/api.md and against another parser. [`EventSource`] reconnects like a browser's: it keeps the last id, waits for the
//! given `retry`, resumes by header, and stops permanently on anything but a 200.

use std::{io, net::SocketAddr, time::Duration};

use bytes::Bytes;
use eventsource_stream::EventStream;
use futures_util::{FutureExt, StreamExt, stream};
use http::{HeaderMap, HeaderValue, Request, Uri, header};
use http_body_util::{BodyExt, Empty};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpSocket,
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};

use crate::PATIENCE;

const BLOCK_LIMIT: usize = 1 << 20;

#[derive(Debug, Clone)]
pub struct StreamRequest {
    url: String,
    query: Vec<(&'static str, String)>,
    headers: HeaderMap,
    receive_buffer: Option<u32>,
}

impl StreamRequest {
    pub fn new(url: impl Into<String>) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, HeaderValue::from_static("text/event-stream"));
        Self { url: url.into(), query: Vec::new(), headers, receive_buffer: None }
    }

    pub fn bearer(self, token: &str) -> Self {
        self.header("authorization", format!("Bearer {token}"))
    }

    pub fn query_token(self, token: &str) -> Self {
        self.query("token", token)
    }

    pub fn cookie(self, cookie: &str) -> Self {
        self.header("cookie", cookie)
    }

    pub fn last_event_id(self, id: impl AsRef<[u8]>) -> Self {
        self.header("last-event-id", id)
    }

    pub fn last_event_id_in_query(self, id: &str) -> Self {
        self.query("lastEventId", id)
    }

    /// `event`: heartbeats that a script can see; a number: the seconds between them.
    pub fn heartbeat(self, wanted: &str) -> Self {
        self.query("heartbeat", wanted)
    }

    pub fn header(mut self, name: &'static str, value: impl AsRef<[u8]>) -> Self {
        let value = HeaderValue::from_bytes(value.as_ref()).expect("the test's own header is well-formed");
        self.headers.insert(name, value);
        self
    }

    pub fn without_header(mut self, name: &str) -> Self {
        self.headers.remove(name);
        self
    }

    fn query(mut self, name: &'static str, value: &str) -> Self {
        self.query.retain(|(present, _)| *present != name);
        self.query.push((name, value.to_owned()));
        self
    }

    /// A slow consumer: the kernel takes hardly anything that the test does not read.
    pub fn tiny_receive_buffer(mut self) -> Self {
        self.receive_buffer = Some(2_048);
        self
    }

    /// Returns when the head has come, whatever its status.
    pub async fn open(&self) -> io::Result<Stream> {
        let uri: Uri = self.url.parse().map_err(io::Error::other)?;
        let authority = uri.authority().ok_or(io::ErrorKind::InvalidInput)?.to_string();
        let address: SocketAddr = authority.parse().map_err(io::Error::other)?;
        let socket = TcpSocket::new_v4()?;
        if let Some(size) = self.receive_buffer {
            socket.set_recv_buffer_size(size)?; // Before connecting: the handshake announces the window.
        }
        let socket = socket.connect(address).await?;
        socket.set_nodelay(true)?;

        let mut target = uri.path_and_query().map_or("/", |target| target.as_str()).to_owned();
        if !self.query.is_empty() {
            let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(&self.query).finish();
            target.push(if target.contains('?') { '&' } else { '?' });
            target.push_str(&query);
        }
        let mut request = Request::get(target).header(header::HOST, authority);
        request.headers_mut().expect("the target is well-formed").extend(self.headers.clone());
        let request = request.body(Empty::<Bytes>::new()).map_err(io::Error::other)?;

        let (mut sender, connection) = http1::Builder::new()
            .max_buf_size(8 * 1024) // Bounds how far a slow consumer reads ahead.
            .handshake(TokioIo::new(socket))
            .await
            .map_err(io::Error::other)?;
        let connection = ConnectionTask(tokio::spawn(async {
            let _ = connection.await; // The body shows how it ended.
        }));
        let (head, body) = sender.send_request(request).await.map_err(io::Error::other)?.into_parts();
        Ok(Stream {
            status: head.status.as_u16(),
            headers: head.headers,
            body,
            raw: Vec::new(),
            fields: Default::default(),
            lines: String::new(),
            retry: None,
            comments: 0,
            last_id: None,
            _connection: connection,
        })
    }

    pub async fn stream(&self) -> Stream {
        let stream = timeout(PATIENCE, self.open()).await.expect("a head in time").expect("a head");
        assert_eq!(stream.status, 200, "the stream opens");
        stream
    }
}

struct ConnectionTask(JoinHandle<()>);

impl Drop for ConnectionTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Block {
    Event(Event),
    Comment,
    Retry(Duration),
}

/// The lines of a block, in the order that docs/api.md requires.
const FIELDS: [&str; 4] = ["retry", "event", "data", "id"];

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The block's own `id:` line. (A browser's `lastEventId` also applies to later blocks without one.)
    pub id: Option<String>,
    pub name: Option<String>,
    pub data: String,
}

impl Event {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.data).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    pub fn is(&self, name: &str) -> bool {
        self.name.as_deref() == Some(name)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Clean,
    /// Reset, or cut inside a block or a chunk.
    Broken,
}

pub struct Stream {
    pub status: u16,
    pub headers: HeaderMap,
    body: Incoming,
    raw: Vec<u8>,
    /// The [`FIELDS`] of an incomplete block.
    fields: [Option<String>; FIELDS.len()],
    /// The lines of an incomplete block, for another parser.
    lines: String,
    pub retry: Option<Duration>,
    pub comments: usize,
    pub last_id: Option<String>,
    _connection: ConnectionTask,
}

impl Stream {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    pub async fn block(&mut self) -> Result<Block, End> {
        loop {
            while let Some(line) = self.take_line() {
                if let Some(block) = self.read_line(&line) {
                    return Ok(block);
                }
            }
            assert!(self.raw.len() < BLOCK_LIMIT, "a block without an end");
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        self.raw.extend_from_slice(&bytes);
                    }
                }
                None if self.raw.is_empty() && self.fields.iter().all(Option::is_none) => {
                    return Err(End::Clean);
                }
                Some(Err(_)) | None => return Err(End::Broken),
            }
        }
    }

    pub async fn event(&mut self) -> Result<Event, End> {
        loop {
            if let Block::Event(event) = self.block().await? {
                return Ok(event);
            }
        }
    }

    pub async fn next(&mut self) -> Event {
        match timeout(PATIENCE, self.event()).await {
            Ok(Ok(event)) => event,
            Ok(Err(end)) => panic!("the stream ended ({end:?}) where an event was due"),
            Err(elapsed) => panic!("no event within {PATIENCE:?}: {elapsed}"),
        }
    }

    pub async fn named(&mut self, name: &str) -> Event {
        let event = self.next().await;
        assert!(event.is(name), "expected {name}, got {event:?}");
        event
    }

    pub async fn rest(&mut self) -> (Vec<Event>, End) {
        let mut events = Vec::new();
        let all = async {
            loop {
                match self.event().await {
                    Ok(event) => events.push(event),
                    Err(end) => return end,
                }
            }
        };
        let end = timeout(PATIENCE, all).await.expect("the stream ends");
        (events, end)
    }

    pub async fn text(self) -> String {
        let body = timeout(PATIENCE, self.body.collect()).await.expect("a body in time").expect("a body");
        String::from_utf8(body.to_bytes().into()).expect("the body is UTF-8")
    }

    fn take_line(&mut self) -> Option<String> {
        let end = self.raw.iter().position(|byte| *byte == b'\n')?;
        let mut line = String::from_utf8(self.raw.drain(..=end).collect()).expect("the stream is UTF-8");
        self.lines.push_str(&line);
        line.pop();
        let splits = ['\0', '\r', '\u{85}', '\u{2028}', '\u{2029}'];
        assert!(!line.contains(splits), "some reader would break this line: {line:?}");
        Some(line)
    }

    fn read_line(&mut self, line: &str) -> Option<Block> {
        if line.is_empty() {
            return Some(Block::Event(self.finish_block()));
        }
        let (field, value) = line.split_once(':').expect("every line has a colon");
        let value = value.strip_prefix(' ').unwrap_or(value);
        if field.is_empty() {
            assert_eq!(line, ":", "a heartbeat says nothing");
            assert!(self.fields[1..].iter().all(Option::is_none), "a comment within {:?}", self.fields);
            self.comments += 1;
            return Some(Block::Comment);
        }
        let at =
            FIELDS.iter().position(|known| *known == field).unwrap_or_else(|| panic!("unknown {line:?}"));
        // The goodbye of a stream that never became ready is its first block, so `retry` may come twice.
        let first = if field == "retry" { 1 } else { at };
        assert!(self.fields[first..].iter().all(Option::is_none), "{line:?} after {:?}", self.fields);
        self.fields[at] = Some(value.to_owned());
        (field == "retry").then(|| {
            let retry = Duration::from_millis(value.parse().expect("retry is a number"));
            self.retry = Some(retry);
            Block::Retry(retry)
        })
    }

    fn finish_block(&mut self) -> Event {
        let [_, name, data, id] = std::mem::take(&mut self.fields);
        let data = data.unwrap_or_else(|| panic!("a block without data: {name:?}, {id:?}"));
        let event = Event { id, name, data };
        event.json();
        if event.id.is_some() {
            self.last_id.clone_from(&event.id);
        }

        // Another parser must read the same from the same bytes.
        let block = std::mem::take(&mut self.lines);
        let mut parser = EventStream::new(stream::iter([Ok::<_, io::Error>(block)]));
        let parsed = parser.next().now_or_never().flatten().expect("the parser has the whole block");
        let parsed = parsed.expect("the parser accepts the block");
        assert_eq!(parsed.data, event.data);
        assert_eq!(parsed.event, event.name.as_deref().unwrap_or("message"));
        assert_eq!(parsed.id, event.id.as_deref().unwrap_or_default());
        event
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReconnectBy {
    /// The browser does it: the header, and the unchanged URL, whatever stale cursor that has.
    Header,
    /// The page makes a new `EventSource` with its last id in the query.
    Query,
    Alternately,
}

#[derive(Debug, Default)]
pub struct ReceivedRecord {
    pub events: Vec<Event>,
    pub opened: usize,
    pub refused: usize,
    pub open: bool,
    pub comments: usize,
    pub retry: Option<Duration>,
    /// A status other than 200: no reconnects.
    pub given_up: Option<u16>,
}

impl ReceivedRecord {
    /// The events of the feed: those with an id, except the markers of a position.
    pub fn ledger(&self) -> impl DoubleEndedIterator<Item = &Event> {
        self.events.iter().filter(|event| event.id.is_some() && !event.is("ready") && !event.is("resync"))
    }

    pub fn named(&self, name: &str) -> impl Iterator<Item = &Event> {
        self.events.iter().filter(move |event| event.is(name))
    }

    pub fn last_id(&self) -> Option<&str> {
        self.events.iter().rev().find_map(|event| event.id.as_deref())
    }
}

enum Instruction {
    Cut,
    Aim(Vec<StreamRequest>),
}

pub struct EventSource {
    record: watch::Receiver<ReceivedRecord>,
    orders: mpsc::Sender<Instruction>,
    task: JoinHandle<()>,
}

impl EventSource {
    /// Opens the first of `openings`; each reconnect uses the next one, as behind a load balancer. Waits at most
    /// `longest_retry` before a reconnect, whatever `retry` says.
    pub fn open(openings: Vec<StreamRequest>, resume: ReconnectBy, longest_retry: Duration) -> Self {
        let (sender, record) = watch::channel(ReceivedRecord::default());
        let (orders, taken) = mpsc::channel(8);
        let page = Reconnecting { openings, resume, longest_retry, sender, orders: taken };
        Self { record, orders, task: tokio::spawn(page.live()) }
    }

    pub fn record(&self) -> watch::Ref<'_, ReceivedRecord> {
        self.record.borrow()
    }

    pub async fn until(&self, what: &str, shown: impl FnMut(&ReceivedRecord) -> bool) {
        let mut record = self.record.clone();
        let result = timeout(PATIENCE, record.wait_for(shown)).await;
        if !matches!(result, Ok(Ok(_))) {
            drop(result);
            let record = self.record();
            let from = record.events.len().saturating_sub(5);
            panic!(
                "waited {PATIENCE:?} in vain: {what}; {} events, {} opened, {} refused, open: {}, given up: {:?}, last: {:#?}",
                record.events.len(),
                record.opened,
                record.refused,
                record.open,
                record.given_up,
                &record.events[from..]
            );
        }
    }

    pub async fn ready(&self) {
        self.until("ready", |record| record.named("ready").next().is_some()).await;
    }

    pub async fn cut(&self) {
        self.orders.send(Instruction::Cut).await.expect("the browser has not given up");
    }

    /// Where to reconnect from now on. The present connection stays.
    pub async fn aim(&self, openings: Vec<StreamRequest>) {
        self.orders.send(Instruction::Aim(openings)).await.expect("the browser has not given up");
    }
}

impl Drop for EventSource {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Reconnecting {
    openings: Vec<StreamRequest>,
    resume: ReconnectBy,
    longest_retry: Duration,
    sender: watch::Sender<ReceivedRecord>,
    orders: mpsc::Receiver<Instruction>,
}

impl Reconnecting {
    async fn live(mut self) {
        let mut turn = 0;
        // The id in the page's URL, apart from the one that the browser keeps.
        let mut in_url: Option<String> = None;
        loop {
            let mut opening = self.openings[turn % self.openings.len()].clone();
            let last_id = self.sender.borrow().last_id().map(str::to_owned);
            if let Some(id) = last_id {
                let by_query = match self.resume {
                    ReconnectBy::Header => false,
                    ReconnectBy::Query => true,
                    ReconnectBy::Alternately => turn % 2 == 1,
                };
                if by_query {
                    in_url = Some(id);
                } else {
                    opening = opening.last_event_id(id);
                }
            }
            if let Some(id) = &in_url {
                opening = opening.last_event_id_in_query(id);
            }
            turn += 1;

            match timeout(PATIENCE, opening.open()).await {
                Ok(Ok(stream)) if stream.status == 200 => {
                    self.sender.send_modify(|record| {
                        record.opened += 1;
                        record.open = true;
                    });
                    if !self.watch(stream).await {
                        return;
                    }
                    self.sender.send_modify(|record| record.open = false);
                }
                Ok(Ok(stream)) => {
                    self.sender.send_modify(|record| record.given_up = Some(stream.status));
                    return;
                }
                Ok(Err(_)) | Err(_) => self.sender.send_modify(|record| record.refused += 1),
            }
            let retry = self.sender.borrow().retry.unwrap_or(Duration::from_secs(3));
            sleep(retry.min(self.longest_retry)).await;
        }
    }

    /// Records everything until the connection ends. `false`: the tab was closed.
    async fn watch(&mut self, mut stream: Stream) -> bool {
        loop {
            tokio::select! {
                block = stream.block() => match block {
                    Ok(block) => self.sender.send_modify(|record| match block {
                        Block::Event(event) => {
                            record.retry = stream.retry.or(record.retry);
                            record.events.push(event);
                        }
                        Block::Comment => record.comments += 1,
                        Block::Retry(retry) => record.retry = Some(retry),
                    }),
                    Err(_) => return true,
                },
                order = self.orders.recv() => match order {
                    Some(Instruction::Cut) => return true,
                    Some(Instruction::Aim(openings)) => self.openings = openings,
                    None => return false,
                },
            }
        }
    }
}
