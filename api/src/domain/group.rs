//! Groups: their titles and members.

use chrono::{DateTime, Utc};
use protocol::ids::MessageId;
use serde::Serialize;
use thiserror::Error;

use super::{conversation::Role, text::is_visible, user::User};

/// One line, trimmed, that can be seen, of [`LONGEST_TITLE`] code points at most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Title(String);

const LONGEST_TITLE: usize = 80;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum TitleError {
    #[error("Title required")]
    Required,
    #[error("Title too long. {LONGEST_TITLE} max")]
    TooLong,
    /// Postgres cannot store it.
    #[error("Title must not contain the character U+0000")]
    Nul,
}

impl Title {
    /// A line end and a tab become a space each.
    pub fn normalise(text: &str) -> Result<Self, TitleError> {
        let line = text.replace("\r\n", " ").replace(['\r', '\n', '\t'], " ");
        let line = line.trim();
        if !is_visible(line) {
            return Err(TitleError::Required);
        }
        if line.chars().nth(LONGEST_TITLE).is_some() {
            return Err(TitleError::TooLong);
        }
        if line.contains('\0') {
            return Err(TitleError::Nul);
        }
        Ok(Self(line.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A member of a group, or one of the two of a direct conversation, as another one sees them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Participant {
    pub user: User,
    pub role: Role,
    #[serde(serialize_with = "super::time")]
    pub joined_at: DateTime<Utc>,
    /// `None` also if the reader does not see that message.
    pub last_read_message_id: Option<MessageId>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn title_is_one_visible_line() {
        let title = |text: &str| Title::normalise(text).map(|title| title.0);
        for (typed, normal) in [
            ("  Team  ", "Team"),
            ("a\r\nb\rc\nd\te", "a b c d e"),
            ("a  b", "a  b"),
            ("\n\t Fußball ⚽ \r\n", "Fußball ⚽"),
        ] {
            assert_eq!(title(typed).as_deref(), Ok(normal), "{typed:?}");
        }
        for empty in ["", " \t\r\n", "\u{200b}\u{2800}", "\u{3164}"] {
            assert_eq!(title(empty), Err(TitleError::Required), "{empty:?}");
        }
        assert_eq!(title(&"é".repeat(80)), Ok("é".repeat(80)));
        assert_eq!(title(&"é".repeat(81)), Err(TitleError::TooLong));
        assert_eq!(title("a\0b"), Err(TitleError::Nul));
    }
}
