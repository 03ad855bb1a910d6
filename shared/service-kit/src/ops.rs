//! The operators' listener, on its own port that is never routed from outside: `/livez` (the process runs), `/readyz` (it accepts
//! traffic), `/metrics` (Prometheus text), `/log` (the log filter: GET reads it, PUT changes it until the next start). The services
//! add `/admin/explain` ([`crate::explain`]).

use std::{collections::HashSet, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use prometheus_client::{encoding::text, registry::Registry};
use serde::Serialize;
use warp::{Filter, Rejection};

use crate::{
    quality_values::weight,
    tasks::{TaskFailure, Tasks},
    telemetry,
};

/// A Prometheus server requests OpenMetrics; other programs read the older text format, which the encoder lacks.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const CLASSIC: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Connections of operators that the listener accepts.
pub const CONNECTIONS: usize = 64;

const MAX_DIRECTIVES_BYTES: u64 = 1_024;

/// Whether this process accepts traffic; `note` gives the reason, or what is degraded.
#[derive(Debug, Clone)]
pub struct Readiness {
    pub ready: bool,
    pub note: String,
}

/// A process with a failed task is not ready: `readiness` may be the last value that this task reported.
pub fn routes(
    registry: Arc<Registry>,
    tasks: Tasks,
    readiness: impl Fn() -> Readiness + Clone + Send + Sync + 'static,
) -> impl Filter<Extract = (Response<String>,), Error = Rejection> + Clone + Send + Sync + 'static {
    let livez = warp::path!("livez").and(read()).map(|| plain(StatusCode::OK, "alive\n".into()));
    let readyz = warp::path!("readyz").and(read()).map(move || {
        let failed = |failure: TaskFailure| Readiness { ready: false, note: failure.to_string() };
        let Readiness { ready, note } = tasks.failure().map_or_else(&readiness, failed);
        plain(if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, format!("{note}\n"))
    });
    let metrics = warp::path!("metrics").and(read()).and(warp::header::headers_cloned()).map(
        move |headers: HeaderMap| {
            let mut body = String::new();
            text::encode_registry(&mut body, &registry).expect("writing to a string does not fail");
            let (form, body) = if wants_openmetrics(&headers) {
                (OPENMETRICS, body + "# EOF\n")
            } else {
                (CLASSIC, classic(&body))
            };
            answer(StatusCode::OK, form, body)
        },
    );
    let log = warp::path!("log").and(read()).map(|| match telemetry::filter() {
        Some(filter) => plain(StatusCode::OK, format!("{filter}\n")),
        None => plain(StatusCode::NOT_FOUND, "this process has no log\n".into()),
    });
    let change = warp::path!("log")
        .and(warp::put())
        .and(warp::body::content_length_limit(MAX_DIRECTIVES_BYTES))
        .and(warp::body::bytes())
        .map(|body: Bytes| change_log(&body));
    let readable = warp::path!("livez").or(warp::path!("readyz")).unify().or(warp::path!("metrics")).unify();
    let other = readable.map(|| not_allowed("GET, HEAD"));
    let other_log = warp::path!("log").and(warp::method()).and_then(async |method| match method {
        // A body that is too large keeps its own rejection.
        Method::PUT => Err(warp::reject()),
        _ => Ok(not_allowed("GET, HEAD, PUT")),
    });
    livez
        .or(readyz)
        .unify()
        .or(metrics)
        .unify()
        .or(log)
        .unify()
        .or(change)
        .unify()
        .or(other)
        .unify()
        .or(other_log)
        .unify()
}

/// HEAD is served wherever GET is, by the same handler: hyper drops the body.
pub(crate) fn read() -> impl Filter<Extract = (), Error = Rejection> + Copy {
    warp::get().or(warp::head()).unify()
}

pub(crate) fn not_allowed(allow: &'static str) -> Response<String> {
    let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, format!("allowed: {allow}\n"));
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
    response
}

