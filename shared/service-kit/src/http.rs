//! The HTTP edge that both services share: the request id, which credential of a request counts, and the headers of every
//! answer.

use http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::cookies::{self, Cookies};

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The request's own id if it is well-formed, so that a request can be followed through proxies; else a new one. The accept
/// loop sets it on every request that it passes on.
pub fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(|id| is_request_id(id));
    given.map_or_else(new_request_id, str::to_owned)
}

/// Not by `Uuid::new_v4`, which makes a system call.
fn new_request_id() -> String {
    uuid::Builder::from_random_bytes(rand::random()).into_uuid().simple().to_string()
}

fn is_request_id(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
}

/// Sets the headers that every answer has. A `Cache-Control` of the answer's own stays.
pub fn set_common_headers(answer: &mut HeaderMap, request_id: HeaderValue) {
    answer.insert(REQUEST_ID, request_id);
    answer.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    answer.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
}

#[derive(Debug, PartialEq, Eq)]
pub struct PresentedTokens {
    /// One of these must be valid. Several only from cookies: another program's cookie may have our cookie's name.
    pub tokens: Vec<String>,
    /// Browsers send cookies for any page, so the page's origin must be checked too.
    pub from_cookie: bool,
}

impl PresentedTokens {
    /// The `Authorization` header, else `query_token`, else the session cookie. A malformed header still hides the others: it
    /// is an empty token, which no key verifies.
    pub fn find(headers: &HeaderMap, query_token: Option<String>, cookies: &Cookies) -> Option<Self> {
        let mut values = headers.get_all(header::AUTHORIZATION).iter();
        if let Some(value) = values.next() {
            let only = values.next().is_none();
            let token = value.to_str().ok().filter(|_| only).and_then(bearer).unwrap_or_default();
            return Some(Self { tokens: vec![token.into()], from_cookie: false });
        }
        if let Some(token) = query_token {
            return Some(Self { tokens: vec![token], from_cookie: false });
        }
        let tokens = cookies::values(headers, cookies.session());
        let tokens: Vec<_> = tokens.into_iter().map(str::to_owned).collect();
        (!tokens.is_empty()).then_some(Self { tokens, from_cookie: true })
    }
}

fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim_matches(' '))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        pairs.fold(HeaderMap::new(), |mut headers, (name, value): (HeaderName, _)| {
            headers.append(name, value);
            headers
        })
    }

    fn find(pairs: &[(&'static str, &str)], query_token: Option<&str>) -> Option<(String, bool)> {
        let cookies = Cookies::new(&"http://localhost:8080".parse().unwrap());
        PresentedTokens::find(&headers(pairs), query_token.map(str::to_owned), &cookies)
            .map(|presented| (presented.tokens.join(" "), presented.from_cookie))
    }

    #[test]
    fn header_hides_query_token_and_query_token_hides_cookie() {
        let cookie = ("cookie", "session=x; messenger_session=c; messenger_session=d");
        assert_eq!(find(&[("authorization", "Bearer a"), cookie], Some("b")), Some(("a".into(), false)));
        assert_eq!(find(&[("authorization", "bEARER  a"), cookie], None), Some(("a".into(), false)));
        assert_eq!(find(&[cookie], Some("b.")), Some(("b.".into(), false)));
        assert_eq!(find(&[cookie], None), Some(("c d".into(), true)));
        assert_eq!(find(&[], None), None);
    }

    #[test]
    fn malformed_credential_is_not_replaced_by_another_one() {
        let cookie = ("cookie", "messenger_session=c");
        let malformed = Some((String::new(), false));
        for value in ["Basic a", "Bearer", "", "a.b.c"] {
            assert_eq!(find(&[("authorization", value), cookie], Some("b")), malformed, "{value:?}");
        }
        let two = [("authorization", "Bearer a"), ("authorization", "Bearer b"), cookie];
        assert_eq!(find(&two, Some("b")), malformed);
        assert_eq!(find(&[cookie], Some("")), malformed);
    }

    #[test]
    fn well_formed_request_id_is_kept_and_any_other_replaced() {
        let id_for = |given: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_bytes(given.as_bytes()).unwrap());
            request_id(&headers)
        };
        for good in ["a", "A-b_9", &"x".repeat(64)] {
            assert_eq!(id_for(good), good);
        }
        for bad in ["", "a b", "a.b", "é", &"x".repeat(65)] {
            assert_ne!(id_for(bad), bad);
            assert!(is_request_id(&id_for(bad)));
        }
    }
}
