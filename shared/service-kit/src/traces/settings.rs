//! The destination of spans, and their number.

use std::num::NonZeroU32;

use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use thiserror::Error;

#[derive(Debug, Clone)]
pub struct TraceSettings {
    pub(super) endpoint: Uri,
    /// May hold a secret; none is shown.
    pub(super) headers: HeaderMap,
    /// Share of the traces that begin here, from 0 to 1.
    pub(super) ratio: f64,
    pub(super) per_second: NonZeroU32,
}

impl TraceSettings {
    pub fn new(endpoint: Uri, headers: HeaderMap, per_second: NonZeroU32) -> Self {
        Self { endpoint, headers, ratio: 0.0, per_second }
    }

    pub fn sampling(self, ratio: f64) -> Self {
        Self { ratio, ..self }
    }
}

/// An invalid setting. The text does not repeat the value, which may be a secret.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum Invalid {
    #[error("it must have the form http://host:port or https://host, without a user in it")]
    Endpoint,
    #[error("it must have the form name=value,name=value, percent-encoded")]
    Headers,
    #[error("it must be a number from 0 to 1")]
    Ratio,
}

/// The collector's URL with the path for traces appended, as the OpenTelemetry specification has it. `None`: no collector.
pub fn endpoint(text: &str) -> Result<Option<Uri>, Invalid> {
    if text.is_empty() {
        return Ok(None);
    }
    let uri =
        format!("{}/v1/traces", text.trim_end_matches('/')).parse::<Uri>().map_err(|_| Invalid::Endpoint)?;
    let plain = uri.query().is_none() && uri.authority().is_some_and(|host| !host.as_str().contains('@'));
    let usable = plain && matches!(uri.scheme_str(), Some("http" | "https"));
    if usable { Ok(Some(uri)) } else { Err(Invalid::Endpoint) }
}

pub fn headers(text: &str) -> Result<HeaderMap, Invalid> {
    let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    let header = |pair: &str| {
        let (name, value) = pair.split_once('=')?;
        let value = percent_encoding::percent_decode_str(value.trim()).collect::<Vec<_>>();
        let mut value = HeaderValue::from_bytes(&value).ok()?;
        value.set_sensitive(true);
        Some((name.trim().parse::<HeaderName>().ok()?, value))
    };
    pairs.map(header).collect::<Option<_>>().ok_or(Invalid::Headers)
}

pub fn ratio(text: &str) -> Result<f64, Invalid> {
    text.parse().ok().filter(|ratio| (0.0..=1.0).contains(ratio)).ok_or(Invalid::Ratio)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_for_traces_is_added_and_headers_are_decoded() {
        assert_eq!(endpoint(""), Ok(None));
        for given in ["http://collector:4318", "http://collector:4318/"] {
            assert_eq!(endpoint(given).unwrap().unwrap(), "http://collector:4318/v1/traces");
        }
        let headers = headers("Authorization=Basic%20YTpi, x-scope=a").unwrap();
        assert_eq!(headers["authorization"], "Basic YTpi");
        assert_eq!(headers["x-scope"], "a");
        assert!(!format!("{headers:?}").contains("YTpi"));
    }

    #[test]
    fn invalid_values_are_rejected() {
        for bad in ["collector:4318", "grpc://collector", "http://user@collector", "http://collector?x=1"] {
            assert_eq!(endpoint(bad), Err(Invalid::Endpoint), "{bad}");
        }
        for bad in ["hunter2", "a=hunter2%0a"] {
            assert_eq!(headers(bad), Err(Invalid::Headers), "{bad}");
        }
        for bad in ["1.1", "-0.1", "NaN", "all"] {
            assert_eq!(ratio(bad), Err(Invalid::Ratio), "{bad}");
        }
        assert_eq!(ratio("0.01"), Ok(0.01));
    }
}
