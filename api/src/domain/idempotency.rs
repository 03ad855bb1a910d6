//! Idempotency keys: what a client names a request by, so that repeating it does nothing twice.

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use thiserror::Error;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotencyKey(String);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("Idempotency-Key must be 1 to 128 visible ASCII characters")]
pub struct BadIdempotencyKey;

/// The keys of each are a space of their own.
#[derive(Debug, Clone, Copy)]
pub enum KeySpace {
    Messages,
    Groups,
}

/// The stored hashes of a key and of its request. Nobody can guess either without the key: the second is keyed by it, so that a deleted
/// text is not kept in another form.
#[derive(Debug, Clone, Copy)]
pub struct KeyHashes {
    pub key: [u8; 16],
    pub content: [u8; 16],
}

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

    /// `content`: what the request says, without U+0000.
    pub fn hashes<'a>(&self, space: KeySpace, content: impl IntoIterator<Item = &'a str>) -> KeyHashes {
        let prefix = match space {
            KeySpace::Messages => "message ",
            KeySpace::Groups => "group ",
        };
        let mut hash = Hmac::<Sha256>::new_from_slice(self.0.as_bytes()).expect("a key may have any length");
        for (nth, part) in content.into_iter().enumerate() {
            if nth > 0 {
                hash.update(b"\0");
            }
            hash.update(part.as_bytes());
        }
        KeyHashes {
            key: shortened(&Sha256::new_with_prefix(prefix).chain_update(&self.0).finalize()),
            content: shortened(&hash.finalize().into_bytes()),
        }
    }
}

/// 128 bits: nobody finds two keys, or two texts, with the same.
fn shortened(hash: &[u8]) -> [u8; 16] {
    *hash.first_chunk().expect("SHA-256 has 32 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_is_1_to_128_visible_ascii_characters() {
        for good in ["a", "!~", &"k".repeat(128)] {
            assert_eq!(IdempotencyKey::parse(good.as_bytes()).unwrap().as_str(), good);
        }
        for bad in ["", " ", "a b", "é", "a\t", "\x7f", &"k".repeat(129)] {
            assert!(IdempotencyKey::parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn hashes_tell_spaces_and_contents_apart() {
        let key = IdempotencyKey::parse(b"k").unwrap();
        let of = |space, content: &[&str]| key.hashes(space, content.iter().copied());
        let group = of(KeySpace::Groups, &["a", "b"]);
        assert_eq!(group.content, of(KeySpace::Groups, &["a", "b"]).content);
        assert_ne!(group.content, of(KeySpace::Groups, &["ab"]).content);
        assert_ne!(group.key, of(KeySpace::Messages, &["a", "b"]).key);
        let other = IdempotencyKey::parse(b"l").unwrap().hashes(KeySpace::Groups, ["a", "b"]);
        assert_ne!(group.content, other.content, "the key is a secret of it");
    }
}
