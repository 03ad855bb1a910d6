//! The wire form of the stream (WHATWG HTML, 9.2 "Server-sent events"; RFC 9112, 7.1 "Chunked Transfer Coding"). Pure.
//!
//! No envelope can add a line to a block: fields contain no CR, LF or NUL, and no other character that some readers treat as a
//! line end. An event is encoded once and shared by every connection.
//!
//! The lines of a block are `retry`, `event`, `data`, `id`, in this order: widely used readers store an id when they read its
//! line, so an id before its data would skip an event whose block is cut between the two.

use std::{
    borrow::Cow,
    fmt::Write as _,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use http::Version;
use protocol::{
    event::{self, EnvelopeRef, EphemeralRef, kind, rfc3339},
    position::Position,
};
use serde_json::json;
use thiserror::Error;

/// The largest envelope accepted from Redis, in bytes: of an event of another back end, with 48 KiB of data. Beyond it an event is read
/// from the feed.
pub const MAX_ENVELOPE: usize = 64 * 1024;

/// A block of the stream, framed as one chunk of an HTTP/1.1 body. Every connection gets the same bytes.
#[derive(Debug, Clone)]
pub struct Chunk(Bytes);

impl Chunk {
    pub fn new(text: &str) -> Self {
        Self::concat(&[text])
    }

    fn concat(parts: &[&str]) -> Self {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let digits = length.checked_ilog2().map_or(1, |log| log as usize / 4 + 1);
        let mut chunk = String::with_capacity(digits + "\r\n".len() + length + "\r\n".len());
        let _ = write!(chunk, "{length:x}\r\n");
        parts.iter().for_each(|part| chunk.push_str(part));
        chunk.push_str("\r\n");
        Self(chunk.into())
    }

    /// Bytes on the wire.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// Marks the end of the body (RFC 9112, 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// By the last chunk. The gateway sends it whenever it ends a stream itself; a body without it was cut.
    Chunked,
    /// By the end of the connection. HTTP/1.0 has no chunks.
    Close,
}

impl Framing {
    pub fn of(version: Version) -> Self {
        if version >= Version::HTTP_11 { Self::Chunked } else { Self::Close }
    }

    pub fn bytes(self, chunk: &Chunk) -> Bytes {
        let Chunk(bytes) = chunk;
        match self {
            Self::Chunked => bytes.clone(),
            Self::Close => {
                let length = bytes.iter().position(|byte| *byte == b'\n').map_or(0, |end| end + 1);
                bytes.slice(length..bytes.len() - b"\r\n".len())
            }
        }
    }

    /// The last chunk, if there are chunks.
    pub fn end(self) -> &'static [u8] {
        match self {
            Self::Chunked => b"0\r\n\r\n",
            Self::Close => b"",
        }
    }

    /// This chunk, and the end of the body after it.
    pub fn last(self, chunk: &Chunk) -> Bytes {
        [&self.bytes(chunk), self.end()].concat().into()
    }
}

/// The heartbeat that a client requested. It keeps proxies from closing an idle connection.
/// In one byte, because every stream has one: the seconds between comments, or one of the constants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Heartbeat(u8);

impl Heartbeat {
    /// A comment line, invisible to scripts. No empty line follows, because some readers would see an empty event. So the comment
    /// is part of the next block: before its first line, or between `retry` and `ready`.
    pub const COMMENT: Self = Self(0);
    /// An event, by which a script can distinguish an idle stream from a dead one. It moves no cursor.
    pub const EVENT: Self = Self(u8::MAX);

    /// Comments at an interval that the client chose, below [`u8::MAX`].
    pub const fn every_seconds(seconds: u8) -> Self {
        Self(seconds)
    }

    pub fn interval(self, default: Duration) -> Duration {
        let chosen = !matches!(self, Self::COMMENT | Self::EVENT);
        if chosen { Duration::from_secs(self.0.into()) } else { default }
    }

    pub fn chunk(self) -> Chunk {
        Chunk(Bytes::from_static(match self {
            Self::EVENT => b"1b\r\nevent: heartbeat\ndata: {}\n\n\r\n",
            _ => b"2\r\n:\n\r\n",
        }))
    }
}

/// This build cannot send the envelope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum InvalidEnvelope {
    #[error("envelope of version {0}")]
    Version(u8),
    #[error("an event name that no client may get")]
    Name,
}

pub fn encode(envelope: &EnvelopeRef<'_>) -> Result<Chunk, InvalidEnvelope> {
    if envelope.v != event::VERSION {
        return Err(InvalidEnvelope::Version(envelope.v));
    }
    let name = &*envelope.event;
    if !is_name(name) {
        return Err(InvalidEnvelope::Name);
    }
    let (before_name, name) = if name == kind::MESSAGE { ("", "") } else { ("event: ", name) };
    let data = without_line_ends(envelope.data.get());
    let cursor = envelope.cursor().to_string();
    let after_name = if name.is_empty() { "data: " } else { "\ndata: " };
    Ok(Chunk::concat(&[before_name, name, after_name, &data, "\nid: ", &cursor, "\n\n"]))
}

