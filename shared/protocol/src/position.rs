//! A position in one user's feed. Clients carry it as the text `<epoch>-<seq>`, a cursor: the `id:` of an event, the
//! `Last-Event-ID` of a reconnect and the header `Feed-Cursor`. It is opaque to them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Names one history of a user's feed: random, drawn when the user is created and again when the database is restored to an
/// earlier point. Positions are comparable only within one epoch. Written as 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Epoch(pub u64);

/// The number of an event in its user's feed: 1, 2, 3, … without gaps. 0 is the position before the first event.
pub type Seq = u64;

/// A point in a feed: everything up to and including `seq`. The newest one is the feed's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Position {
    pub epoch: Epoch,
    pub seq: Seq,
}

impl Position {
    /// Whether no event lies between the two.
    pub fn is_followed_by(self, next: Self) -> bool {
        next.epoch == self.epoch && self.seq.checked_add(1) == Some(next.seq)
    }
}

/// The text is no cursor that we ever gave out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("not a cursor")]
pub struct NotAPosition;

impl Epoch {
    /// Postgres has no unsigned integers: the same 64 bits, read as signed.
    pub fn from_sql(bits: i64) -> Self {
        Self(bits.cast_unsigned())
    }

    pub fn to_sql(self) -> i64 {
        self.0.cast_signed()
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Epoch {
    type Err = NotAPosition;

    fn from_str(text: &str) -> Result<Self, NotAPosition> {
        let canonical = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !canonical {
            return Err(NotAPosition);
        }
        u64::from_str_radix(text, 16).map(Self).map_err(|_| NotAPosition)
    }
}

as_json_string!(Epoch, "an epoch: 16 hexadecimal digits");

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.seq)
    }
}

impl FromStr for Position {
    type Err = NotAPosition;

    /// Strict: a text that parses prints the same again, and fits into a `bigint`.
    fn from_str(text: &str) -> Result<Self, NotAPosition> {
        let (epoch, seq) = text.split_once('-').ok_or(NotAPosition)?;
        let canonical = seq == "0" || !seq.starts_with('0') && seq.bytes().all(|b| b.is_ascii_digit());
        if !canonical {
            return Err(NotAPosition);
        }
        let seq: i64 = seq.parse().map_err(|_| NotAPosition)?;
        Ok(Self { epoch: epoch.parse()?, seq: seq.cast_unsigned() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_cursor_survives_its_text(epoch: u64, seq in 0..=i64::MAX.cast_unsigned()) {
            let cursor = Position { epoch: Epoch(epoch), seq };
            let text = cursor.to_string();
            prop_assert!(text.len() <= 64);
            prop_assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'));
            prop_assert_eq!(text.parse(), Ok(cursor));
        }

        #[test]
        fn what_parses_prints_the_same_again(text in "[0-9a-fA-F+ ]{0,17}-[0-9+ ]{0,20}") {
            if let Ok(cursor) = text.parse::<Position>() {
                prop_assert_eq!(cursor.to_string(), text);
            }
        }

        #[test]
        fn any_text_parses_or_fails_without_a_panic(text in ".*") {
            let _ = text.parse::<Position>();
        }

        #[test]
        fn the_sign_bit_survives_sql(bits: i64) {
            prop_assert_eq!(Epoch::from_sql(bits).to_sql(), bits);
        }
    }
}
