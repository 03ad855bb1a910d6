//! The header `Idempotency-Key`, and answers to repeats.

use http::{HeaderValue, StatusCode};
use serde::Serialize;
use warp::reply::Response;

use super::{error::ApiError, json, request::Inbound};
use crate::domain::idempotency::IdempotencyKey;

const FIELD: &str = "idempotencyKey";

pub(super) fn key(inbound: &Inbound) -> Result<Option<IdempotencyKey>, ApiError> {
    let mut values = inbound.headers.get_all("idempotency-key").iter();
    let Some(value) = values.next() else { return Ok(None) };
    // Two keys do not identify one request.
    let value = if values.next().is_none() { value.as_bytes() } else { b"" };
    let key = IdempotencyKey::parse(value);
    key.map(Some).map_err(|error| ApiError::unacceptable(FIELD, error.to_string()))
}

pub(super) fn conflict(made: &str) -> ApiError {
    ApiError::unacceptable(FIELD, format!("Idempotency-Key was already used for another {made}"))
}

/// What the first request made, as it is now.
pub(super) fn replayed<T: Serialize>(made: &T) -> Response {
    let mut response = json(StatusCode::CREATED, made);
    response.headers_mut().insert("idempotent-replayed", HeaderValue::from_static("true"));
    response
}