/// A block without an id, so it moves no cursor.
pub fn encode_ephemeral(event: &EphemeralRef<'_>) -> Result<Chunk, InvalidEnvelope> {
    if event.v != event::VERSION {
        return Err(InvalidEnvelope::Version(event.v));
    }
    let name = &*event.ephemeral;
    if !is_name(name) || name == kind::MESSAGE {
        return Err(InvalidEnvelope::Name);
    }
    Ok(Chunk::concat(&["event: ", name, "\ndata: ", &without_line_ends(event.data.get()), "\n\n"]))
}

/// JSON on one line.
fn without_line_ends(json: &str) -> Cow<'_, str> {
    // 0xC2 and 0xE2 begin the ones of Unicode.
    if !json.bytes().any(|byte| matches!(byte, b'\r' | b'\n' | 0xc2 | 0xe2)) {
        return json.into();
    }
    let mut line = String::with_capacity(json.len() + 16);
    for part in json.split_inclusive(ends_a_line) {
        let text = part.strip_suffix(ends_a_line).unwrap_or(part);
        line.push_str(text);
        for end in part[text.len()..].chars() {
            match end {
                // Raw JSON is one value; a line break in it can only be white space between tokens.
                '\r' | '\n' => line.push(' '),
                // The others occur only inside strings.
                end => _ = write!(line, "\\u{:04x}", u32::from(end)),
            }
        }
    }
    line.into()
}

/// CR and LF end a line of the stream. The others end one in Unicode, and so for readers that split lines by its rules.
fn ends_a_line(c: char) -> bool {
    matches!(c, '\r' | '\n' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

/// `error` and `open` would be mistaken for the browser's own events.
fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b':' | b'-');
    (1..=128).contains(&name.len()) && name.bytes().all(allowed) && !matches!(name, "error" | "open")
}

/// The browser's reconnect delay, in milliseconds. The line is sent immediately and is the first one of the first block: many readers would take a block of its own for an event without data.
pub fn retry(millis: u32) -> Chunk {
    Chunk::new(&format!("retry: {millis}\n"))
}

/// The first event of a connection. Without an id when a resync follows, so that only the resync moves the cursor.
pub fn ready(cursor: Position, resumed: bool, with_id: bool, heartbeat: Duration, now: SystemTime) -> Chunk {
    let (seconds, time) = (heartbeat.as_secs(), rfc3339(DateTime::<Utc>::from(now)));
    let cursor = cursor.to_string();
    // None of the values needs an escape.
    let data = format!(
        r#"{{"cursor":"{cursor}","heartbeatSeconds":{seconds},"resumed":{resumed},"serverTime":"{time}"}}"#
    );
    let id = if with_id { ["id: ", &cursor, "\n"] } else { [""; 3] };
    Chunk::concat(&["event: ready\ndata: ", &data, "\n", id[0], id[1], id[2], "\n"])
}

/// Why a client must reload, in the words of docs/api.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ResyncReason {
    /// The feed has another epoch.
    Unknown,
    /// Events after the position are no longer kept.
    Expired,
    /// The position is beyond the head: the database went back.
    Future,
}

impl ResyncReason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Expired => "expired",
            Self::Future => "future",
        }
    }
}

/// The client must reload by REST and continue from the head.
pub fn resync(head: Position, why: ResyncReason) -> Chunk {
    let data = json!({ "cursor": head.to_string(), "reason": why.as_str() });
    Chunk::new(&format!("event: resync\ndata: {data}\nid: {head}\n\n"))
}

/// Why the gateway closes a stream, as sent to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Goodbye {
    /// This process takes no streams now: it is going away, or it has no public keys yet. Both pass in seconds.
    Drain,
    /// Over a limit.
    Busy,
    /// The token expires.
    Expired,
    /// The session has ended.
    Revoked,
    /// Reached its age limit: reconnecting spreads the load.
    Rotate,
    /// The user opened more streams than are allowed; this was the oldest.
    Replaced,
}

impl Goodbye {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Drain => "drain",
            Self::Busy => "busy",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
            Self::Rotate => "rotate",
            Self::Replaced => "replaced",
        }
    }

    /// Whether reconnecting with the same credential can succeed.
    fn reconnect(self) -> bool {
        !matches!(self, Self::Expired | Self::Revoked)
    }

    /// The bounds of its `retry`, in milliseconds. Long ones keep rejected clients away, because many readers ignore `reconnect`.
    pub fn retry(self) -> std::ops::RangeInclusive<u32> {
        match self {
            Self::Busy | Self::Replaced => 60_000..=120_000,
            Self::Drain | Self::Rotate => FIRST_RETRY,
            Self::Expired | Self::Revoked => AN_HOUR..=AN_HOUR,
        }
    }
}

