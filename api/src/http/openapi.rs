//! The API's `OpenAPI` 3.1 document. Tests check every answer that they see against it.

use std::sync::Arc;

use http::header;
use warp::reply::Response;

use super::{
    Api, HandlerResult, JSON,
    request::{Inbound, NoBody},
};

pub(super) const PATH: &str = "/api/openapi.json";

pub(super) const DOCUMENT: &str = include_str!("../../openapi.json");

pub(super) async fn document(_: Arc<Api>, _: Inbound, _: NoBody) -> HandlerResult {
    let mut response = Response::new(DOCUMENT.into());
    response.headers_mut().insert(header::CONTENT_TYPE, JSON);
    Ok(response)
}
