//! Allowed origins: our own and the ones in the settings, by exact match. A browser sends the session cookie for any page,
//! so requests by cookie must come from an allowed origin, and CORS lets only allowed origins read answers.

use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use thiserror::Error;

use crate::config::Origin;

const REQUEST_HEADERS: &str =
    "Authorization, Cache-Control, Content-Type, Idempotency-Key, Last-Event-ID, X-Request-Id";
const EXPOSED_HEADERS: &str = "Feed-Cursor, X-Request-Id, Retry-After, Idempotent-Replayed";
/// Browsers cache a preflight for this long, in seconds.
const MAX_AGE: &str = "600";

const SEC_FETCH_SITE: &str = "sec-fetch-site";

/// The longest received origin that an error repeats, in bytes; the longest host fits.
const MAX_REPEATED: usize = 300;

/// The cause for rejecting a request with a valid cookie. The answer is 403 with this sentence.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OriginNotAllowed {
    #[error("Origin {0} is not allowed; add it to ALLOWED_ORIGINS")]
    NotListed(String),
    /// It cannot be listed, for example `null`, which sandboxed frames and files send.
    #[error("Origin {0} is not allowed; send a bearer token instead of the cookie")]
    NoOrigin(String),
    #[error("Two Origin headers are not allowed")]
    Repeated,
    #[error(
        "Origin is missing; a change by cookie needs Origin or Sec-Fetch-Site: same-origin, a bearer token needs neither"
    )]
    Missing,
}

impl OriginNotAllowed {
    pub const CODE: &str = "origin_not_allowed";
}

#[derive(Debug, Clone)]
pub struct Origins {
    own: Origin,
    listed: Vec<Origin>,
}

impl Origins {
    pub fn new(own: Origin, listed: Vec<Origin>) -> Self {
        Self { own, listed }
    }

    pub fn own(&self) -> &Origin {
        &self.own
    }

    pub fn named<'a>(&self, headers: &'a HeaderMap) -> Option<&'a HeaderValue> {
        let mut values = headers.get_all(header::ORIGIN).iter();
        let value = values.next().filter(|_| values.next().is_none())?;
        let same = |ours: &Origin| value.as_bytes() == ours.as_str().as_bytes();
        (same(&self.own) || self.listed.iter().any(same)).then_some(value)
    }

    /// Checks that an allowed page sent a request by cookie, because a cookie does not prove which page sent it.
    ///
    /// A read may omit `Origin`: without CORS no other page sees the answer. A change needs an allowed `Origin`, or without one
    /// `Sec-Fetch-Site: same-origin`.
    pub fn check_cookie(&self, method: &Method, headers: &HeaderMap) -> Result<(), OriginNotAllowed> {
        let mut origins = headers.get_all(header::ORIGIN).iter();
        let mut sites = headers.get_all(SEC_FETCH_SITE).iter();
        match (origins.next(), origins.next()) {
            (Some(_), None) if self.named(headers).is_some() => Ok(()),
            (Some(origin), None) => Err(not_allowed(origin)),
            (_, Some(_)) => Err(OriginNotAllowed::Repeated),
            (None, None) if matches!(*method, Method::GET | Method::HEAD) => Ok(()),
            (None, None)
                if sites.next().is_some_and(|site| site == "same-origin") && sites.next().is_none() =>
            {
                Ok(())
            }
            (None, None) => Err(OriginNotAllowed::Missing),
        }
    }

    pub fn let_read(&self, page: Option<&HeaderValue>, answer: &mut HeaderMap) {
        answer.append(header::VARY, HeaderValue::from_static("Origin"));
        let Some(page) = page else { return };
        answer.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, page.clone());
        answer.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        answer.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED_HEADERS));
    }

    /// Answers a preflight. A page that is not ours learns nothing from it.
    pub fn answer_preflight<B: Default>(&self, methods: &'static str, request: &HeaderMap) -> Response<B> {
        let mut answer = Response::new(B::default());
        *answer.status_mut() = StatusCode::NO_CONTENT;
        let headers = answer.headers_mut();
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
        let Some(page) = self.named(request) else { return answer };
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, page.clone());
        for (name, value) in [
            (header::ACCESS_CONTROL_ALLOW_CREDENTIALS, "true"),
            (header::ACCESS_CONTROL_ALLOW_METHODS, methods),
            (header::ACCESS_CONTROL_ALLOW_HEADERS, REQUEST_HEADERS),
            (header::ACCESS_CONTROL_MAX_AGE, MAX_AGE),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        answer
    }
}

