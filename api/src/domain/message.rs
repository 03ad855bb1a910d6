//! Messages: their content and its normal form.

use chrono::{DateTime, Utc};
use protocol::ids::{ConversationId, MessageId};
use serde::Serialize;
use thiserror::Error;

use super::{text::is_visible, user::User};

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
    #[error("Message too long. {0} max")]
    TooLong(usize),
    /// Postgres cannot store it.
    #[error("Message must not contain the character U+0000")]
    Nul,
}

impl Content {
    /// Normalises, then measures: at most `longest` code points. People paste paragraphs and code, so a text stays as it was typed but for
    /// its line ends, white space at the end of lines, and empty lines: none at the beginning and the end, never two in a row. A text
    /// of which nothing can be seen counts as empty.
    pub fn normalise(text: &str, longest: usize) -> Result<Self, ContentError> {
        let mut normal = String::with_capacity(text.len());
        let mut empty_lines = 0;
        for line in text.replace("\r\n", "\n").split(['\n', '\r']) {
            let line = line.trim_end();
            if line.is_empty() {
                empty_lines += 1;
                continue;
            }
            if !normal.is_empty() {
                normal.push_str(if empty_lines == 0 { "\n" } else { "\n\n" });
            }
            empty_lines = 0;
            normal.push_str(line);
        }
        if !is_visible(&normal) {
            return Err(ContentError::Required);
        }
        if normal.chars().nth(longest).is_some() {
            return Err(ContentError::TooLong(longest));
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LONGEST: usize = 4_000;

    fn normalised(text: &str) -> Result<String, ContentError> {
        Content::normalise(text, LONGEST).map(|content| content.0)
    }

    #[test]
    fn content_is_normalised_by_the_contracts_examples() {
        for (input, result) in [
            ("  hello \t  world ", "  hello \t  world"),
            ("a\r\n\r\n\r\n b", "a\n\n b"),
            ("\n\n a\n\n", " a"),
            ("a\rb", "a\nb"),
            ("a\x0cb", "a\x0cb"),
            ("x\u{a0}\u{a0}y\u{a0}", "x\u{a0}\u{a0}y"),
            ("a\n\n\n\n\nb\n \t\n\u{2003}\nc", "a\n\nb\n\nc"),
            ("a\n\r\nb", "a\n\nb"),
            ("fn main() {\n\tdone();\n}\n", "fn main() {\n\tdone();\n}"),
            ("\u{b}a\u{b}b\u{b}", "\u{b}a\u{b}b"),
            ("\u{85}a\u{2028}b\u{2029}", "\u{85}a\u{2028}b"),
            ("\u{200b}a\u{200b}", "\u{200b}a\u{200b}"),
            ("\u{1}", "\u{1}"),
        ] {
            assert_eq!(normalised(input).as_deref(), Ok(result), "{input:?}");
        }
        let unseen =
            ["\u{200b}\u{2800}", "\u{3164}\u{115f}\u{1160}\u{ffa0}", "\u{ad}\n\u{e0001}", "\u{fe0f}\u{200d}"];
        for nothing in ["", " \n \t ", "\u{a0}\n\u{2003}", "\r\n\r\n"].iter().chain(&unseen) {
            assert_eq!(normalised(nothing), Err(ContentError::Required), "{nothing:?}");
        }
        assert!(normalised(&"😀".repeat(LONGEST)).is_ok());
        assert_eq!(normalised(&"é".repeat(LONGEST + 1)), Err(ContentError::TooLong(LONGEST)));
        assert_eq!(normalised("a\0b"), Err(ContentError::Nul));
    }

    #[test]
    fn length_is_measured_after_normalising() {
        let padded = "a  \n\n\n\n".repeat(1_333);
        assert_eq!(normalised(&padded).unwrap().chars().count(), 3 * 1_333 - 2);
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
        fn only_white_space_at_the_end_of_lines_is_removed(text in text()) {
            if let Ok(normal) = normalised(&text) {
                let lines = |text: &str| {
                    let text = text.replace("\r\n", "\n").replace('\r', "\n");
                    let lines = text.split('\n').map(str::trim_end).filter(|line| !line.is_empty());
                    lines.map(str::to_owned).collect::<Vec<_>>()
                };
                prop_assert_eq!(lines(&normal), lines(&text));
            }
        }

        #[test]
        fn normalised_text_has_a_visible_beginning_and_end(text in text()) {
            if let Ok(normal) = normalised(&text) {
                prop_assert!((1..=LONGEST).contains(&normal.chars().count()));
                prop_assert!(!normal.contains(['\r', '\0']) && !normal.contains("\n\n\n"));
                prop_assert!(!normal.starts_with('\n') && !normal.ends_with(char::is_whitespace));
            }
        }
    }
}