fn wants_openmetrics(headers: &HeaderMap) -> bool {
    let openmetrics = weight(headers, header::ACCEPT, "application/openmetrics-text").unwrap_or(0);
    openmetrics > 0 && openmetrics >= weight(headers, header::ACCEPT, "text/plain").unwrap_or(0)
}

fn change_log(body: &[u8]) -> Response<String> {
    let before = telemetry::filter().unwrap_or_default();
    let directives = String::from_utf8_lossy(body);
    match telemetry::change_filter(directives.trim()) {
        Ok(()) => {
            let now = telemetry::filter().unwrap_or_default();
            tracing::warn!(before, now, "log filter changed");
            plain(StatusCode::OK, format!("{now}\n"))
        }
        Err(unchanged) => plain(StatusCode::BAD_REQUEST, format!("{unchanged}\n")),
    }
}

/// OpenMetrics in the older text format, which describes a counter by its full name.
fn classic(openmetrics: &str) -> String {
    let counters: HashSet<&str> = openmetrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    let mut text = String::with_capacity(openmetrics.len());
    for line in openmetrics.lines() {
        let described = line.strip_prefix("# ").and_then(|rest| rest.split_once(' '));
        match described.and_then(|(what, rest)| Some((what, rest.split_once(' ')?))) {
            Some((what, (name, rest))) if counters.contains(name) => {
                text.extend(["# ", what, " ", name, "_total ", rest, "\n"]);
            }
            _ => text.extend([line, "\n"]),
        }
    }
    text
}

pub(crate) fn plain(status: StatusCode, body: String) -> Response<String> {
    answer(status, "text/plain; charset=utf-8", body)
}

/// Indented, for human readers.
pub(crate) fn json(value: &impl Serialize) -> Response<String> {
    let body = serde_json::to_string_pretty(value).expect("strings, numbers and lists of them");
    answer(StatusCode::OK, "application/json", body + "\n")
}

fn answer(status: StatusCode, form: &'static str, body: String) -> Response<String> {
    Response::builder().status(status).header(header::CONTENT_TYPE, form).body(body).expect("static parts")
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;
    use tower_service::Service;

    use super::*;

    #[tokio::test]
    async fn readyz_fails_once_a_task_has_failed() {
        let tasks = Tasks::default();
        let ready = || Readiness { ready: true, note: "ready".into() };
        let mut service = warp::service(routes(Arc::default(), tasks.clone(), ready));
        let mut readyz = async || {
            let request = http::Request::get("/readyz").body(String::new()).unwrap();
            service.call(request).await.unwrap().status()
        };
        assert_eq!(readyz().await, StatusCode::OK);
        let stop = CancellationToken::new();
        tasks.spawn("readiness watch", &stop, async { panic!("no reason") }).await.unwrap();
        assert_eq!(readyz().await, StatusCode::SERVICE_UNAVAILABLE);
    }

    #[test]
    fn metrics_have_the_preferred_format() {
        let wants = |accept: &'static str| {
            wants_openmetrics(&HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static(accept))]))
        };
        for accept in [
            "application/openmetrics-text",
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
        ] {
            assert!(wants(accept), "{accept}");
        }
        for accept in [
            "*/*",
            "text/plain",
            "application/openmetrics-text;q=0",
            "application/openmetrics-text;q=0.1, text/plain",
            "application/openmetrics-text-2",
        ] {
            assert!(!wants(accept), "{accept}");
        }
    }

    #[test]
    fn older_text_format_describes_counters_by_their_full_names() {
        let openmetrics = "# HELP a_seconds Time.\n# TYPE a_seconds counter\na_seconds_total{x=\"# EOF\"} 1\n\
                           # HELP b # TYPE a counter.\n# TYPE b gauge\nb 2\n";
        let expected = "# HELP a_seconds_total Time.\n# TYPE a_seconds_total counter\na_seconds_total{x=\"# EOF\"} 1\n\
                        # HELP b # TYPE a counter.\n# TYPE b gauge\nb 2\n";
        assert_eq!(classic(openmetrics), expected);
    }
}