/// The bounds of the `retry` that opens every stream.
pub const FIRST_RETRY: std::ops::RangeInclusive<u32> = 2_000..=5_000;

const AN_HOUR: u32 = 3_600_000;

/// The last block of a connection, with a `retry` of its own.
pub fn goodbye(why: Goodbye, retry_millis: u32) -> Chunk {
    let data = json!({ "reason": why.as_str(), "reconnect": why.reconnect() });
    Chunk::new(&format!("retry: {retry_millis}\nevent: goodbye\ndata: {data}\n\n"))
}

#[cfg(test)]
mod tests {
    use eventsource_stream::Eventsource;
    use futures_util::{FutureExt, StreamExt, stream};
    use proptest::prelude::*;
    use protocol::{event::Envelope, position::Epoch};
    use serde_json::value::RawValue;

    use super::*;

    fn envelope(event: &str, data: &str) -> Envelope {
        Envelope {
            v: event::VERSION,
            epoch: Epoch(255),
            seq: 3,
            event: event.into(),
            data: RawValue::from_string(data.into()).unwrap(),
            created_at: DateTime::UNIX_EPOCH,
            request_id: None,
            traceparent: None,
        }
    }

    /// The block without its chunk framing.
    fn text(chunk: &Chunk) -> String {
        String::from_utf8(Framing::Close.bytes(chunk).into()).unwrap()
    }

    /// Parses the bytes as a browser does, with an independent parser.
    fn parsed(bytes: &[u8]) -> Vec<eventsource_stream::Event> {
        let chunks: Vec<_> = bytes.chunks(7).map(|chunk| Ok::<_, std::io::Error>(chunk.to_vec())).collect();
        let events = stream::iter(chunks).eventsource().map(Result::unwrap).collect();
        FutureExt::now_or_never(events).expect("the stream is complete")
    }

