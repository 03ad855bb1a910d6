//! A person, as the others see one, and as an account elsewhere describes one.

use serde::Serialize;
use shared::ids::UserId;
use url::Url;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct User {
    pub id: UserId,
    pub username: String,
    #[serde(rename = "avatarURL")]
    pub avatar_url: Option<String>,
}

/// Can anybody have this name? Postgres cannot hold U+0000 in a text, so nobody has such a name, and asking would be an error.
pub fn may_be_a_name(text: &str) -> bool {
    !text.is_empty() && !text.contains('\0')
}

/// An account elsewhere, in a form that a user can be made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    pub issuer: String,
    pub subject: String,
    pub username: String,
    pub avatar_url: Option<String>,
}

/// Code points of a name from elsewhere, without the suffix that tells it from a taken one.
const LONGEST_NAME: usize = 50;
/// Whoever comes without a name that can be shown.
const NAMELESS: &str = "user";
/// OpenID Connect's limit for a subject.
const LONGEST_SUBJECT: usize = 255;
const LONGEST_URL: usize = 2_048;

impl Profile {
    /// `None`: without a subject of a form that can be kept, nobody can be recognised the next time. An odd name or avatar is
    /// made good instead.
    pub fn new(issuer: &str, subject: &str, name: Option<&str>, avatar: Option<&str>) -> Option<Self> {
        if subject.is_empty() || subject.len() > LONGEST_SUBJECT || subject.contains(char::is_control) {
            return None;
        }
        Some(Self {
            issuer: issuer.into(),
            subject: subject.into(),
            username: username(name.unwrap_or_default()),
            avatar_url: avatar.and_then(avatar_url),
        })
    }
}

/// A name from elsewhere as it is shown here.
fn username(given: &str) -> String {
    let shown: String = given.chars().filter(|&c| !c.is_control() && !is_invisible(c)).collect();
    let bounded: String = shown.trim().chars().take(LONGEST_NAME).collect();
    let name = bounded.trim_end();
    if name.is_empty() { NAMELESS.into() } else { name.into() }
}

/// What takes no space or turns the direction of writing: by these a name could be made to look like another one's.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Pages show it as an image, so it must be an address of one: no `javascript:`, no `data:`.
fn avatar_url(given: &str) -> Option<String> {
    let url = Url::parse(given.trim()).ok().filter(|url| matches!(url.scheme(), "http" | "https"))?;
    Some(String::from(url)).filter(|url| url.len() <= LONGEST_URL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_from_elsewhere_can_be_shown() {
        let long = "é".repeat(49) + " tail";
        for (given, shown) in [
            ("octocat", "octocat"),
            ("  John Doe ", "John Doe"),
            ("a\0b\r\nc\u{7f}\u{85}d", "abcd"),
            ("\u{202e}nhoj\u{200b}", "nhoj"),
            ("Ünïcode 😀", "Ünïcode 😀"),
            ("", "user"),
            (" \t\u{feff} ", "user"),
            (&long, &long[..98]),
        ] {
            assert_eq!(username(given), shown, "{given:?}");
        }
        assert_eq!(username(&"😀".repeat(100_000)).chars().count(), LONGEST_NAME);
    }

    #[test]
    fn an_avatar_is_the_address_of_an_image_or_nothing() {
        assert_eq!(avatar_url("https://a.example/u/1?v=4").as_deref(), Some("https://a.example/u/1?v=4"));
        assert_eq!(
            avatar_url("https://a.example/\"><b>").as_deref(),
            Some("https://a.example/%22%3E%3Cb%3E")
        );
        let long = format!("https://a.example/{}", "x".repeat(LONGEST_URL));
        for none in ["", "javascript:alert(1)", "data:image/png;base64,AA", "/me.png", "https://", &long] {
            assert_eq!(avatar_url(none), None, "{none:?}");
        }
    }

    #[test]
    fn nobody_is_recognised_by_an_odd_subject() {
        let profile = |subject: &str| Profile::new("https://id.example", subject, None, None);
        assert_eq!(profile("a|b 1").unwrap().subject, "a|b 1");
        for odd in ["", "a\0", "a\n", &"x".repeat(256)] {
            assert_eq!(profile(odd), None, "{odd:?}");
        }
    }
}
