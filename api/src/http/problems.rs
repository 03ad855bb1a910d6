//! The pages that the `type` of an error leads to: what happened, and what to do.

use std::{fmt::Write, sync::Arc};

use http::{HeaderValue, StatusCode, header};
use protocol::problem_types::{self, ProblemType};
use warp::reply::Response;

use super::{
    Api, HandlerResult,
    error::ApiError,
    request::{Inbound, NoBody},
};

const HTML: HeaderValue = HeaderValue::from_static("text/html; charset=utf-8");
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);
const CACHE: HeaderValue = HeaderValue::from_static("public, max-age=3600");

pub(super) fn exists(parameters: &[String]) -> bool {
    problem_types::find(&parameters[0]).is_some()
}

pub(super) async fn page(_: Arc<Api>, inbound: Inbound, _: NoBody) -> HandlerResult {
    let code = inbound.parameters.first().map_or("", String::as_str);
    let ProblemType { code, title, happened, to_do } =
        problem_types::find(code).ok_or(ApiError::NOT_FOUND)?;
    let body = format!(
        "<p><code>{code}</code></p>\n<h2>What happened</h2>\n<p>{}</p>\n<h2>What to do</h2>\n<p>{}</p>\n\
         <p><a href=\"/problems\">All problems</a></p>\n",
        escaped(happened),
        escaped(to_do)
    );
    Ok(html(title, &body))
}

pub(super) async fn list(_: Arc<Api>, _: Inbound, _: NoBody) -> HandlerResult {
    let mut body = String::from("<dl>\n");
    for ProblemType { code, title, .. } in problem_types::ALL {
        let title = escaped(title);
        writeln!(body, "<dt><a href=\"/problems/{code}\"><code>{code}</code></a></dt><dd>{title}</dd>")
            .expect("a string takes everything");
    }
    body.push_str("</dl>\n");
    Ok(html("Problems", &body))
}

fn html(title: &str, body: &str) -> Response {
    let title = escaped(title);
    let page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n<h1>{title}</h1>\n{body}</html>\n"
    );
    let mut response = Response::new(page.into());
    *response.status_mut() = StatusCode::OK;
    response.headers_mut().extend([
        (header::CONTENT_TYPE, HTML),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, CACHE),
    ]);
    response
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
