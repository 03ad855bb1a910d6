//! Events that other back ends publish: receivers, names, data and keys. SQL `check_event()` has the same rules.

use protocol::{event::is_reserved, ids::UserId};
use serde::Serialize;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use thiserror::Error;

use super::name::may_be_a_name;

/// Receivers in one request, over all of its events.
pub const MOST_RECEIVERS: usize = 1_000;
/// Bytes, as clients get it: some readers hold a line of the stream in 64 KiB.
pub const LARGEST_DATA: usize = 48 * 1024;
const LONGEST_NAME: usize = 128;
const LONGEST_SUBJECT: usize = 255;
/// Bytes of a cloud event's `source`, and of its `id`.
const LONGEST_OF_CLOUD_EVENT: usize = 1024;

#[derive(Debug)]
pub struct Published {
    /// Each once.
    pub to: Vec<Receiver>,
    pub name: EventName,
    pub data: EventData,
    pub key: Option<EventKey>,
    /// In no feed.
    pub is_ephemeral: bool,
}

/// As the request names them, and as the answer names unknown ones.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Receiver {
    UserId(String),
    /// Of the external issuer.
    Subject(String),
    Username(String),
}

impl Receiver {
    /// `None`: no user has it.
    pub fn user_id(&self) -> Option<UserId> {
        match self {
            Self::UserId(id) => id.parse().ok(),
            _ => None,
        }
    }

    pub fn subject(&self) -> Option<&str> {
        if let Self::Subject(subject) = self { Some(subject) } else { None }
    }

    /// `None` also for one that no user can have.
    pub fn username(&self) -> Option<&str> {
        match self {
            Self::Username(name) if may_be_a_name(name) => Some(name),
            _ => None,
        }
    }