    #[test]
    fn the_wire_form_is_fixed() {
        let sent = encode(&envelope(kind::MESSAGE_SENT, r#"{"id":"7"}"#).borrowed()).unwrap();
        assert_eq!(text(&sent), "event: message.sent\ndata: {\"id\":\"7\"}\nid: 00000000000000ff-3\n\n");
        let message = encode(&envelope(kind::MESSAGE, r#"{"id":"7"}"#).borrowed()).unwrap();
        assert_eq!(text(&message), "data: {\"id\":\"7\"}\nid: 00000000000000ff-3\n\n");
        let cursor = envelope("x", "1").cursor();
        let every = Duration::from_secs(15);
        assert_eq!(
            text(&ready(cursor, true, true, every, SystemTime::UNIX_EPOCH)),
            "event: ready\ndata: {\"cursor\":\"00000000000000ff-3\",\"heartbeatSeconds\":15,\"resumed\":true,\"serverTime\":\"1970-01-01T00:00:00.000000Z\"}\nid: 00000000000000ff-3\n\n"
        );
        assert!(!text(&ready(cursor, false, false, every, SystemTime::UNIX_EPOCH)).contains("id: "));
        assert_eq!(
            text(&resync(cursor, ResyncReason::Expired)),
            "event: resync\ndata: {\"cursor\":\"00000000000000ff-3\",\"reason\":\"expired\"}\nid: 00000000000000ff-3\n\n"
        );
        assert_eq!(
            text(&goodbye(Goodbye::Drain, 2_500)),
            "retry: 2500\nevent: goodbye\ndata: {\"reason\":\"drain\",\"reconnect\":true}\n\n"
        );
        assert_eq!(text(&retry(2_000)), "retry: 2000\n");
        assert_eq!(text(&Heartbeat::COMMENT.chunk()), ":\n");
        assert_eq!(text(&Heartbeat::EVENT.chunk()), "event: heartbeat\ndata: {}\n\n");
    }

    fn ephemeral<'a>(name: &'a str, data: &'a RawValue) -> EphemeralRef<'a> {
        EphemeralRef { ephemeral: name.into(), v: event::VERSION, data }
    }

    #[test]
    fn an_ephemeral_event_has_a_name_and_no_id() {
        let data = RawValue::from_string("{\"a\":\n\"b\u{2028}\"}".into()).unwrap();
        let typing = ephemeral("typing", &data);
        assert_eq!(
            text(&encode_ephemeral(&typing).unwrap()),
            "event: typing\ndata: {\"a\": \"b\\u2028\"}\n\n"
        );
        for name in ["", "a\nb", "error", "open", "message"] {
            assert_eq!(encode_ephemeral(&ephemeral(name, &data)).unwrap_err(), InvalidEnvelope::Name);
        }
        let other = EphemeralRef { v: 2, ..typing };
        assert_eq!(encode_ephemeral(&other).unwrap_err(), InvalidEnvelope::Version(2));
    }

    #[test]
    fn a_block_is_one_chunk_and_the_last_chunk_is_empty() {
        let message = encode(&envelope(kind::MESSAGE, r#"{"id":"7"}"#).borrowed()).unwrap();
        let bytes = "29\r\ndata: {\"id\":\"7\"}\nid: 00000000000000ff-3\n\n\r\n";
        assert_eq!(Framing::Chunked.bytes(&message), bytes);
        assert_eq!(Framing::Chunked.last(&message), format!("{bytes}0\r\n\r\n"));
        assert_eq!(Framing::Close.last(&message), Framing::Close.bytes(&message), "no chunks, no last one");
        for heartbeat in [Heartbeat::COMMENT, Heartbeat::EVENT] {
            let (fixed, made) = (heartbeat.chunk(), Chunk::new(&text(&heartbeat.chunk())));
            assert_eq!(fixed.0, made.0, "its length is right");
        }
    }

    #[test]
    fn a_chunk_is_the_same_bytes_for_every_receiver() {
        let message = encode(&envelope(kind::MESSAGE, "{}").borrowed()).unwrap();
        let at = |framing: Framing| framing.bytes(&message).as_ptr_range();
        assert_eq!(at(Framing::Chunked), at(Framing::Chunked));
        assert!(at(Framing::Chunked).contains(&at(Framing::Close).start));
    }

    #[test]
    fn a_goodbye_without_reconnect_carries_an_hour() {
        for why in [Goodbye::Expired, Goodbye::Revoked] {
            assert_eq!((why.reconnect(), why.retry()), (false, 3_600_000..=3_600_000));
        }
    }

    #[test]
    fn invalid_event_names_and_versions_are_not_sent() {
        for name in ["", "a b", "a\nb", "a\rb", "a\u{0}b", "é", "error", "open", &"x".repeat(129)] {
            assert_eq!(
                encode(&envelope(name, "1").borrowed()).unwrap_err(),
                InvalidEnvelope::Name,
                "{name:?}"
            );
        }
        let other = Envelope { v: 2, ..envelope("x", "1") };
        assert_eq!(encode(&other.borrowed()).unwrap_err(), InvalidEnvelope::Version(2));
    }

    /// JSON with any strings and any white space between tokens.
    fn raw_json() -> impl Strategy<Value = String> {
        let gap = "[ \t\r\n]{0,3}";
        (any::<String>(), any::<String>(), gap, gap, gap).prop_map(|(key, value, a, b, c)| {
            let (key, value) = (json!(key), json!(value));
            format!("{{{a}{key}{b}:{c}{value}{a}}}")
        })
    }

    /// The line ends of Unicode, as Python's `splitlines` has them.
    const LINE_ENDS: [char; 10] =
        ['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}'];

    proptest! {
        #[test]
        fn another_parser_reads_back_what_was_sent(json in raw_json(), name in "[a-zA-Z][a-z0-9:._-]{0,20}") {
            prop_assume!(is_name(&name));
            let frame = encode(&envelope(&name, &json).borrowed()).unwrap();
            let comment = Heartbeat::COMMENT.chunk();
            let texts = [&retry(2_000), &comment, &frame, &comment, &comment, &frame].map(text);
            let events = parsed(texts.concat().as_bytes());
            prop_assert_eq!(events.len(), 2);
            for event in events {
                prop_assert_eq!(&event.id, "00000000000000ff-3");
                prop_assert_eq!(&event.event, &name);
                let sent: serde_json::Value = serde_json::from_str(&json).unwrap();
                prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&event.data).unwrap(), sent);
            }
        }

        #[test]
        fn a_frame_is_one_block_whatever_the_data(
            json in raw_json(),
            ends in proptest::sample::subsequence(&LINE_ENDS[..], 0..10),
        ) {
            let text_with_ends = json!(String::from_iter(ends));
            let json = format!("{{\"a\":{json},\"b\":{text_with_ends}}}");
            let frame = text(&encode(&envelope("x", &json).borrowed()).unwrap());
            prop_assert!(frame.ends_with("\n\n"));
            let lines: Vec<_> = frame.split(LINE_ENDS).collect();
            let fields: Vec<_> = lines.iter().map(|line| line.split(": ").next().unwrap_or_default()).collect();
            prop_assert_eq!(fields, ["event", "data", "id", "", ""]);
            prop_assert!(!frame.contains('\0'));
            let sent: serde_json::Value = serde_json::from_str(&json).unwrap();
            let data = lines[1].trim_start_matches("data: ");
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(data).unwrap(), sent);
        }
    }
}
