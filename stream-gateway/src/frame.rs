//! Events to bytes: the wire form of the stream (WHATWG HTML, 9.2 "Server-sent events"). Pure.
//!
//! It promises that nothing from outside can add a line to a block: fields hold no CR, LF or NUL, whatever the envelope
//! holds. An event is encoded once and shared by every connection.

use std::{fmt::Write as _, sync::Arc, time::SystemTime};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde_json::json;
use shared::{
    cursor::Cursor,
    event::{self, Envelope, kind, rfc3339},
    feed::Head,
};
use thiserror::Error;

use crate::{sequencer::Lost, traced::Traced};

/// The largest envelope that is taken from Redis, in bytes. A message of 480 code points makes some 4 KiB at most.
pub const MAX_ENVELOPE: usize = 16 * 1024;

/// What keeps proxies and dead-peer detection going while there is nothing to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Heartbeat {
    /// A comment, invisible to scripts.
    #[default]
    Comment,
    /// An event, for clients that asked: by it a script can tell a quiet stream from a dead one. It moves no cursor.
    Event,
}

impl Heartbeat {
    pub fn block(self) -> &'static [u8] {
        match self {
            Self::Comment => b":\n\n",
            Self::Event => b"event: heartbeat\ndata: {}\n\n",
        }
    }
}

/// One event of one feed, encoded.
#[derive(Debug, Clone)]
pub struct Event {
    pub head: Head,
    /// When it was made, in milliseconds since 1970, by the database's clock.
    pub created_at: i64,
    pub frame: Bytes,
    /// None, mostly: its trace is not recorded.
    pub traced: Option<Arc<Traced>>,
}

/// The envelope is of no form that this build may pass on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BadEnvelope {
    #[error("envelope of version {0}")]
    Version(u8),
    #[error("an event name that no client may get")]
    Name,
}

impl Event {
    pub fn encode(envelope: &Envelope) -> Result<Self, BadEnvelope> {
        if envelope.v != event::VERSION {
            return Err(BadEnvelope::Version(envelope.v));
        }
        let name = envelope.event.as_str();
        if !is_name(name) {
            return Err(BadEnvelope::Name);
        }
        let data = envelope.data.get();
        let mut frame = String::with_capacity(data.len() + 80);
        let _ = writeln!(frame, "id: {}", envelope.cursor());
        if name != kind::MESSAGE {
            let _ = writeln!(frame, "event: {name}");
        }
        frame.push_str("data: ");
        // Raw JSON is one value; a line break in it can only be white space between tokens.
        frame.extend(data.chars().map(|c| if matches!(c, '\r' | '\n') { ' ' } else { c }));
        frame.push_str("\n\n");
        let head = Head { epoch: envelope.epoch, seq: envelope.seq };
        let created_at = envelope.created_at.timestamp_millis();
        Ok(Self { head, created_at, frame: frame.into(), traced: None })
    }
}

/// `message` travels without a name; `error` and `open` would be mistaken for the browser's own.
fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=64).contains(&name.len()) && name.bytes().all(allowed) && !matches!(name, "error" | "open")
}

/// How long the browser waits before it reconnects, in milliseconds.
pub fn retry(millis: u32) -> String {
    format!("retry: {millis}\n\n")
}

/// The first event of a connection. Without an id when a resync follows, so that only the resync moves the cursor.
pub fn ready(
    cursor: Cursor,
    resumed: bool,
    with_id: bool,
    heartbeat_seconds: u64,
    now: SystemTime,
) -> String {
    let data = json!({
        "cursor": cursor.to_string(),
        "resumed": resumed,
        "heartbeatSeconds": heartbeat_seconds,
        "serverTime": rfc3339(DateTime::<Utc>::from(now)),
    });
    let id = if with_id { format!("id: {cursor}\n") } else { String::new() };
    format!("{id}event: ready\ndata: {data}\n\n")
}

/// The place is lost: reload by REST, go on from the head.
pub fn resync(head: Cursor, why: Lost) -> String {
    let data = json!({ "cursor": head.to_string(), "reason": why.as_str() });
    format!("id: {head}\nevent: resync\ndata: {data}\n\n")
}

/// Why a connection ends by our will, as the client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Goodbye {
    /// This process is going away.
    Drain,
    /// Over a limit.
    Busy,
    /// The right to be connected runs out with the token.
    Expired,
    /// The session has ended.
    Revoked,
    /// Old enough: reconnecting spreads the load.
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

    /// The bounds of the `retry` that goes with it, in milliseconds. Who was refused stays away for a while.
    pub fn retry(self) -> std::ops::RangeInclusive<u32> {
        match self {
            Self::Busy | Self::Replaced => 60_000..=120_000,
            Self::Drain | Self::Expired | Self::Revoked | Self::Rotate => FIRST_RETRY,
        }
    }
}

/// The bounds of the `retry` that opens every stream.
pub const FIRST_RETRY: std::ops::RangeInclusive<u32> = 2_000..=5_000;

/// The last block of a connection.
pub fn goodbye(why: Goodbye, retry_millis: u32) -> String {
    let data = json!({ "reason": why.as_str(), "reconnect": why.reconnect() });
    format!("retry: {retry_millis}\nevent: goodbye\ndata: {data}\n\n")
}

