//! The web client, embedded in the binary, at every path outside `/api`. A path that is no file gets the application's one
//! page, which reads the path itself. A debug build reads the files from the source tree at each request.

use std::{
    collections::HashMap,
    io::Write,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use rust_embed::{EmbeddedFile, RustEmbed};
use service_kit::quality_values::{entries, weight};
use warp::reply::Response;

use super::{
    Api, HandlerResult, empty,
    request::{Inbound, NoBody},
};

const PAGE: &str = "index.html";

/// Only our own files run or are fetched, and no text becomes markup or script (Trusted Types). Avatars come from any host.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' https: data:; \
                      connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self'; \
                      frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

/// Revalidated each time by `ETag`: after a deploy nobody runs the old client against the new service.
const CACHE: &str = "no-cache";

const TAG_BYTES: usize = 16;

#[derive(RustEmbed)]
#[folder = "../web/"]
struct Files;

/// The parameter of every path outside `/api`: itself.
pub(super) fn path(path: &str) -> Option<Vec<String>> {
    let is_api = path == "/api" || path.starts_with("/api/");
    (!is_api).then(|| vec![path.trim_start_matches('/').to_owned()])
}

pub(super) async fn file(_: Arc<Api>, inbound: Inbound, _: NoBody) -> HandlerResult {
    Ok(serve(&inbound.parameters[0], &inbound.headers))
}

fn serve(path: &str, headers: &HeaderMap) -> Response {
    let (name, file) = match Files::get(path) {
        Some(file) => (path, file),
        // A test checks that it is embedded; a debug build reads it from a folder that may be in the middle of an edit.
        None => match Files::get(PAGE) {
            Some(page) => (PAGE, page),
            None => return empty(StatusCode::NOT_FOUND),
        },
    };
    let tag = tag(&file);
    let mut response =
        if is_known(headers, &tag) { empty(StatusCode::NOT_MODIFIED) } else { body(file, headers) };
    let headers = response.headers_mut();
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        headers.insert(header::ETAG, tag);
    }
    let fixed: [(HeaderName, &'static str); 6] = [
        (header::CONTENT_TYPE, media_type(name)),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, CACHE),
        (header::VARY, "Accept-Encoding"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    headers.extend(fixed.map(|(name, value)| (name, HeaderValue::from_static(value))));
    response
}

fn media_type(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("css") => "text/css; charset=utf-8",
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("png") => "image/png",
        Some("svg") => "image/svg+xml",
        Some("webmanifest") => "application/manifest+json",
        _ => "application/octet-stream",
    }
}

/// Weak, because it names the file and not its encoding (RFC 9110, 8.8.1).
fn tag(file: &EmbeddedFile) -> String {
    let digest = file.metadata.sha256_hash();
    let hex: String = digest[..TAG_BYTES].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("W/\"{hex}\"")
}

/// By weak comparison (RFC 9110, 13.1.2).
fn is_known(headers: &HeaderMap, tag: &str) -> bool {
    fn opaque(tag: &str) -> &str {
        tag.strip_prefix("W/").unwrap_or(tag)
    }
    entries(headers, header::IF_NONE_MATCH).any(|known| known == "*" || opaque(known) == opaque(tag))
}

fn body(file: EmbeddedFile, headers: &HeaderMap) -> Response {
    let digest = file.metadata.sha256_hash();
    let plain = match file.data {
        std::borrow::Cow::Borrowed(bytes) => Bytes::from_static(bytes),
        std::borrow::Cow::Owned(bytes) => bytes.into(),
    };
    let short =
        accepts_gzip(headers).then(|| compressed(digest, &plain)).filter(|short| short.len() < plain.len());
    let is_short = short.is_some();
    let mut response = Response::new(short.unwrap_or(plain).into());
    if is_short {
        response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    response
}

fn accepts_gzip(headers: &HeaderMap) -> bool {
    let weight = |coding| weight(headers, header::ACCEPT_ENCODING, coding);
    let gzip = weight("gzip").or_else(|| weight("*")).unwrap_or(0);
    gzip > 0 && gzip >= weight("identity").unwrap_or(0)
}

fn compressed(digest: [u8; 32], plain: &[u8]) -> Bytes {
    /// More than there are files; only a debug build, in which files change, reaches it.
    const MOST: usize = 64;
    static KEPT: Mutex<Option<HashMap<[u8; 32], Bytes>>> = Mutex::new(None);
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let kept = kept.get_or_insert_default();
    if kept.len() >= MOST {
        kept.clear();
    }
    let compress = || {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(plain).and_then(|()| encoder.finish()).expect("memory takes every write").into()
    };
    kept.entry(digest).or_insert_with(compress).clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_str(value).unwrap())])
    }

    #[test]
    fn gzip_is_sent_only_to_clients_that_accept_it() {
        for takes in
            ["gzip", "br, GZIP", "deflate, gzip;q=0.5", "gzip; q=1", "*", "br, *;q=0.1", "gzip, identity"]
        {
            assert!(accepts_gzip(&headers(header::ACCEPT_ENCODING, takes)), "{takes}");
        }
        for refuses in [
            "",
            "br",
            "gzip;q=0",
            "br, gzip; q=0.0",
            "gzip;Q=0",
            "xgzip",
            "*;q=0",
            "*, gzip;q=0",
            "gzip;q=0.5, identity",
        ] {
            assert!(!accepts_gzip(&headers(header::ACCEPT_ENCODING, refuses)), "{refuses}");
        }
        assert!(!accepts_gzip(&HeaderMap::new()));
    }

    #[test]
    fn known_version_is_recognised_among_others() {
        let tag = "W/\"0a\"";
        for known in ["W/\"0a\"", "\"x\", W/\"0a\"", "*", "\"0a\"", "\"x,y\",W/\"0a\""] {
            assert!(is_known(&headers(header::IF_NONE_MATCH, known), tag), "{known}");
        }
        for unknown in ["W/\"0b\"", "\"x, W/\"", "0a", ""] {
            assert!(!is_known(&headers(header::IF_NONE_MATCH, unknown), tag), "{unknown}");
        }
    }

    #[test]
    fn nothing_outside_the_folder_is_served() {
        for path in
            ["../Cargo.toml", "pages/../../README.md", "/etc/passwd", "..%2fCargo.toml", "index.html/", ""]
        {
            assert!(Files::get(path).is_none(), "{path}");
        }
        assert!(Files::get(PAGE).is_some());
    }
}
