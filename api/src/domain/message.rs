//! Messages: their content and its normal form, and idempotency keys.

use chrono::{DateTime, Utc};
use hmac::{Hmac, Mac};
use protocol::ids::{ConversationId, MessageId};
use serde::Serialize;
use sha2::{Digest, Sha256};
use thiserror::Error;

use super::user::User;

/// A message as one reader sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Message {
    pub id: MessageId,
    pub content: String,
    /// Left out inside lists and conversations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conversation_id: Option<ConversationId>,
    pub sender: User,
    #[serde(serialize_with = "super::time")]
    pub created_at: DateTime<Utc>,
    #[serde(serialize_with = "super::optional_time")]
    pub edited_at: Option<DateTime<Utc>>,
    /// Then `content` is empty.
    #[serde(serialize_with = "super::optional_time")]
    pub deleted_at: Option<DateTime<Utc>>,
    pub mine: bool,
}

/// The text of a message: normalised, not empty, not too long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content(String);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ContentError {
    #[error("Message content required")]
    Required,
    #[error("Message too long. {} max", Content::MAX_CODE_POINTS)]
    TooLong,
    /// Postgres cannot store it.
    #[error("Message must not contain the character U+0000")]
    Nul,
}

impl Content {
    pub const MAX_CODE_POINTS: usize = 480;

    /// Normalises line by line, then measures. Invisible characters that are no white space (U+200B, …) stay.
    pub fn normalise(text: &str) -> Result<Self, ContentError> {
        let mut normal = String::with_capacity(text.len());
        for line in text.split('\n') {
            let line = collapse(line);
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            if !normal.is_empty() {
                normal.push('\n');
            }
            normal.push_str(line);
        }
        if normal.is_empty() {
            return Err(ContentError::Required);
        }
        if normal.chars().nth(Self::MAX_CODE_POINTS).is_some() {
            return Err(ContentError::TooLong);
        }
        if normal.contains('\0') {
            return Err(ContentError::Nul);
        }
        Ok(Self(normal))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Every run of tab, form feed, carriage return and space becomes one space. Other white space stays.
fn collapse(line: &str) -> String {
    let mut collapsed = String::with_capacity(line.len());
    let mut in_run = false;
    for c in line.chars() {
        let blank = matches!(c, '\t' | '\x0c' | '\r' | ' ');
        if !blank {
            collapsed.push(c);
        } else if !in_run {
            collapsed.push(' ');
        }
        in_run = blank;
    }
    collapsed
}

/// A client's name for one send: repeating it makes no second message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotencyKey(String);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("Idempotency-Key must be 1 to 128 visible ASCII characters")]
pub struct BadIdempotencyKey;

impl IdempotencyKey {
    pub fn parse(bytes: &[u8]) -> Result<Self, BadIdempotencyKey> {
        if !(1..=128).contains(&bytes.len()) || !bytes.iter().all(u8::is_ascii_graphic) {
            return Err(BadIdempotencyKey);
        }
        Ok(Self(bytes.iter().copied().map(char::from).collect()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Recognises the key, which is not stored.
    pub fn hash(&self) -> KeyedHash {
        shortened(&Sha256::new_with_prefix("message ").chain_update(&self.0).finalize())
    }

    /// Recognises the text that was sent with this key. Keyed by it, so that a text that was deleted since cannot be guessed from it.
    pub fn hash_of(&self, content: &Content) -> KeyedHash {
        let hash = Hmac::<Sha256>::new_from_slice(self.0.as_bytes()).expect("a key may have any length");
        shortened(&hash.chain_update(&content.0).finalize().into_bytes())
    }
}

/// 128 bits: nobody finds two keys, or two texts, with the same.
pub type KeyedHash = [u8; 16];

fn shortened(hash: &[u8]) -> KeyedHash {
    *hash.first_chunk().expect("SHA-256 has 32 bytes")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn normalised(text: &str) -> Result<String, ContentError> {
        Content::normalise(text).map(|content| content.0)
    }

    #[test]
    fn content_is_normalised_by_the_contracts_examples() {
        for (input, result) in [
            ("  hello \t  world ", "hello world"),
            ("a\r\n\r\n\n b", "a\nb"),
            ("a\rb", "a b"),
            ("a\x0cb", "a b"),
            ("x\u{a0}\u{a0}y\u{a0}", "x\u{a0}\u{a0}y"),
            ("\u{b}a\u{b}b\u{b}", "a\u{b}b"),
            ("\u{85}a\u{2028}b\u{2029}", "a\u{2028}b"),
            ("\u{200b}", "\u{200b}"),
        ] {
            assert_eq!(normalised(input).as_deref(), Ok(result), "{input:?}");
        }
        for nothing in ["", " \n \t ", "\u{a0}\n\u{2003}", "\r\n\r\n"] {
            assert_eq!(normalised(nothing), Err(ContentError::Required), "{nothing:?}");
        }
        assert!(normalised(&"😀".repeat(480)).is_ok());
        assert_eq!(normalised(&"é".repeat(481)), Err(ContentError::TooLong));
        assert_eq!(normalised("a\0b"), Err(ContentError::Nul));
    }

    #[test]
    fn length_is_measured_after_normalising() {
        let padded = format!("{}{}", " ".repeat(1000), "a\n\n".repeat(240));
        assert_eq!(normalised(&padded).unwrap().chars().count(), 479);
    }

    /// Everything that the rules look at, and some that they must not touch.
    fn text() -> impl Strategy<Value = String> {
        let special = "[\t\u{c}\r \n\u{b}\u{85}\u{a0}\u{2028}\u{2029}\u{200b}\u{feff}ab😀\u{0}]{0,600}";
        prop_oneof![special, ".{0,600}"]
    }

    proptest! {
        #[test]
        fn normalised_text_does_not_change(text in text()) {
            if let Ok(normal) = normalised(&text) {
                prop_assert_eq!(normalised(&normal), Ok(normal));
            }
        }

        #[test]
        fn only_white_space_is_removed_or_added(text in text()) {
            let solid = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<String>();
            if let Ok(normal) = normalised(&text) {
                prop_assert_eq!(solid(&normal), solid(&text));
            }
        }

        #[test]
        fn lines_are_trimmed_not_empty_and_without_runs(text in text()) {
            if let Ok(normal) = normalised(&text) {
                prop_assert!((1..=480).contains(&normal.chars().count()));
                prop_assert!(!normal.contains(['\t', '\x0c', '\r', '\0']) && !normal.contains("  "));
                for line in normal.split('\n') {
                    prop_assert!(!line.is_empty());
                    prop_assert_eq!(line.trim(), line);
                }
            }
        }
    }

    #[test]
    fn key_is_1_to_128_visible_ascii_characters() {
        for good in ["a", "!~", &"k".repeat(128)] {
            assert_eq!(IdempotencyKey::parse(good.as_bytes()).unwrap().as_str(), good);
        }
        for bad in ["", " ", "a b", "é", "a\t", "\x7f", &"k".repeat(129)] {
            assert!(IdempotencyKey::parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }
}
