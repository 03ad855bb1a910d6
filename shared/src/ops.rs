//! The operators' listener, on a port of its own that is never routed from outside: `/livez` (the process runs), `/readyz`
//! (send it traffic), `/metrics` (Prometheus text), `/log` (what is logged: GET tells, PUT changes it until the next start). The
//! services add `/admin/explain` ([`crate::explain`]).

use std::{collections::HashSet, sync::Arc};

use bytes::Bytes;
use http::{Response, StatusCode, header};
use prometheus_client::{encoding::text, registry::Registry};
use serde::Serialize;
use warp::{Filter, Rejection, Reply};

use crate::telemetry;

/// What a Prometheus server asks for, and what everything else reads.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const CLASSIC: &str = "text/plain; version=0.0.4; charset=utf-8";

/// In bytes.
const MOST_DIRECTIVES: u64 = 1_024;

/// May this process get traffic? `note` says why not, or what is degraded.
#[derive(Debug, Clone)]
pub struct Readiness {
    pub ready: bool,
    pub note: String,
}

pub fn routes(
    registry: Arc<Registry>,
    readiness: impl Fn() -> Readiness + Clone + Send + Sync + 'static,
) -> impl Filter<Extract = (impl Reply,), Error = Rejection> + Clone + Send + Sync + 'static {
    let livez = warp::path!("livez").map(|| plain(StatusCode::OK, "alive\n".into()));
    let readyz = warp::path!("readyz").map(move || {
        let Readiness { ready, note } = readiness();
        plain(if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, format!("{note}\n"))
    });
    let metrics =
        warp::path!("metrics").and(warp::header::optional("accept")).map(move |accept: Option<String>| {
            let mut body = String::new();
            text::encode(&mut body, &registry).expect("writing to a string does not fail");
            let asked = accept.is_some_and(|accept| accept.contains("application/openmetrics-text"));
            let (form, body) = if asked { (OPENMETRICS, body) } else { (CLASSIC, classic(&body)) };
            let mut response = plain(StatusCode::OK, body);
            response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(form));
            response
        });
    let told = warp::path!("log").map(|| match telemetry::filter() {
        Some(filter) => plain(StatusCode::OK, format!("{filter}\n")),
        None => plain(StatusCode::NOT_FOUND, "this process has no log\n".into()),
    });
    let read = warp::get().and(livez.or(readyz).unify().or(metrics).unify().or(told).unify());
    let change = warp::path!("log")
        .and(warp::put())
        .and(warp::body::content_length_limit(MOST_DIRECTIVES))
        .and(warp::body::bytes())
        .map(|body: Bytes| change_log(&body));
    read.or(change).unify()
}

fn change_log(body: &[u8]) -> Response<String> {
    let before = telemetry::filter().unwrap_or_default();
    let directives = String::from_utf8_lossy(body);
    match telemetry::change_filter(directives.trim()) {
        Ok(()) => {
            let now = telemetry::filter().unwrap_or_default();
            tracing::warn!(before, now, "what is logged was changed by an operator");
            plain(StatusCode::OK, format!("{now}\n"))
        }
        Err(unchanged) => plain(StatusCode::BAD_REQUEST, format!("{unchanged}\n")),
    }
}

/// OpenMetrics in the older form, in which a counter is described by its whole name, and units and ends are not.
fn classic(openmetrics: &str) -> String {
    let counters: HashSet<&str> = openmetrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    let mut text = String::with_capacity(openmetrics.len());
    for line in openmetrics.lines() {
        let described = line.strip_prefix("# ").and_then(|rest| rest.split_once(' '));
        match described.and_then(|(what, rest)| Some((what, rest.split_once(' ')?))) {
            Some(("UNIT", _)) => continue,
            Some((what, (name, rest))) if counters.contains(name) => {
                text.extend(["# ", what, " ", name, "_total ", rest, "\n"]);
            }
            _ if line == "# EOF" => continue,
            _ => text.extend([line, "\n"]),
        }
    }
    text
}

pub(crate) fn plain(status: StatusCode, body: String) -> Response<String> {
    answer(status, "text/plain; charset=utf-8", body)
}

/// For people: over several lines.
pub(crate) fn json(value: &impl Serialize) -> Response<String> {
    let body = serde_json::to_string_pretty(value).expect("strings, numbers and lists of them");
    answer(StatusCode::OK, "application/json", body + "\n")
}

fn answer(status: StatusCode, form: &'static str, body: String) -> Response<String> {
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, form)
        .header(header::CACHE_CONTROL, "no-store")
        .body(body)
        .expect("static parts")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_form_describes_counters_by_their_whole_names() {
        let openmetrics = "# HELP a_seconds Time.\n# TYPE a_seconds counter\n# UNIT a_seconds seconds\na_seconds_total{x=\"# EOF\"} 1\n\
                           # HELP b # TYPE a counter.\n# TYPE b gauge\nb 2\n# EOF\n";
        let expected = "# HELP a_seconds_total Time.\n# TYPE a_seconds_total counter\na_seconds_total{x=\"# EOF\"} 1\n\
                        # HELP b # TYPE a counter.\n# TYPE b gauge\nb 2\n";
        assert_eq!(classic(openmetrics), expected);
    }
}
