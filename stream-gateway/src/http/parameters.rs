//! The parameters of a stream request: token, cursor, heartbeat.

use std::borrow::Cow;

use http::HeaderMap;
use service_kit::{cookies::Cookies, http::PresentedTokens};
use url::form_urlencoded;

use crate::frame::Heartbeat;

/// The tokens of the request; on the stream, a token in the query may replace the header.
pub fn presented(headers: &HeaderMap, query: &str, cookies: &Cookies) -> Option<PresentedTokens> {
    PresentedTokens::find(headers, parameter(query, "token").map(Cow::into_owned), cookies)
}

/// The client's cursor. The header wins over the query; an empty one counts as absent.
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
    let value = parameter(query, "heartbeat").unwrap_or_default();
    if value == "event" {
        return Heartbeat::EVENT;
    }
    match value.parse::<f64>() {
        Ok(seconds) if !seconds.is_nan() => {
            Heartbeat::every_seconds(seconds.clamp(SECONDS.0, SECONDS.1) as u8)
        }
        _ => Heartbeat::COMMENT,
    }
}

/// The last of a repeated parameter counts: clients that extend an existing URL append the newer value.
fn parameter<'a>(query: &'a str, name: &str) -> Option<Cow<'a, str>> {
    form_urlencoded::parse(query.as_bytes()).filter(|(other, _)| other == name).last().map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn last_token_of_the_query_is_decoded_and_presented() {
        let cookies = Cookies::new(&"http://localhost:8080".parse().unwrap());
        let token = |query: &str| {
            presented(&HeaderMap::new(), query, &cookies).map(|presented| presented.tokens.join(" "))
        };
        assert_eq!(token("token=b%2E").as_deref(), Some("b."));
        assert_eq!(token("token=old&token=new").as_deref(), Some("new"));
        assert_eq!(token("token=").as_deref(), Some(""));
        assert_eq!(token("other=b"), None);
    }

    #[test]
    fn the_cursor_comes_from_the_header_else_the_query() {
        let cursor = |pairs: &[(&'static str, &str)], query| {
            last_event_id(&headers(pairs), query).map(|value| String::from_utf8(value).unwrap())
        };
        assert_eq!(cursor(&[("last-event-id", "a-1")], "lastEventId=b-2"), Some("a-1".into()));
        assert_eq!(cursor(&[("last-event-id", "")], "lastEventId=b-2"), Some("b-2".into()));
        assert_eq!(cursor(&[], "lastEventId="), None);
        assert_eq!(cursor(&[], "lastEventId=%0A"), Some("\n".into()));
        assert_eq!(cursor(&[], "lastEventId=a-1&x=&lastEventId=b-2"), Some("b-2".into()));
        assert_eq!(cursor(&[], "lastEventId=a-1&lastEventId="), None, "the last one is empty");
    }

    #[test]
    fn a_client_chooses_the_form_or_interval_of_heartbeats() {
        assert_eq!(heartbeat("token=a&heartbeat=event"), Heartbeat::EVENT);
        assert_eq!(heartbeat("heartbeat=5&heartbeat=event"), Heartbeat::EVENT);
        for query in
            ["", "heartbeat=", "heartbeat=comment", "heartbeat=Event", "xheartbeat=event", "heartbeat=NaN"]
        {
            assert_eq!(heartbeat(query), Heartbeat::COMMENT, "{query}");
        }
        let default = Duration::from_secs(15);
        assert_eq!(Heartbeat::EVENT.interval(default), default);
        assert_eq!(Heartbeat::COMMENT.interval(default), default);
        let interval = |value: &str| heartbeat(&format!("heartbeat={value}")).interval(default).as_secs();
        for (value, expected) in [
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
            assert_eq!(interval(value), expected, "{value}");
        }
    }
}
