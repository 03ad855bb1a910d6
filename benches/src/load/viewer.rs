//! Parses one stream block by block and keeps its ledger: after `ready`, every event follows the one before it. Pure.

use std::hash::{DefaultHasher, Hash, Hasher};

use chrono::DateTime;
use protocol::{
    event::{is_reserved, kind},
    position::{Epoch, Position},
};

use crate::http;

const LONGEST: usize = 64 * 1024;
const DEFAULT_RETRY_MILLIS: u32 = 3_000;

#[derive(Debug, PartialEq)]
pub enum StreamItem {
    /// Anything but 200 is also a fault.
    Status(u16),
    Ready,
    Event(DeliveredEvent),
    Heartbeat,
    Resync,
    Goodbye(String),
    /// The body has ended; the connection may stay open.
    End,
    Fault(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DeliveredEvent {
    /// The number at the start of its text, if it is a message to this user.
    pub number: Option<u64>,
    /// The message's time in Postgres, in microseconds since 1970.
    pub created_at: Option<i64>,
}

#[derive(Debug, Default, Clone)]
pub struct Ledger {
    pub position: Option<Position>,
    pub retry_millis: Option<u32>,
    /// The position of the first `ready`, and a [`digest`] of the events after it.
    pub began: Option<Position>,
    pub digest: u64,
    /// Of another server, whose ids are its own: the `id` in the data takes the place of the cursor, and the head that of `ready`.
    pub foreign: bool,
}

/// Two readers of the same events in the same order have the same digest.
pub fn digest(before: u64, seq: u64, kind: &str, identity: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (before, seq, kind, identity).hash(&mut hasher);
    hasher.finish()
}

/// What the database stores of a message: the JSON of its id and content, which come first. Of other events all.
fn identity(data: &str) -> &str {
    data.split_once(r#""conversationId""#).map_or(data, |(identity, _)| identity)
}

#[derive(Debug, Default)]
pub struct StreamReader {
    rest: Vec<u8>,
    /// `None`: the head is not complete.
    body: Option<Body>,
}

#[derive(Debug)]
enum Body {
    /// Until the connection closes, as in HTTP/1.0.
    Open,
    /// The beginning of the next chunk.
    Chunked(Vec<u8>),
    /// Bytes still to come: the proxy's own answer.
    Known(usize),
    Over,
}

impl Ledger {
    pub fn retry_millis(&self) -> u32 {
        self.retry_millis.unwrap_or(DEFAULT_RETRY_MILLIS)
    }
}

impl StreamReader {
    pub fn read(&mut self, bytes: &[u8], ledger: &mut Ledger, mut say: impl FnMut(StreamItem)) {
        if self.body.is_some() {
            return self.read_body(bytes, ledger, &mut say);
        }
        self.rest.extend_from_slice(bytes);
        let (head, size) = match http::parse_head(&self.rest) {
            Ok(Some(found)) => found,
            Ok(None) => return self.limit(&mut say),
            Err(error) => return say(StreamItem::Fault(format!("{error:#}"))),
        };
        say(StreamItem::Status(head.status));
        if head.status != 200 {
            say(StreamItem::Fault(format!("answered {}", head.status)));
        }
        if ledger.foreign && head.status == 200 {
            say(StreamItem::Ready);
        }
        self.body = Some(match head.length {
            _ if head.chunked => Body::Chunked(Vec::new()),
            Some(length) => Body::Known(length),
            None => Body::Open,
        });
        let all = std::mem::take(&mut self.rest);
        self.read_body(&all[size..], ledger, &mut say);
    }

    fn read_body(&mut self, bytes: &[u8], ledger: &mut Ledger, say: &mut impl FnMut(StreamItem)) {
        let mut unpacked = Vec::new();
        let (bytes, over) = match &mut self.body {
            None | Some(Body::Over) => return,
            Some(Body::Open) => (bytes, Ok(false)),
            Some(Body::Chunked(rest)) => {
                rest.extend_from_slice(bytes);
                let over = take_chunks(rest, &mut unpacked);
                (&unpacked[..], over)
            }
            Some(Body::Known(left)) => {
                *left = left.saturating_sub(bytes.len());
                (bytes, Ok(*left == 0))
            }
        };
        self.read_blocks(bytes, ledger, say);
        match over {
            Ok(false) => return,
            Ok(true) => say(StreamItem::End),
            Err(fault) => say(StreamItem::Fault(fault.into())),
        }
        self.body = Some(Body::Over);
    }

    fn read_blocks(&mut self, bytes: &[u8], ledger: &mut Ledger, say: &mut impl FnMut(StreamItem)) {
        // Most reads contain whole blocks, so mostly nothing is copied.
        if self.rest.is_empty() {
            let used = take_whole(bytes, ledger, say);
            self.rest.extend_from_slice(&bytes[used..]);
        } else {
            let mut all = std::mem::take(&mut self.rest);
            all.extend_from_slice(bytes);
            let used = take_whole(&all, ledger, say);
            all.drain(..used);
            self.rest = all;
        }
        self.limit(say);
    }

    fn limit(&mut self, say: &mut impl FnMut(StreamItem)) {
        if self.rest.is_empty() {
            self.rest = Vec::new();
        } else if self.rest.len() > LONGEST {
            say(StreamItem::Fault("a block without an end".into()));
        }
    }
}

/// Moves the contents of all complete chunks to `body`. `true`: the last one was among them.
fn take_chunks(bytes: &mut Vec<u8>, body: &mut Vec<u8>) -> Result<bool, &'static str> {
    const BROKEN: &str = "a body whose chunks are broken";
    while let httparse::Status::Complete((start, size)) =
        httparse::parse_chunk_size(bytes).map_err(|_| BROKEN)?
    {
        let size = usize::try_from(size).ok().filter(|size| *size <= LONGEST).ok_or(BROKEN)?;
        let Some(end) = bytes.get(start + size..start + size + 2) else { return Ok(false) };
        if end != b"\r\n" {
            return Err(BROKEN);
        }
        body.extend_from_slice(&bytes[start..start + size]);
        bytes.drain(..start + size + 2);
        if bytes.is_empty() {
            *bytes = Vec::new(); // Most streams are idle.
        }
        if size == 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns the number of complete bytes. A comment, or a `retry` before a block, takes effect with its line.
fn take_whole(bytes: &[u8], ledger: &mut Ledger, say: &mut impl FnMut(StreamItem)) -> usize {
    let mut used = 0;
    loop {
        let rest = &bytes[used..];
        let alone = rest.starts_with(b":") || rest.starts_with(b"retry: ");
        let end: &[u8] = if alone { b"\n" } else { b"\n\n" };
        let Some(length) = find(rest, end) else { return used };
        match std::str::from_utf8(&bytes[used..used + length]) {
            Ok(block) => {
                if let Some(said) = ledger.enter(block) {
                    say(said);
                }
            }
            Err(_) => say(StreamItem::Fault("a block that is not UTF-8".into())),
        }
        used += length + end.len();
    }
}

impl Ledger {
    fn enter(&mut self, block: &str) -> Option<StreamItem> {
        if self.foreign {
            return self.enter_foreign(block);
        }
        let (mut id, mut name, mut data) = (None, None, "");
        let mut comment = false;
        for line in block.split('\n') {
            match line.split_once(": ") {
                Some(("id", value)) => id = Some(value),
                Some(("event", value)) => name = Some(value),
                Some(("data", value)) => data = value,
                Some(("retry", value)) => self.retry_millis = value.parse().ok(),
                _ if line.starts_with(':') => comment = true,
                _ => return Some(StreamItem::Fault(format!("a line of no known form: {line:?}"))),
            }
        }
        let Ok(cursor) = id.map(str::parse::<Position>).transpose() else {
            return Some(StreamItem::Fault(format!("an id that is no cursor: {id:?}")));
        };
        match (name, cursor) {
            (Some("ready"), None) => Some(StreamItem::Ready), // A resync follows.
            (Some("ready"), Some(cursor)) => {
                self.began.get_or_insert(cursor);
                Some(match self.position.replace(cursor) {
                    Some(before) if before != cursor => {
                        StreamItem::Fault(format!("was at {before}, and is ready at {cursor}"))
                    }
                    _ => StreamItem::Ready,
                })
            }
            (Some("resync"), Some(cursor)) => {
                self.position = Some(cursor);
                Some(StreamItem::Resync)
            }
            (Some("goodbye"), None) => {
                let reason = text_member(data, "reason").unwrap_or("goodbye");
                Some(StreamItem::Goodbye(reason.to_owned()))
            }
            (name, Some(cursor)) => {
                self.digest = digest(self.digest, cursor.seq, name.unwrap_or(kind::MESSAGE), identity(data));
                let number = match name {
                    None => number_in_text(data),
                    Some(name) if !is_reserved(name) => data.parse().ok(),
                    Some(_) => None,
                };
                Some(match self.position.replace(cursor) {
                    Some(before) if before.epoch == cursor.epoch && before.seq + 1 == cursor.seq => {
                        StreamItem::Event(DeliveredEvent { number, created_at: created_at(data) })
                    }
                    before => StreamItem::Fault(format!("{cursor} came after {before:?}")),
                })
            }
            // In no feed.
            (Some(kind::PRESENCE | kind::TYPING), None) => None,
            (Some(name), None) => Some(StreamItem::Fault(format!("{name} without an id"))),
            (None, None) => comment.then_some(StreamItem::Heartbeat),
        }
    }

    fn enter_foreign(&mut self, block: &str) -> Option<StreamItem> {
        let data = block.split('\n').find_map(|line| line.strip_prefix("data: "))?;
        let seq = text_member(data, "id")?.parse().ok()?;
        let position = Position { epoch: Epoch(0), seq };
        Some(match self.position.replace(position) {
            Some(before) if !before.is_followed_by(position) => {
                StreamItem::Fault(format!("{seq} came after {}", before.seq))
            }
            _ => StreamItem::Event(DeliveredEvent {
                number: number_in_text(data),
                created_at: created_at(data),
            }),
        })
    }
}

fn number_in_text(data: &str) -> Option<u64> {
    let text = text_member(data, "content")?;
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text[..end].parse().ok()
}

fn created_at(data: &str) -> Option<i64> {
    Some(DateTime::parse_from_rfc3339(text_member(data, "createdAt")?).ok()?.timestamp_micros())
}

/// A member of flat JSON without escapes in its value; parsing it all would cost more than all the rest.
fn text_member<'a>(json: &'a str, name: &str) -> Option<&'a str> {
    let at = json
        .match_indices(name)
        .map(|(at, _)| at + name.len())
        .find(|at| json[*at..].starts_with("\":\""))?;
    json[at + 3..].split('"').next()
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";

    fn id(seq: u64) -> String {
        format!("00000000000000ff-{seq}")
    }

    fn message(seq: u64, text: &str) -> String {
        format!("data: {{\"id\":\"1\",\"content\":\"{text}\",\"mine\":false}}\nid: {}\n\n", id(seq))
    }

    fn ready(seq: u64) -> String {
        format!("event: ready\ndata: {{}}\nid: {}\n\n", id(seq))
    }

    fn event(number: Option<u64>) -> StreamItem {
        StreamItem::Event(DeliveredEvent { number, created_at: None })
    }

    fn read(ledger: &mut Ledger, text: &str) -> Vec<StreamItem> {
        let (mut whole, mut pieces) = (Vec::new(), Vec::new());
        let mut copy = ledger.clone();
        let mut reader = StreamReader::default();
        for byte in text.bytes() {
            reader.read(&[byte], &mut copy, |said| pieces.push(said));
        }
        StreamReader::default().read(text.as_bytes(), ledger, |said| whole.push(said));
        assert_eq!(whole, pieces);
        assert_eq!((ledger.position, ledger.digest), (copy.position, copy.digest));
        assert_eq!(whole.remove(0), StreamItem::Status(if text.contains(" 401 ") { 401 } else { 200 }));
        whole
    }

    #[test]
    fn a_stream_without_faults() {
        let mut ledger = Ledger::default();
        let sent = "event: message.sent\ndata: {\"content\":\"12\"}";
        let text = format!(
            "{HEAD}retry: 2500\n:\n{}{}:\n{sent}\nid: {}\n\n{}",
            ready(3),
            message(4, "0017 x"),
            id(5),
            message(6, "hello"),
        );
        let said = read(&mut ledger, &text);
        use StreamItem::{Heartbeat, Ready};
        assert_eq!(said, [Heartbeat, Ready, event(Some(17)), Heartbeat, event(None), event(None)]);
        assert_eq!((ledger.retry_millis(), ledger.position.map(|position| position.seq)), (2_500, Some(6)));
    }

    #[test]
    fn gap_repeat_and_other_feed_are_faults() {
        for next in [message(5, "1"), message(3, "1"), message(4, "1").replace("ff-", "fe-")] {
            let said = read(&mut Ledger::default(), &format!("{HEAD}{}{next}", ready(3)));
            assert!(matches!(&said[..], [StreamItem::Ready, StreamItem::Fault(_)]), "{said:?}");
        }
        let said = read(&mut Ledger::default(), &format!("{HEAD}{}", message(1, "1")));
        assert!(matches!(&said[..], [StreamItem::Fault(_)]), "an event before ready: {said:?}");
    }

    #[test]
    fn other_servers_are_checked_by_the_id_in_the_data() {
        let mut ledger = Ledger { foreign: true, ..Ledger::default() };
        let event_of =
            |id: u64| format!("id: 1795837858:{id}\ndata: {{\"id\":\"{id}\",\"content\":\"0017 x\"}}\n\n");
        let text = format!("{HEAD}: hi\n\n{}{}{}", event_of(3), event_of(4), event_of(6));
        let said = read(&mut ledger, &text);
        assert_eq!(said[..3], [StreamItem::Ready, event(Some(17)), event(Some(17))]);
        assert!(matches!(&said[3..], [StreamItem::Fault(_)]), "{said:?}");
    }

    #[test]
    fn reconnect_must_resume_at_its_position() {
        let position: Position = id(7).parse().unwrap();
        let back_at = |seq| {
            let mut ledger = Ledger { position: Some(position), ..Ledger::default() };
            read(&mut ledger, &format!("{HEAD}{}", ready(seq)))
        };
        assert_eq!(back_at(7), [StreamItem::Ready]);
        assert!(matches!(&back_at(8)[..], [StreamItem::Fault(_)]));
    }

    #[test]
    fn ends_and_refusals_are_distinguished() {
        let goodbye = "retry: 90000\nevent: goodbye\ndata: {\"reason\":\"busy\",\"reconnect\":true}\n\n";
        let mut ledger = Ledger::default();
        assert_eq!(read(&mut ledger, &format!("{HEAD}{goodbye}")), [StreamItem::Goodbye("busy".into())]);
        assert_eq!(ledger.retry_millis(), 90_000);
        let refused = read(&mut ledger, "HTTP/1.1 401 Unauthorized\r\n\r\n");
        assert!(matches!(&refused[..], [StreamItem::Fault(why)] if why.contains("401")));
        let resync =
            format!("{HEAD}event: ready\ndata: {{}}\n\nevent: resync\ndata: {{}}\nid: {}\n\n", id(9));
        assert_eq!(read(&mut ledger, &resync), [StreamItem::Ready, StreamItem::Resync]);
    }

    #[test]
    fn chunks_may_break_anywhere() {
        let mut ledger = Ledger::default();
        let body = format!("{}{}", ready(3), message(4, "0017 x"));
        let (first, second) = body.split_at(20);
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        let chunk = |part: &str| format!("{:x}\r\n{part}\r\n", part.len());
        let said = read(&mut ledger, &format!("{head}{}{}0\r\n\r\n", chunk(first), chunk(second)));
        assert_eq!(said, [StreamItem::Ready, event(Some(17)), StreamItem::End]);
        let alone = "HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\nretry: 3000\n\n";
        assert_eq!(read(&mut ledger, alone), [StreamItem::End]);
        assert_eq!(ledger.retry_millis(), 3_000);
        let said = read(&mut Ledger::default(), &format!("{head}no length\r\n"));
        assert!(matches!(&said[..], [StreamItem::Fault(_), ..]), "{said:?}");
    }

    #[test]
    fn ledgers_agree_only_after_the_same_events() {
        let digest_of = |texts: [&str; 2]| {
            let mut ledger = Ledger::default();
            read(&mut ledger, &format!("{HEAD}{}{}{}", ready(3), message(4, texts[0]), message(5, texts[1])));
            ledger.digest
        };
        assert_eq!(digest_of(["a", "b"]), digest_of(["a", "b"]));
        assert_ne!(digest_of(["a", "b"]), digest_of(["b", "a"]));
        let created = "{\"createdAt\":\"2026-01-02T03:04:05.000678Z\"}";
        assert_eq!(created_at(created), Some(1_767_323_045_000_678));
    }
}
