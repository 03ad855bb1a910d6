//! Who is calling: which credential counts, and whether a browser's page may use its cookie.

use std::{borrow::Cow, num::NonZeroU8};

use http::{HeaderMap, header};
use service_kit::cookies::{self, Cookies};
use url::form_urlencoded;

use crate::frame::{Heartbeat, HeartbeatForm};

#[derive(Debug, PartialEq, Eq)]
pub struct Credential {
    /// One of these must be good. Several only from cookies: others of our cookie's name may be beside it.
    pub tokens: Vec<String>,
    /// From the cookie, which browsers send by themselves: the page's origin must be ours.
    pub ambient: bool,
}

/// The one credential that counts: the header, else the query, else the session cookie, as `api` calls it. A present but
/// unusable one hides the others, and is an empty token here.
pub fn credential(headers: &HeaderMap, query: &str, cookies: &Cookies) -> Option<Credential> {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    if let Some(value) = given.next() {
        // Two of them name no one token.
        let only = given.next().is_none();
        let token = value.to_str().ok().filter(|_| only).and_then(bearer).unwrap_or_default();
        return Some(Credential { tokens: vec![token.into()], ambient: false });
    }
    if let Some(token) = parameter(query, "token") {
        return Some(Credential { tokens: vec![token.into_owned()], ambient: false });
    }
    let tokens = cookies::values(headers, cookies.session());
    let tokens: Vec<_> = tokens.into_iter().map(str::to_owned).collect();
    (!tokens.is_empty()).then_some(Credential { tokens, ambient: true })
}

fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim_matches(' '))
}

/// What the query says about the client's place. The header wins; an empty one is an absent one.
pub fn last_event_id(headers: &HeaderMap, query: &str) -> Option<Vec<u8>> {
    let header = headers.get("last-event-id").map(|value| value.as_bytes().to_vec());
    header
        .filter(|value| !value.is_empty())
        .or_else(|| parameter(query, "lastEventId").map(|value| value.into_owned().into_bytes()))
        .filter(|value| !value.is_empty())
}

/// `event`, or the seconds between heartbeats, limited to the bounds. Anything else means the default.
pub fn heartbeat(query: &str) -> Heartbeat {
    /// With its jitter, the minimum serves readers that give up after 5 seconds.
    const SECONDS: (f64, f64) = (4.0, 60.0);
    let asked = parameter(query, "heartbeat").unwrap_or_default();
    if asked == "event" {
        return Heartbeat { form: HeartbeatForm::Event, seconds: None };
    }
    let seconds = asked.parse::<f64>().ok().filter(|seconds| !seconds.is_nan());
    let seconds = seconds.and_then(|seconds| NonZeroU8::new(seconds.clamp(SECONDS.0, SECONDS.1) as u8));
    Heartbeat { form: HeartbeatForm::Comment, seconds }
}

/// The last of a repeated parameter counts: clients that extend an existing URL append the newer value.
fn parameter<'a>(query: &'a str, wanted: &str) -> Option<Cow<'a, str>> {
    form_urlencoded::parse(query.as_bytes()).filter(|(name, _)| name == wanted).last().map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    fn cookies() -> Cookies {
        Cookies::new(&"http://localhost:8080".parse().unwrap())
    }

    fn token(pairs: &[(&'static str, &str)], query: &str) -> Option<(String, bool)> {
        credential(&headers(pairs), query, &cookies())
            .map(|credential| (credential.tokens.join(" "), credential.ambient))
    }

    #[test]
    fn the_header_hides_the_query_and_the_query_the_cookie() {
        let all = [
            ("authorization", "Bearer a"),
            ("cookie", "session=x; messenger_session=c; messenger_session=d"),
        ];
        assert_eq!(token(&all, "token=b"), Some(("a".into(), false)));
        assert_eq!(token(&all[1..], "token=b%2E"), Some(("b.".into(), false)));
        assert_eq!(token(&all[1..], "other=b"), Some(("c d".into(), true)));
        assert_eq!(token(&[], "token=old&token=new"), Some(("new".into(), false)));
        assert_eq!(token(&[], ""), None);
    }

    #[test]
    fn a_bad_credential_is_not_passed_over() {
        let cookie = ("cookie", "messenger_session=c");
        assert_eq!(token(&[("authorization", "Basic abc"), cookie], "token=b"), Some((String::new(), false)));
        assert_eq!(token(&[cookie], "token="), Some((String::new(), false)));
        let mut two = headers(&[("authorization", "Bearer a"), cookie]);
        two.append(header::AUTHORIZATION, "Bearer a".parse().unwrap());
        assert_eq!(credential(&two, "", &cookies()).unwrap().tokens, [""]);
    }

    #[test]
    fn the_place_comes_from_the_header_else_the_query() {
        let place = |pairs: &[(&'static str, &str)], query| {
            last_event_id(&headers(pairs), query).map(|value| String::from_utf8(value).unwrap())
        };
        assert_eq!(place(&[("last-event-id", "a-1")], "lastEventId=b-2"), Some("a-1".into()));
        assert_eq!(place(&[("last-event-id", "")], "lastEventId=b-2"), Some("b-2".into()));
        assert_eq!(place(&[], "lastEventId="), None);
        assert_eq!(place(&[], "lastEventId=%0A"), Some("\n".into()));
        assert_eq!(place(&[], "lastEventId=a-1&x=&lastEventId=b-2"), Some("b-2".into()));
        assert_eq!(place(&[], "lastEventId=a-1&lastEventId="), None, "the last one is empty");
    }

    #[test]
    fn a_client_chooses_the_form_or_the_seconds_of_its_heartbeats() {
        let events = Heartbeat { form: HeartbeatForm::Event, seconds: None };
        assert_eq!(heartbeat("token=a&heartbeat=event"), events);
        assert_eq!(heartbeat("heartbeat=5&heartbeat=event"), events);
        for query in
            ["", "heartbeat=", "heartbeat=comment", "heartbeat=Event", "xheartbeat=event", "heartbeat=NaN"]
        {
            assert_eq!(heartbeat(query), Heartbeat::default(), "{query}");
        }
        let seconds = |asked: &str| heartbeat(&format!("heartbeat={asked}")).seconds.map(NonZeroU8::get);
        for (asked, wanted) in [
            ("4", 4),
            ("8", 8),
            ("4.9", 4),
            ("60", 60),
            ("0", 4),
            ("3", 4),
            ("-5", 4),
            ("61", 60),
            ("99999999999999999999", 60),
            ("event&heartbeat=10", 10),
        ] {
            assert_eq!(seconds(asked), Some(wanted), "{asked}");
        }
    }
}
