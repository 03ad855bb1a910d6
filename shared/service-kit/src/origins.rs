//! Which pages a service works for: our own, and those of the listed origins, exactly. A browser sends the session cookie
//! whichever page asks, so the page must be one of these; and by CORS only these may read the answers. Both services say the
//! same.

use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use thiserror::Error;

use crate::config::Origin;

/// What a page of a listed origin may send.
const REQUEST_HEADERS: &str =
    "Authorization, Cache-Control, Content-Type, Idempotency-Key, Last-Event-ID, X-Request-Id";
/// What it may read of an answer's head, beside what any page may.
const EXPOSED_HEADERS: &str = "Feed-Cursor, X-Request-Id, Retry-After, Idempotent-Replayed";
/// For how many seconds a browser need not ask again.
const MAX_AGE: &str = "600";

const SEC_FETCH_SITE: &str = "sec-fetch-site";

/// Of an origin from outside, as many bytes as are repeated: the longest host fits.
const REPEATED: usize = 300;

/// Why a request is refused that has a good cookie. The answer is 403 with this sentence.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OriginNotAllowed {
    #[error("Origin {0} is not allowed; add it to ALLOWED_ORIGINS")]
    NotListed(String),
    /// It has no form that could be listed: `null`, of a sandboxed frame or a file, is one.
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
    /// Its stable code, in both services.
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

    /// Where browsers find the product.
    pub fn own(&self) -> &Origin {
        &self.own
    }

    /// The origin of the page that asks, if it is one of ours.
    pub fn named<'a>(&self, headers: &'a HeaderMap) -> Option<&'a HeaderValue> {
        let mut values = headers.get_all(header::ORIGIN).iter();
        let value = values.next().filter(|_| values.next().is_none())?;
        let same = |ours: &Origin| value.as_bytes() == ours.as_str().as_bytes();
        (same(&self.own) || self.listed.iter().any(same)).then_some(value)
    }

    /// Did a page of ours send this? Asked only where the credential is the cookie, which proves who sends and not who meant it.
    ///
    /// To read, it is enough that no other page is named: without CORS it could not see the answer. To change something takes
    /// the name of a page of ours; a browser that leaves out `Origin` must say that the page is from where the request goes.
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

    /// To an answer for such a page, of any status: that the page may read it. To any answer: that it depends on the page.
    pub fn let_read(&self, page: Option<&HeaderValue>, answer: &mut HeaderMap) {
        answer.append(header::VARY, HeaderValue::from_static("Origin"));
        let Some(page) = page else { return };
        answer.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, page.clone());
        answer.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        answer.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED_HEADERS));
    }

    /// Answers a preflight. A page that is not ours learns nothing from it.
    pub fn answer_preflight<B: Default>(&self, methods: &'static str, asked: &HeaderMap) -> Response<B> {
        let mut answer = Response::new(B::default());
        *answer.status_mut() = StatusCode::NO_CONTENT;
        let headers = answer.headers_mut();
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
        let Some(page) = self.named(asked) else { return answer };
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
    // What is not in the form that browsers send would not match when listed.
    if text.len() <= REPEATED && text.parse::<Origin>().is_ok_and(|origin| origin.as_str() == text) {
        return OriginNotAllowed::NotListed(text.into());
    }
    let (shown, more) = match origin.as_bytes().split_at_checked(REPEATED) {
        Some((shown, rest)) if !rest.is_empty() => (shown, "…"),
        _ => (origin.as_bytes(), ""),
    };
    OriginNotAllowed::NoOrigin(format!("{}{more}", shown.escape_ascii()))
}

/// A browser asks whether a page may send what it wants to. Any other OPTIONS is a method like others.
pub fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    method == Method::OPTIONS
        && headers.contains_key(header::ORIGIN)
        && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// Does the browser say that a page of another site sent this?
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
    fn a_change_by_cookie_needs_a_page_of_ours_and_a_read_no_other_one() {
        let (ours, listed, foreign) = (
            ("origin", "https://chat.example"),
            ("origin", "https://shop.example:8443"),
            ("origin", "https://evil.example"),
        );
        let site = |site| (SEC_FETCH_SITE, site);
        for (pairs, reads, changes) in [
            (&[][..], true, false),
            (&[ours], true, true),
            (&[listed], true, true),
            (&[foreign], false, false),
            (&[("origin", "null")], false, false),
            (&[site("same-origin")], true, true),
            (&[site("same-site")], true, false),
            (&[site("cross-site")], true, false),
            (&[site("none")], true, false),
            (&[foreign, site("same-origin")], false, false),
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
    fn a_refusal_names_the_origin_and_what_to_do() {
        let told = |values: &[&[u8]]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::ORIGIN, HeaderValue::from_bytes(value).unwrap());
            }
            origins().check_cookie(&Method::POST, &headers).unwrap_err().to_string()
        };
        assert_eq!(
            told(&[b"http://localhost:5173"]),
            "Origin http://localhost:5173 is not allowed; add it to ALLOWED_ORIGINS"
        );
        // A setting would not help: no browser writes these.
        for (sent, shown) in [
            (&b"null"[..], "null"),
            (b"https://chat.example:443", "https://chat.example:443"),
            (b"\"><b>\xff\\", r#"\"><b>\xff\\"#),
        ] {
            let instead = "send a bearer token instead of the cookie";
            assert_eq!(told(&[sent]), format!("Origin {shown} is not allowed; {instead}"));
        }
        let long = format!("https://{}.example", "x".repeat(1_000));
        assert!(told(&[long.as_bytes()]).len() < REPEATED + 100, "it is cut");
        assert_eq!(told(&[b"https://chat.example", b"null"]), "Two Origin headers are not allowed");
        assert!(told(&[]).starts_with("Origin is missing"));
    }
}