#[cfg(test)]
mod tests {
    use eventsource_stream::Eventsource;
    use futures_util::{FutureExt, StreamExt, stream};
    use proptest::prelude::*;
    use serde_json::value::RawValue;
    use shared::cursor::Epoch;

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

    fn text(bytes: &[u8]) -> &str {
        std::str::from_utf8(bytes).unwrap()
    }

    /// What a browser makes of these bytes, by somebody else's parser.
    fn parsed(bytes: &[u8]) -> Vec<eventsource_stream::Event> {
        let chunks: Vec<_> = bytes.chunks(7).map(|chunk| Ok::<_, std::io::Error>(chunk.to_vec())).collect();
        let events = stream::iter(chunks).eventsource().map(Result::unwrap).collect();
        FutureExt::now_or_never(events).expect("a stream of what is there already")
    }

    #[test]
    fn the_wire_form_is_golden() {
        let sent = Event::encode(&envelope(kind::MESSAGE_SENT, r#"{"id":"7"}"#)).unwrap();
        assert_eq!(
            text(&sent.frame),
            "id: 00000000000000ff-3\nevent: message.sent\ndata: {\"id\":\"7\"}\n\n"
        );
        let message = Event::encode(&envelope(kind::MESSAGE, r#"{"id":"7"}"#)).unwrap();
        assert_eq!(text(&message.frame), "id: 00000000000000ff-3\ndata: {\"id\":\"7\"}\n\n");
        let cursor = envelope("x", "1").cursor();
        assert_eq!(
            ready(cursor, true, true, 15, SystemTime::UNIX_EPOCH),
            "id: 00000000000000ff-3\nevent: ready\ndata: {\"cursor\":\"00000000000000ff-3\",\"heartbeatSeconds\":15,\"resumed\":true,\"serverTime\":\"1970-01-01T00:00:00.000000Z\"}\n\n"
        );
        assert!(ready(cursor, false, false, 15, SystemTime::UNIX_EPOCH).starts_with("event: ready\n"));
        assert_eq!(
            resync(cursor, Lost::Expired),
            "id: 00000000000000ff-3\nevent: resync\ndata: {\"cursor\":\"00000000000000ff-3\",\"reason\":\"expired\"}\n\n"
        );
        assert_eq!(
            goodbye(Goodbye::Drain, 2_500),
            "retry: 2500\nevent: goodbye\ndata: {\"reason\":\"drain\",\"reconnect\":true}\n\n"
        );
        assert_eq!(retry(2_000), "retry: 2000\n\n");
        assert_eq!(text(Heartbeat::Comment.block()), ":\n\n");
        assert_eq!(text(Heartbeat::Event.block()), "event: heartbeat\ndata: {}\n\n");
    }

    #[test]
    fn no_name_or_version_that_clients_could_not_take_gets_out() {
        for name in ["", "a b", "a\nb", "a\rb", "a:b", "é", "error", "open", &"x".repeat(65)] {
            assert_eq!(Event::encode(&envelope(name, "1")).unwrap_err(), BadEnvelope::Name, "{name:?}");
        }
        let other = Envelope { v: 2, ..envelope("x", "1") };
        assert_eq!(Event::encode(&other).unwrap_err(), BadEnvelope::Version(2));
    }

    /// JSON as anybody might write it: any strings, white space of any kind between tokens.
    fn raw_json() -> impl Strategy<Value = String> {
        let gap = "[ \t\r\n]{0,3}";
        (any::<String>(), any::<String>(), gap, gap, gap).prop_map(|(key, value, a, b, c)| {
            let (key, value) = (json!(key), json!(value));
            format!("{{{a}{key}{b}:{c}{value}{a}}}")
        })
    }

    proptest! {
        #[test]
        fn another_parser_reads_back_what_was_sent(json in raw_json(), name in "[a-z][a-z._-]{0,20}") {
            prop_assume!(is_name(&name));
            let mut bytes = b"retry: 2000\n\n".to_vec();
            let envelope = envelope(&name, &json);
            let frame = Event::encode(&envelope).unwrap().frame;
            bytes.extend_from_slice(&frame);
            bytes.extend_from_slice(Heartbeat::Comment.block());
            bytes.extend_from_slice(&frame);
            let events = parsed(&bytes);
            prop_assert_eq!(events.len(), 2);
            for event in events {
                prop_assert_eq!(&event.id, "00000000000000ff-3");
                prop_assert_eq!(&event.event, &name);
                let sent: serde_json::Value = serde_json::from_str(&json).unwrap();
                prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&event.data).unwrap(), sent);
            }
        }

        #[test]
        fn a_frame_is_one_block_whatever_the_data(json in raw_json()) {
            let frame = Event::encode(&envelope("x", &json)).unwrap().frame;
            let text = text(&frame);
            prop_assert!(text.ends_with("\n\n"));
            prop_assert_eq!(text.matches('\n').count(), 4);
            prop_assert!(!text.contains(['\r', '\0']));
        }
    }
}
