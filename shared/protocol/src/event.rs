//! The envelope: an event of a user's feed in a Redis message or the answer to a range. `api` encodes it once; a gateway turns it into
//! its SSE frame once.

use std::borrow::Cow;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{
    ids::SessionId,
    position::{Epoch, Position, Seq},
};

/// A gateway cannot deliver an unknown version and makes its readers reload, so a new version is deployed to gateways first.
pub const VERSION: u8 = 1;

/// Event names. [`MESSAGE`] has no name on the stream, so that `onmessage` receives it.
pub mod kind {
    pub const MESSAGE: &str = "message";
    pub const MESSAGE_SENT: &str = "message.sent";
    pub const CONVERSATION_CREATED: &str = "conversation.created";
    pub const CONVERSATION_READ: &str = "conversation.read";
    pub const RECEIPT_READ: &str = "receipt.read";
    pub const MESSAGE_UPDATED: &str = "message.updated";
    pub const MESSAGE_DELETED: &str = "message.deleted";
    pub const CONVERSATION_UPDATED: &str = "conversation.updated";
    pub const PARTICIPANT_JOINED: &str = "participant.joined";
    pub const PARTICIPANT_LEFT: &str = "participant.left";
    pub const PARTICIPANT_UPDATED: &str = "participant.updated";
    pub const USER_UPDATED: &str = "user.updated";
    pub const TYPING: &str = "typing";
    pub const PRESENCE: &str = "presence";
}

/// The first segments of names that events of other back ends cannot have, in any case: ours, and those with a meaning for browsers.
pub const RESERVED: [&str; 12] = [
    "message",
    "conversation",
    "participant",
    "receipt",
    "user",
    "typing",
    "presence",
    "ready",
    "resync",
    "goodbye",
    "error",
    "open",
];

/// Whether an event of this name is ours, and not another back end's.
pub fn is_reserved(name: &str) -> bool {
    let first = name.split(['.', '_', ':', '-']).next().unwrap_or_default();
    RESERVED.iter().any(|reserved| first.eq_ignore_ascii_case(reserved))
}

/// One event of one user's feed. Unknown members are ignored, so that a newer `api` can add some.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Envelope {
    /// Always [`VERSION`].
    pub v: u8,
    pub epoch: Epoch,
    pub seq: Seq,
    /// One of [`kind`], or a name unknown to this build, which is delivered all the same.
    pub event: String,
    /// By the database's clock.
    pub created_at: DateTime<Utc>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// One line of JSON, ready to send. The last member, so that the beginnings of slow commands that Redis records (128 bytes of each
    /// argument) end before a message's text, which may be deleted later.
    pub data: Box<RawValue>,
}

/// The same, borrowed from the JSON of a message or from an [`Envelope`].
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EnvelopeRef<'a> {
    pub v: u8,
    pub epoch: Epoch,
    pub seq: Seq,
    #[serde(borrow)]
    pub event: Cow<'a, str>,
    #[serde(borrow)]
    pub data: &'a RawValue,
    pub created_at: DateTime<Utc>,
    #[serde(borrow, default)]
    pub request_id: Option<Text<'a>>,
    #[serde(borrow, default)]
    pub traceparent: Option<Text<'a>>,
}

/// Owned only if the JSON has escapes in it. In an option, a `Cow` alone would always be owned.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Text<'a>(#[serde(borrow)] pub Cow<'a, str>);

impl<'a> From<&'a str> for Text<'a> {
    fn from(text: &'a str) -> Self {
        Self(text.into())
    }
}

impl Envelope {
    pub fn cursor(&self) -> Position {
        Position { epoch: self.epoch, seq: self.seq }
    }

    pub fn borrowed(&self) -> EnvelopeRef<'_> {
        EnvelopeRef {
            v: self.v,
            epoch: self.epoch,
            seq: self.seq,
            event: self.event.as_str().into(),
            data: &self.data,
            created_at: self.created_at,
            request_id: self.request_id.as_deref().map(Text::from),
            traceparent: self.traceparent.as_deref().map(Text::from),
        }
    }
}

impl EnvelopeRef<'_> {
    pub fn cursor(&self) -> Position {
        Position { epoch: self.epoch, seq: self.seq }
    }
}

/// RFC 3339, UTC, `Z`, microseconds: every time in JSON, and what SQL `rfc3339()` writes.
pub fn rfc3339(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Micros, true)
}

/// Bytes of an ephemeral event's message on a channel: room for the 48 KiB that another back end may publish. A longer one is dropped: it
/// would delay the events of the feed behind it.
pub const LARGEST_EPHEMERAL: usize = 50 * 1024;

/// An event without a position, such as who types: Redis alone carries it to the streams that are live now. It is in no feed, so its
/// loss is noticed by nobody.
#[derive(Debug, Serialize)]
pub struct Ephemeral<'a> {
    /// The name, and the first member: see [`Self::is_one`].
    pub ephemeral: &'a str,
    /// Always [`VERSION`].
    pub v: u8,
    /// One line of JSON, ready to send.
    pub data: &'a RawValue,
}

