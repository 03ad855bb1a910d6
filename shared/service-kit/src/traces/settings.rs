//! Settings of tracing, by the names of the OpenTelemetry specification where it has one.

use std::num::NonZeroU32;

use http::{HeaderMap, HeaderName, HeaderValue, Uri};

use crate::config::Problems;

pub struct Texts<'a> {
    /// `OTEL_EXPORTER_OTLP_ENDPOINT`
    pub endpoint: &'a str,
    /// `OTEL_EXPORTER_OTLP_HEADERS`
    pub headers: &'a str,
    /// `OTEL_TRACES_SAMPLER_ARG`. None: this service begins no traces.
    pub ratio: Option<&'a str>,
    /// `TRACES_PER_SECOND`
    pub per_second: &'a str,
}

#[derive(Debug, Clone)]
pub struct Settings {
    pub(super) endpoint: Uri,
    /// May hold a secret, so they are marked sensitive.
    pub(super) headers: HeaderMap,
    /// Of the traces that begin here; from 0 to 1.
    pub(super) ratio: f64,
    pub(super) per_second: NonZeroU32,
}

impl Settings {
    /// `Some(None)`: tracing is off. All settings are validated in any case.
    pub fn read(problems: &mut Problems, texts: &Texts) -> Option<Option<Self>> {
        let headers = headers(texts.headers);
        if headers.is_none() {
            problems
                .add("OTEL_EXPORTER_OTLP_HEADERS must have the form name=value,name=value, percent-encoded");
        }
        let ratio = texts.ratio.map_or(Some(0.0), |ratio| {
            let number = problems.parse::<f64>("OTEL_TRACES_SAMPLER_ARG", ratio)?;
            if !(0.0..=1.0).contains(&number) {
                problems.add(format!("OTEL_TRACES_SAMPLER_ARG is {number}, and must be from 0 to 1"));
                return None;
            }
            Some(number)
        });
        let per_second = problems.number("TRACES_PER_SECOND", texts.per_second, 1, 100_000);
        let per_second = per_second.and_then(|number| NonZeroU32::new(u32::try_from(number).ok()?));
        if texts.endpoint.is_empty() {
            return Some(None);
        }
        let endpoint = endpoint(texts.endpoint);
        if endpoint.is_none() {
            problems.add(
                "OTEL_EXPORTER_OTLP_ENDPOINT must have the form http://host:port or https://host, without a user in it",
            );
        }
        Some(Some(Self { endpoint: endpoint?, headers: headers?, ratio: ratio?, per_second: per_second? }))
    }
}

/// The address of the collector with the path for traces.
fn endpoint(text: &str) -> Option<Uri> {
    let uri: Uri = format!("{}/v1/traces", text.trim_end_matches('/')).parse().ok()?;
    let plain = uri.query().is_none() && !uri.authority()?.as_str().contains('@');
    (plain && matches!(uri.scheme_str(), Some("http" | "https"))).then_some(uri)
}

fn headers(text: &str) -> Option<HeaderMap> {
    let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    let header = |pair: &str| {
        let (name, value) = pair.split_once('=')?;
        let value = percent_encoding::percent_decode_str(value.trim()).collect::<Vec<_>>();
        let mut value = HeaderValue::from_bytes(&value).ok()?;
        value.set_sensitive(true);
        Some((name.trim().parse::<HeaderName>().ok()?, value))
    };
    pairs.map(header).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFF: Texts = Texts { endpoint: "", headers: "", ratio: Some("0.01"), per_second: "20" };

    fn read(texts: &Texts) -> Result<Option<Settings>, String> {
        let mut problems = Problems::default();
        let read = Settings::read(&mut problems, texts);
        problems.finish(|| read).map_err(|problems| problems.to_string())
    }

    #[test]
    fn without_an_endpoint_tracing_is_off() {
        assert!(read(&OFF).unwrap().is_none());
    }

    #[test]
    fn the_traces_path_is_added_and_headers_are_decoded() {
        for given in ["http://collector:4318", "http://collector:4318/"] {
            let headers = "Authorization=Basic%20YTpi, x-scope=a";
            let settings = read(&Texts { endpoint: given, headers, ..OFF }).unwrap().unwrap();
            assert_eq!(settings.endpoint, "http://collector:4318/v1/traces");
            assert_eq!(settings.headers["authorization"], "Basic YTpi");
            assert_eq!(settings.headers["x-scope"], "a");
            assert!(!format!("{:?}", settings.headers).contains("YTpi"));
        }
    }

    #[test]
    fn invalid_settings_are_reported_without_secrets() {
        let bad = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", Texts { endpoint: "collector:4318", ..OFF }),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", Texts { endpoint: "grpc://collector", ..OFF }),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", Texts { endpoint: "http://hunter2@collector", ..OFF }),
            ("OTEL_EXPORTER_OTLP_HEADERS", Texts { headers: "hunter2", ..OFF }),
            ("OTEL_EXPORTER_OTLP_HEADERS", Texts { headers: "a=hunter2%0a", ..OFF }),
            ("OTEL_TRACES_SAMPLER_ARG", Texts { ratio: Some("1.1"), ..OFF }),
            ("OTEL_TRACES_SAMPLER_ARG", Texts { ratio: Some("NaN"), ..OFF }),
            ("TRACES_PER_SECOND", Texts { per_second: "0", ..OFF }),
        ];
        for (name, texts) in bad {
            let said = read(&texts).err().unwrap();
            assert!(said.contains(name) && !said.contains("hunter2"), "{said}");
        }
    }
}