fn not_allowed(origin: &HeaderValue) -> OriginNotAllowed {
    let text = String::from_utf8_lossy(origin.as_bytes());
    // An origin in another form than browsers send would not match if it were listed.
    if text.len() <= MAX_REPEATED && text.parse::<Origin>().is_ok_and(|origin| origin.as_str() == text) {
        return OriginNotAllowed::NotListed(text.into());
    }
    let (shown, more) = match origin.as_bytes().split_at_checked(MAX_REPEATED) {
        Some((shown, rest)) if !rest.is_empty() => (shown, "…"),
        _ => (origin.as_bytes(), ""),
    };
    OriginNotAllowed::NoOrigin(format!("{}{more}", shown.escape_ascii()))
}

/// A browser asks whether a page may send a request. Any other OPTIONS is an ordinary method.
pub fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    method == Method::OPTIONS
        && headers.contains_key(header::ORIGIN)
        && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// Whether the browser reports that a page of another site sent this.
pub fn is_cross_site(headers: &HeaderMap) -> bool {
    headers.get_all(SEC_FETCH_SITE).iter().any(|site| site == "cross-site")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origins() -> Origins {
        let origin = |text: &str| text.parse().unwrap();
        Origins::new(origin("https://chat.example"), vec![origin("https://shop.example:8443")])
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn only_an_exact_origin_is_ours() {
        for ours in ["https://chat.example", "https://shop.example:8443"] {
            assert_eq!(origins().named(&headers(&[("origin", ours)])).unwrap(), ours);
        }
        for other in [
            "null",
            "",
            "http://chat.example",
            "https://chat.example:443",
            "https://chat.example/",
            "https://chat.example.evil.example",
            "https://evil.chat.example",
            "https://shop.example",
            "https://Chat.example",
            "https://chat.example, https://shop.example:8443",
        ] {
            assert_eq!(origins().named(&headers(&[("origin", other)])), None, "{other}");
        }
        let two = [("origin", "https://chat.example"), ("origin", "https://chat.example")];
        assert_eq!(origins().named(&headers(&two)), None, "no browser sends two");
        assert_eq!(origins().named(&HeaderMap::new()), None);
    }

    #[test]
    fn a_change_by_cookie_needs_an_allowed_origin() {
        let (ours, listed, other) = (
            ("origin", "https://chat.example"),
            ("origin", "https://shop.example:8443"),
            ("origin", "https://evil.example"),
        );
        let site = |site| (SEC_FETCH_SITE, site);
        for (pairs, reads, changes) in [
            (&[][..], true, false),
            (&[ours], true, true),
            (&[listed], true, true),
            (&[other], false, false),
            (&[("origin", "null")], false, false),
            (&[site("same-origin")], true, true),
            (&[site("same-site")], true, false),
            (&[site("cross-site")], true, false),
            (&[site("none")], true, false),
            (&[other, site("same-origin")], false, false),
            (&[listed, site("cross-site")], true, true),
            (&[site("same-origin"), site("cross-site")], true, false),
        ] {
            let headers = headers(pairs);
            for (method, expected) in [
                (Method::GET, reads),
                (Method::HEAD, reads),
                (Method::POST, changes),
                (Method::PUT, changes),
                (Method::DELETE, changes),
            ] {
                assert_eq!(origins().check_cookie(&method, &headers).is_ok(), expected, "{method} {pairs:?}");
            }
        }
    }

    #[test]
    fn rejected_origin_is_named_with_a_remedy() {
        let sentence = |values: &[&[u8]]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::ORIGIN, HeaderValue::from_bytes(value).unwrap());
            }
            origins().check_cookie(&Method::POST, &headers).unwrap_err().to_string()
        };
        assert_eq!(
            sentence(&[b"http://localhost:5173"]),
            "Origin http://localhost:5173 is not allowed; add it to ALLOWED_ORIGINS"
        );
        // A setting would not help: no browser writes these.
        for (sent, shown) in [
            (&b"null"[..], "null"),
            (b"https://chat.example:443", "https://chat.example:443"),
            (b"\"><b>\xff\\", r#"\"><b>\xff\\"#),
        ] {
            let instead = "send a bearer token instead of the cookie";
            assert_eq!(sentence(&[sent]), format!("Origin {shown} is not allowed; {instead}"));
        }
        let long = format!("https://{}.example", "x".repeat(1_000));
        assert!(sentence(&[long.as_bytes()]).len() < MAX_REPEATED + 100, "it is cut");
        assert_eq!(sentence(&[b"https://chat.example", b"null"]), "Two Origin headers are not allowed");
        assert!(sentence(&[]).starts_with("Origin is missing"));
    }
}