    pub fn check(&self) -> Result<(), BadSubject> {
        match self {
            Self::Subject(subject) => check_subject(subject),
            _ => Ok(()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("A subject has at most {LONGEST_SUBJECT} bytes, and no U+0000")]
pub struct BadSubject;

fn check_subject(subject: &str) -> Result<(), BadSubject> {
    if subject.len() <= LONGEST_SUBJECT && !subject.contains('\0') { Ok(()) } else { Err(BadSubject) }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventName(String);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BadEventName {
    #[error(
        "An event needs a name of letters and digits, in segments divided by one of . _ : -, of at most {LONGEST_NAME} bytes"
    )]
    Form,
    #[error("The first segment of this name is reserved for our own events")]
    Reserved,
}

impl EventName {
    pub fn parse(name: &str) -> Result<Self, BadEventName> {
        let is_segment =
            |segment: &str| !segment.is_empty() && segment.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let begins_well = name.as_bytes().first().is_some_and(u8::is_ascii_alphabetic);
        if name.len() > LONGEST_NAME || !begins_well || !name.split(['.', '_', ':', '-']).all(is_segment) {
            return Err(BadEventName::Form);
        }
        if is_reserved(name) { Err(BadEventName::Reserved) } else { Ok(Self(name.to_owned())) }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// One line of JSON.
#[derive(Debug)]
pub struct EventData(Box<RawValue>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BadEventData {
    #[error("The data has a lone surrogate")]
    LoneSurrogate,
    #[error("The data has U+0000")]
    Nul,
    #[error("The data is too long. {LARGEST_DATA} bytes max")]
    TooLong,
}

impl EventData {
    pub fn null() -> Self {
        Self(RawValue::NULL.to_owned())
    }

    /// `json` is valid. Token for token, without white space between the tokens.
    pub fn new(json: &str) -> Result<Self, BadEventData> {
        let mut compact = String::with_capacity(json.len());
        let mut rest = json;
        while let Some(at) = rest.find('"') {
            push_tokens(&mut compact, &rest[..at]);
            let length = string_length(&rest[at..])?;
            compact.push_str(&rest[at..at + length]);
            rest = &rest[at + length..];
        }
        push_tokens(&mut compact, rest);
        if written(&compact) > LARGEST_DATA {
            return Err(BadEventData::TooLong);
        }
        Ok(Self(RawValue::from_string(compact).expect("only white space between tokens is gone")))
    }

    pub fn as_str(&self) -> &str {
        self.0.get()
    }

    pub fn raw(&self) -> &RawValue {
        &self.0
    }
}

/// Bytes in a frame: three characters, which end a line for some readers, are written as escapes there.
fn written(json: &str) -> usize {
    let more = |c| match c {
        '\u{85}' => 4,
        '\u{2028}' | '\u{2029}' => 3,
        _ => 0,
    };
    json.len() + json.chars().map(more).sum::<usize>()
}

fn push_tokens(compact: &mut String, json: &str) {
    compact.extend(json.chars().filter(|c| !matches!(c, ' ' | '\t' | '\n' | '\r')));
}

/// Bytes of the string with which `json` begins, its quotes included.
fn string_length(json: &str) -> Result<usize, BadEventData> {
    let bytes = json.as_bytes();
    let unit = |at: usize| {
        let is_escape = bytes.get(at..at + 2) == Some(br"\u");
        json.get(at + 2..at + 6).filter(|_| is_escape).and_then(|hex| u16::from_str_radix(hex, 16).ok())
    };
    let mut at = 1;
    loop {
        match (bytes.get(at), unit(at)) {
            // It is valid JSON, so there is one.
            (None, _) => return Ok(at),
            (Some(b'"'), _) => return Ok(at + 1),
            (_, Some(0)) => return Err(BadEventData::Nul),
            (_, Some(0xd800..0xdc00)) if matches!(unit(at + 6), Some(0xdc00..0xe000)) => at += 12,
            (_, Some(0xd800..0xe000)) => return Err(BadEventData::LoneSurrogate),
            (Some(b'\\'), _) => at += 2,
            (Some(_), _) => at += 1,
        }
    }
}

/// What recognises a repeat: 128 bits of the key's SHA-256.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventKey([u8; 16]);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("A key is 1 to 128 visible ASCII characters")]
pub struct BadEventKey;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BadSourceOrId {
    #[error("A CloudEvent needs a source without white space, of at most {LONGEST_OF_CLOUD_EVENT} bytes")]
    Source,
    #[error("A CloudEvent needs an id of at most {LONGEST_OF_CLOUD_EVENT} bytes")]
    Id,
}

impl EventKey {
    pub fn parse(key: &str) -> Result<Self, BadEventKey> {
        let is_key = (1..=128).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic());
        if is_key { Ok(Self::of(key)) } else { Err(BadEventKey) }
    }

    /// `source id`: other keys have no space, and a source has none.
    pub fn of_cloud_event(source: &str, id: &str) -> Result<Self, BadSourceOrId> {
        let fits = |text: &str| (1..=LONGEST_OF_CLOUD_EVENT).contains(&text.len());
        if !fits(source) || source.contains(char::is_whitespace) {
            return Err(BadSourceOrId::Source);
        }
        if !fits(id) {
            return Err(BadSourceOrId::Id);
        }
        Ok(Self::of(&format!("{source} {id}")))
    }

    fn of(key: &str) -> Self {
        Self(*Sha256::digest(key).first_chunk().expect("SHA-256 has 32 bytes"))
    }

    pub fn hash(&self) -> &[u8; 16] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn event_names_have_a_form_and_are_not_ours() {
        for good in ["a", "A1.b2_c:d-4", &"x".repeat(128), "messages", "my.message"] {
            assert_eq!(EventName::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", "1a", "a..b", "a.", ".a", "a b", "ä", "a\n", "a._b", &"x".repeat(129)] {
            assert_eq!(EventName::parse(bad), Err(BadEventName::Form), "{bad:?}");
        }
        for reserved in ["message", "Message.x", "ERROR-x", "typing_x", "user:x", "presence"] {
            assert_eq!(EventName::parse(reserved), Err(BadEventName::Reserved), "{reserved}");
        }
    }

    #[test]
    fn data_is_kept_token_for_token() {
        for (json, kept) in [
            ("null", "null"),
            (
                " { \"b\" : 1.50 ,\n\"a\":\t[ 1e400, -0, \"x \\\" \\u00e9\\\\\" ] , \"b\": \" \" } ",
                "{\"b\":1.50,\"a\":[1e400,-0,\"x \\\" \\u00e9\\\\\"],\"b\":\" \"}",
            ),
            (r#""\ud83d\ude00 \\u0000 é""#, r#""\ud83d\ude00 \\u0000 é""#),
        ] {
            assert_eq!(EventData::new(json).unwrap().as_str(), kept);
        }
        for json in [r#"["\u0000"]"#, r#"{"\u0000":1}"#] {
            assert_eq!(EventData::new(json).unwrap_err(), BadEventData::Nul);
        }
        for json in [r#""\ud800""#, r#""\udc00""#, r#""\ud83d\ud83d""#, r#""\uD83Dx""#, r#"{"\ud800\n":1}"#] {
            assert_eq!(EventData::new(json).unwrap_err(), BadEventData::LoneSurrogate, "{json}");
        }
        let of = |length: usize| EventData::new(&format!(" \"{}\" ", "x".repeat(length - 2)));
        assert!(of(LARGEST_DATA).is_ok());
        assert_eq!(of(LARGEST_DATA + 1).unwrap_err(), BadEventData::TooLong);
        let escaped =
            |count: usize| EventData::new(&format!("\"{}\"", "\u{2028}\u{85}\u{2029}".repeat(count)));
        assert!(escaped((LARGEST_DATA - 2) / 18).is_ok());
        assert!(escaped((LARGEST_DATA - 2) / 18 + 1).is_err());
    }

    proptest! {
        #[test]
        fn compact_data_is_the_same_value(text in "\\PC{0,20}", number in any::<i64>(), name in "[ -~]{0,9}") {
            let value = serde_json::json!({ name: [text, { "n": number, "x": null }] });
            let spaced = serde_json::to_string_pretty(&value).unwrap();
            let compact = EventData::new(&spaced).unwrap();
            prop_assert_eq!(compact.as_str(), serde_json::to_string(&value).unwrap());
        }
    }

    #[test]
    fn keys_of_cloud_events_are_no_other_keys() {
        for good in ["a", "!~", &"k".repeat(128)] {
            assert!(EventKey::parse(good).is_ok());
        }
        for bad in ["", " ", "a b", "é", &"k".repeat(129)] {
            assert!(EventKey::parse(bad).is_err(), "{bad:?}");
        }
        let of = EventKey::of_cloud_event;
        assert_ne!(of("/a", "b c").unwrap(), of("/a", "b").unwrap());
        let long = "x".repeat(1_024);
        assert!(of(&long, &long).is_ok());
        for (source, id) in
            [("", "1"), ("/a", ""), ("/a b", "1"), (&*format!("{long}x"), "1"), ("/a", &*format!("{long}x"))]
        {
            assert!(of(source, id).is_err(), "{source:.9} {id:.9}");
        }
    }

    #[test]
    fn subject_has_at_most_255_bytes() {
        let subject = |text: &str| Receiver::Subject(text.into()).check();
        assert_eq!((subject(&"é".repeat(127)), subject(&"é".repeat(128))), (Ok(()), Err(BadSubject)));
        assert_eq!(subject("a\0"), Err(BadSubject));
    }
}
