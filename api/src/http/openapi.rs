//! The API as a document: `OpenAPI` 3.1, with the stream's events. Tests hold every answer that they see against it.

use http::{HeaderValue, header};
use warp::{Filter, reply::Response};

use super::{Resource, otherwise, read};

pub(super) const PATH: &str = "/api/openapi.json";

const DOCUMENT: &str = include_str!("../../openapi.json");

pub(super) fn openapi() -> Resource {
    let path = warp::path!("api" / "openapi.json").boxed();
    let get = path.clone().and(read()).map(|| {
        let mut response = Response::new(DOCUMENT.into());
        let form = HeaderValue::from_static("application/json; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, form);
        Ok(response)
    });
    get.or(path.and(otherwise("GET, HEAD"))).unify().boxed()
}
