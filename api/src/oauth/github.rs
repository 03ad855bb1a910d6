//! GitHub and GitHub Enterprise, which use OAuth without `OpenID` Connect.

use oauth2::{AuthType, AuthUrl, TokenUrl};
use protocol::jose;
use serde::Deserialize;
use serde_json::Value;

use super::{Endpoints, LoginFailure, object, text};
use crate::domain::user::Profile;

pub(super) fn endpoints(url: &str, api_url: &str) -> Endpoints {
    const URL: &str = "the setting was checked to be a URL without a query";
    Endpoints {
        authorize: AuthUrl::new(format!("{url}/login/oauth/authorize")).expect(URL),
        token: TokenUrl::new(format!("{url}/login/oauth/access_token")).expect(URL),
        profile: format!("{api_url}/user"),
        auth: AuthType::RequestBody,
        names_itself: false,
    }
}

#[derive(Deserialize)]
struct GitHubUser {
    #[serde(deserialize_with = "jose::subject")]
    id: String,
    #[serde(default)]
    login: Value,
    #[serde(default)]
    avatar_url: Value,
}

/// An account is identified by its number, because another user can take a released name.
pub(super) fn profile(issuer: &str, answer: &[u8]) -> Result<Profile, LoginFailure> {
    let user: GitHubUser = object(answer).ok_or(LoginFailure::BadProfile("not a JSON object with an id"))?;
    let subject = user.id;
    let is_number = subject.parse::<u64>().is_ok_and(|id| id > 0 && id.to_string() == subject);
    is_number
        .then(|| Profile::new(issuer, &subject, text(&user.login), text(&user.avatar_url)))
        .flatten()
        .ok_or(LoginFailure::BadProfile("id is not a number"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(answer: Value) -> Result<Profile, LoginFailure> {
        profile("https://github.com", &serde_json::to_vec(&answer).unwrap())
    }

    #[test]
    fn a_user_is_identified_by_number_in_any_form() {
        for id in [json!(583_231), json!("583231")] {
            let profile = read(json!({ "id": id, "login": "octocat", "avatar_url": "https://a.example/1" }));
            let profile = profile.unwrap();
            assert_eq!((profile.subject.as_str(), profile.username.as_str()), ("583231", "octocat"));
            assert_eq!(profile.avatar_url.as_deref(), Some("https://a.example/1"));
        }
    }

    #[test]
    fn without_a_number_there_is_no_user() {
        for id in
            [json!(null), json!(0), json!(-1), json!(1.5), json!("x"), json!("007"), json!(""), json!([1])]
        {
            assert!(
                matches!(read(json!({ "id": id, "login": "x" })), Err(LoginFailure::BadProfile(_))),
                "{id}"
            );
        }
        assert!(read(json!({ "login": "x" })).is_err());
        assert!(read(json!("x")).is_err());
        assert!(profile("https://github.com", b"<html>").is_err());
    }

    #[test]
    fn an_invalid_name_or_avatar_is_ignored() {
        for odd in [json!(null), json!(7), json!(""), json!(["x"])] {
            let profile = read(json!({ "id": 1, "login": odd, "avatar_url": odd })).unwrap();
            assert_eq!((profile.username.as_str(), profile.avatar_url), ("user", None));
        }
    }
}
