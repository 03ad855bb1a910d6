//! Typed ids. In the database a 64-bit integer, in JSON always a string, opaque to clients.

use std::{fmt, str::FromStr};

use thiserror::Error;

/// The text is not the canonical decimal form of a positive 64-bit integer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("not an id")]
pub struct NotAnId;

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub i64);

        impl From<i64> for $name {
            fn from(id: i64) -> Self {
                Self(id)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = NotAnId;

            fn from_str(text: &str) -> Result<Self, NotAnId> {
                parse_positive(text).map(Self)
            }
        }

        as_json_string!($name, "an id as a string");
    )+};
}

ids! {
    UserId,
    ConversationId,
    MessageId,
    SessionId,
}

/// Only the canonical form, not `+7`, `007` or ` 7`.
fn parse_positive(text: &str) -> Result<i64, NotAnId> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) || text.starts_with('0') {
        return Err(NotAnId);
    }
    text.parse().map_err(|_| NotAnId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_canonical_form_is_an_id() {
        assert_eq!("9223372036854775807".parse(), Ok(UserId(i64::MAX)));
        for text in ["", "0", "-1", "+1", "01", " 1", "1 ", "a", "1e3", "9223372036854775808", "１"] {
            assert_eq!(text.parse::<UserId>(), Err(NotAnId), "{text:?}");
        }
    }

    #[test]
    fn json_is_a_string_and_nothing_else() {
        assert_eq!(serde_json::to_string(&UserId(7)).unwrap(), r#""7""#);
        assert_eq!(serde_json::from_str::<UserId>(r#""7""#).unwrap(), UserId(7));
        assert!(serde_json::from_str::<UserId>("7").is_err());
    }
}
