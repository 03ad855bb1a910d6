//! Rejects malformed request heads before any route sees them.

use std::str::FromStr;

use http::{HeaderMap, Request, Response, StatusCode, Uri, Version, header, uri::Authority};
use protocol::problem::Problem;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Malformed {
    Target,
    Host,
}

impl Malformed {
    /// RFC 9112, 3.2. Hyper accepts every target that a URI parser accepts, and ignores `Host`.
    pub(super) fn find<B>(request: &Request<B>) -> Option<Self> {
        if !names_a_path(request.uri()) {
            Some(Self::Target)
        } else if !names_one_host(request.version(), request.headers()) {
            Some(Self::Host)
        } else {
            None
        }
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Target => "target",
            Self::Host => "host",
        }
    }

    pub(super) fn answer<B: From<Vec<u8>>>(self, request_id: &str) -> Response<B> {
        let (code, sentence) = match self {
            Self::Target => ("bad_target", "The request target must be a path that begins with a slash"),
            Self::Host => ("bad_host", "HTTP/1.1 requires exactly one Host header with a host name"),
        };
        Problem::new(StatusCode::BAD_REQUEST, code, sentence, request_id).into_response()
    }
}

/// Routes need a path; `*` and the authority form (of CONNECT) have none.
fn names_a_path(target: &Uri) -> bool {
    target.path_and_query().is_some_and(|target| target.path().starts_with('/'))
}

fn names_one_host(version: Version, headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => {
            // An empty host is legal for a target without an authority.
            host.is_empty()
                || host.to_str().is_ok_and(|host| !host.contains('@') && Authority::from_str(host).is_ok())
        }
        (None, _) => version < Version::HTTP_11,
        (Some(_), Some(_)) => false,
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn found(version: Version, target: &str, hosts: &[&str]) -> Option<Malformed> {
        let mut request = Request::builder().version(version).uri(target).body(()).unwrap();
        for host in hosts {
            request.headers_mut().append(header::HOST, HeaderValue::from_bytes(host.as_bytes()).unwrap());
        }
        Malformed::find(&request)
    }

    #[test]
    fn targets_without_a_path_are_malformed() {
        for target in ["/", "/api/messages?x=/", "//", "http://a", "http://a/b", "/*", "https://a?b"] {
            assert_eq!(found(Version::HTTP_11, target, &["a"]), None, "{target}");
        }
        for target in ["foo", "*", "h:80", "h:1", "[::1]:80"] {
            assert_eq!(found(Version::HTTP_11, target, &["a"]), Some(Malformed::Target), "{target}");
        }
    }

    #[test]
    fn one_host_is_named_and_no_more() {
        for host in ["a", "a.example:8080", "[::1]:80", "127.0.0.1", ""] {
            assert_eq!(found(Version::HTTP_11, "/", &[host]), None, "{host}");
        }
        for host in ["a b", "a, b", "user@a", "a/b", "http://a", "\u{e9}"] {
            assert_eq!(found(Version::HTTP_11, "/", &[host]), Some(Malformed::Host), "{host}");
        }
        assert_eq!(found(Version::HTTP_11, "/", &[]), Some(Malformed::Host));
        assert_eq!(found(Version::HTTP_10, "/", &[]), None);
        for version in [Version::HTTP_10, Version::HTTP_11] {
            assert_eq!(found(version, "/", &["a", "a"]), Some(Malformed::Host));
        }
    }
}