/// The same, borrowed from the JSON of a message.
#[derive(Debug, Clone, Deserialize)]
pub struct EphemeralRef<'a> {
    #[serde(borrow)]
    pub ephemeral: Cow<'a, str>,
    pub v: u8,
    #[serde(borrow)]
    pub data: &'a RawValue,
}

impl Ephemeral<'_> {
    /// Whether the message is no event of a feed, without parsing it: a gateway that is behind must tell which ones it has to recover.
    pub fn is_one(json: &[u8]) -> bool {
        json.starts_with(br#"{"ephemeral":"#)
    }
}

#[derive(Debug)]
pub enum Notice<'a> {
    Event(EnvelopeRef<'a>),
    /// Gateways from before November 2026 take it for a message that they cannot read, and compare the user's head with `api`'s.
    Ephemeral(EphemeralRef<'a>),
    Revoked(Revoked),
}

/// A session has ended, and its streams must. Best effort: reconciles find it too.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Revoked {
    pub revoked: SessionId,
}

impl<'a> Notice<'a> {
    pub fn from_json(json: &'a [u8]) -> serde_json::Result<Self> {
        if Ephemeral::is_one(json) {
            return serde_json::from_slice(json).map(Self::Ephemeral);
        }
        // Not an untagged enum: raw JSON survives no buffering.
        match serde_json::from_slice(json) {
            Ok(envelope) => Ok(Self::Event(envelope)),
            Err(error) => serde_json::from_slice(json).map(Self::Revoked).map_err(|_| error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{"v":1,"epoch":"00000000000000ff","seq":3,"event":"message","data":{"id":"7"},"createdAt":"2026-01-02T03:04:05.000006Z","requestId":"r1"}"#;

    #[test]
    fn the_envelope_keeps_its_form() {
        let envelope: Envelope = serde_json::from_str(TEXT).unwrap();
        assert_eq!(envelope.cursor().to_string(), "00000000000000ff-3");
        assert_eq!(envelope.data.get(), r#"{"id":"7"}"#);
        assert_eq!(rfc3339(envelope.created_at), "2026-01-02T03:04:05.000006Z");
        let again: Envelope = serde_json::from_str(&serde_json::to_string(&envelope).unwrap()).unwrap();
        assert_eq!(again.cursor(), envelope.cursor());
    }

    #[test]
    fn a_message_is_read_without_copies_of_its_texts() {
        let read: EnvelopeRef = serde_json::from_str(TEXT).unwrap();
        assert!(matches!(
            (&read.event, &read.request_id),
            (Cow::Borrowed(_), Some(Text(Cow::Borrowed("r1"))))
        ));
        assert!(TEXT.as_bytes().as_ptr_range().contains(&read.data.get().as_ptr()));
        let envelope: Envelope = serde_json::from_str(TEXT).unwrap();
        assert_eq!(format!("{:?}", envelope.borrowed()), format!("{read:?}"));
        let escaped = TEXT.replace("r1", r"r\u0031");
        let read: EnvelopeRef = serde_json::from_str(&escaped).unwrap();
        assert_eq!(read.request_id, Some(Text("r1".into())));
    }

    #[test]
    fn notice_is_an_event_or_a_revocation() {
        assert!(matches!(Notice::from_json(TEXT.as_bytes()), Ok(Notice::Event(_))));
        let revoked = Notice::from_json(br#"{"revoked":"5"}"#);
        assert!(matches!(revoked, Ok(Notice::Revoked(Revoked { revoked: SessionId(5) }))));
        assert!(Notice::from_json(b"{}").is_err());
    }

    #[test]
    fn an_ephemeral_event_is_recognised_by_its_beginning() {
        let data = RawValue::from_string(r#"{"userId":"7"}"#.into()).unwrap();
        let json = serde_json::to_vec(&Ephemeral { ephemeral: "typing", v: VERSION, data: &data }).unwrap();
        assert_eq!(json, br#"{"ephemeral":"typing","v":1,"data":{"userId":"7"}}"#);
        let Ok(Notice::Ephemeral(read)) = Notice::from_json(&json) else { panic!("not ephemeral") };
        assert_eq!((&*read.ephemeral, read.v, read.data.get()), ("typing", VERSION, data.get()));
        assert!(Notice::from_json(br#"{"ephemeral":"typing"}"#).is_err());
        assert!(!Ephemeral::is_one(TEXT.as_bytes()));
    }

    #[test]
    fn names_of_our_own_events_are_reserved() {
        for reserved in
            [kind::MESSAGE, kind::MESSAGE_SENT, kind::USER_UPDATED, "Typing_x", "OPEN:x", "error-1"]
        {
            assert!(is_reserved(reserved), "{reserved}");
        }
        for free in ["order.message", "messages", "opened.x", ""] {
            assert!(!is_reserved(free), "{free}");
        }
    }

    #[test]
    fn members_of_a_newer_api_are_ignored() {
        let newer = TEXT.replacen('{', r#"{"colour":"red","#, 1);
        assert!(serde_json::from_str::<Envelope>(&newer).is_ok());
    }
}
