//! Users as others see them, and profiles of accounts at external issuers.

use protocol::ids::UserId;
use serde::Serialize;
use url::Url;

use super::name;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct User {
    pub id: UserId,
    pub username: String,
    #[serde(rename = "avatarURL")]
    pub avatar_url: Option<String>,
}

impl User {
    /// Of a row that may be gone: then the user was deleted.
    pub fn stored(id: i64, username: Option<String>, avatar_url: Option<String>) -> Self {
        Self { id: UserId(id), username: username.unwrap_or_else(|| format!("deleted-{id}")), avatar_url }
    }
}

/// A user as they see themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OwnUser {
    #[serde(flatten)]
    pub user: User,
    /// Partners may know when the user is online.
    pub shares_presence: bool,
    pub addable_by: AddableBy,
}

/// Who may add a user to a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum AddableBy {
    Everybody,
    Partners,
    Nobody,
}

impl AddableBy {
    const ALL: [Self; 3] = [Self::Everybody, Self::Partners, Self::Nobody];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Everybody => "everybody",
            Self::Partners => "partners",
            Self::Nobody => "nobody",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|each| each.as_str() == text)
    }
}

/// An account at an external issuer, in a form from which a user can be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    pub issuer: String,
    pub subject: String,
    pub username: String,
    pub avatar_url: Option<String>,
}

/// `OpenID` Connect's limit for a subject.
pub const LONGEST_SUBJECT: usize = 255;
const LONGEST_URL: usize = 2_048;

impl Profile {
    /// `None` if the subject cannot be stored: it identifies the user at the next login. A malformed name or avatar is replaced.
    pub fn new(issuer: &str, subject: &str, name: Option<&str>, avatar: Option<&str>) -> Option<Self> {
        if subject.is_empty() || subject.len() > LONGEST_SUBJECT || subject.contains(char::is_control) {
            return None;
        }
        Some(Self {
            issuer: issuer.into(),
            subject: subject.into(),
            username: name::kept(name.unwrap_or_default()),
            avatar_url: avatar.and_then(avatar_url),
        })
    }
}

/// An avatar that a user chose is accepted or refused, never changed to none.
pub fn chosen_avatar(given: &str) -> Option<String> {
    let has_password = |url: &str| Url::parse(url).is_ok_and(|url| url.password().is_some());
    let strange = |c: char| c.is_whitespace() || c.is_control();
    avatar_url(given)
        .filter(|url| !given.contains(strange) && given.len() <= LONGEST_URL && !has_password(url))
}

/// Pages show it as an image, so only http and https: no `javascript:`, no `data:`.
fn avatar_url(given: &str) -> Option<String> {
    let url = Url::parse(given.trim()).ok().filter(|url| matches!(url.scheme(), "http" | "https"))?;
    Some(String::from(url)).filter(|url| url.len() <= LONGEST_URL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn avatar_is_an_http_url_or_none() {
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
    fn chosen_avatar_is_taken_as_it_is_or_refused() {
        let longest = format!("https://a.example/{}", "x".repeat(LONGEST_URL - 18));
        for taken in ["http://a.example/u/1?v=4#x", "https://user@a.example/", &longest] {
            assert_eq!(chosen_avatar(taken).as_deref(), Some(taken));
        }
        let (long, space) = (format!("{longest}x"), " https://a.example/");
        for refused in
            ["", "x", "ftp://a.example/", "https://u:p@a.example/", "https://a.example/a b", space, &long]
        {
            assert_eq!(chosen_avatar(refused), None, "{refused:?}");
        }
    }

    #[test]
    fn malformed_subject_identifies_nobody() {
        let profile = |subject: &str| Profile::new("https://id.example", subject, None, None);
        assert_eq!(profile("a|b 1").unwrap().subject, "a|b 1");
        for odd in ["", "a\0", "a\n", &"x".repeat(256)] {
            assert_eq!(profile(odd), None, "{odd:?}");
        }
    }
}
