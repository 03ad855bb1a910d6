//! The product's cookies: their names, and how they are read beside cookies of other programs.
//!
//! A browser sends the cookies of every port of a host and of its parent domains, and cookies of the same name cannot be
//! distinguished. Behind https the names begin with `__Host-`, so browsers accept them only from this host, over TLS and for
//! all paths (RFC 6265bis, 4.1.3.2). Without https every cookie of the name is tried.

use http::{HeaderMap, HeaderValue, header};

use crate::config::Origin;

const MAX_TRIED: usize = 8;

#[derive(Debug, Clone)]
pub struct Cookies {
    secure: bool,
    session: String,
}

impl Cookies {
    pub fn new(origin: &Origin) -> Self {
        let secure = origin.is_https();
        Self { secure, session: full_name(secure, "session") }
    }

    pub fn session(&self) -> &str {
        &self.session
    }

    pub fn name(&self, own: &str) -> String {
        full_name(self.secure, own)
    }

    /// The value of `Set-Cookie` with `Max-Age` in seconds; 0 deletes the cookie, which needs the same attributes. `name` and
    /// `value` must consist of cookie characters.
    pub fn set(&self, name: &str, value: &str, seconds: u64) -> HeaderValue {
        // Lax, not Strict, because users arrive by links and from providers. `__Host-` requires this path and no domain.
        let secure = if self.secure { "; Secure" } else { "" };
        let cookie = format!("{name}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax{secure}");
        HeaderValue::from_str(&cookie).expect("names are ours, values are base64 and dots")
    }
}

fn full_name(secure: bool, own: &str) -> String {
    let prefix = if secure { "__Host-" } else { "" };
    format!("{prefix}messenger_{own}")
}

/// The values of the cookies of this name in the browser's order, at most [`MAX_TRIED`].
pub fn values<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
    pairs(headers).filter(|(found, _)| *found == name).map(|(_, value)| value).take(MAX_TRIED).collect()
}

/// The names that begin with `prefix` in the browser's order, which is the oldest first for one path (RFC 6265, 5.4). Names that
/// we would not set are skipped, so each can be set again.
pub fn names<'a>(headers: &'a HeaderMap, prefix: &str) -> Vec<&'a str> {
    let is_ours = |name: &&str| name.starts_with(prefix) && name.bytes().all(is_plain);
    pairs(headers).map(|(name, _)| name).filter(is_ours).collect()
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

fn pairs(headers: &HeaderMap) -> impl Iterator<Item = (&str, &str)> {
    headers
        .get_all(header::COOKIE)
        .iter()
        // As bytes, because another program's cookie may not be text.
        .flat_map(|value| value.as_bytes().split(|b| *b == b';'))
        .filter_map(|pair| std::str::from_utf8(pair).ok()?.trim().split_once('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(values: &[&[u8]]) -> HeaderMap {
        values.iter().map(|value| (header::COOKIE, HeaderValue::from_bytes(value).unwrap())).collect()
    }

    #[test]
    fn cookies_are_bound_to_the_host_behind_https() {
        let cookies = |origin: &str| Cookies::new(&origin.parse().unwrap());
        let (locked, plain) = (cookies("https://chat.example"), cookies("http://localhost:8080"));
        assert_eq!(locked.session(), "__Host-messenger_session");
        assert_eq!(locked.name("code_x"), "__Host-messenger_code_x");
        assert_eq!(plain.session(), "messenger_session");
        let set = locked.set(locked.session(), "a.b", 60);
        let attributes = "Path=/; Max-Age=60; HttpOnly; SameSite=Lax";
        assert_eq!(set, format!("__Host-messenger_session=a.b; {attributes}; Secure"));
        assert_eq!(plain.set("messenger_x", "a.b", 60), format!("messenger_x=a.b; {attributes}"));
    }

    #[test]
    fn every_cookie_of_a_name_is_found_among_others() {
        let of = |headers: &[&[u8]]| {
            values(&sent(headers), "session").into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(of(&[b"a=b; session=x.y.z; c=d"]), ["x.y.z"]);
        assert_eq!(of(&[b"session=x;session=; session=y=", b"session=z"]), ["x", "", "y=", "z"]);
        assert_eq!(of(&[b"a=\xff; session=x"]), ["x"]);
        for none in [&b""[..], b"sessions=x", b"mysession=x", b"session", b"Session=x"] {
            assert!(of(&[none]).is_empty(), "{none:?}");
        }
        assert_eq!(of(&[b"session=x; ".repeat(100).as_slice()]).len(), MAX_TRIED);
    }

    #[test]
    fn names_of_a_kind_are_found_in_order() {
        let odd = "login_\u{e9}=6; login_ d=7; login_e".as_bytes();
        let headers = sent(&[b"login_b=1; x_login_=2; login_a=3; login=4", odd, b"login_c=5"]);
        assert_eq!(names(&headers, "login_"), ["login_b", "login_a", "login_c"]);
    }
}
