//! Error answers: `application/problem+json` (RFC 9457) for every endpoint of both services.

use std::collections::BTreeMap;

use http::{HeaderValue, Response, StatusCode, header};
use serde::{Deserialize, Serialize};

use crate::problem_types;

/// `type` is the page about `code`, the stable name of an error, which `api` serves: `/problems/{code}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    #[serde(rename = "type")]
    pub kind: String,
    pub title: String,
    pub status: u16,
    pub code: String,
    pub message: String,
    /// The correction, where the fixed `message` does not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Field to sentence; on 422 only.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub errors: BTreeMap<String, String>,
    pub request_id: String,
}

impl Problem {
    /// `code` is one of [`problem_types::ALL`].
    pub fn new(
        status: StatusCode,
        code: &str,
        message: impl Into<String>,
        request_id: impl Into<String>,
    ) -> Self {
        let known = problem_types::find(code);
        debug_assert!(known.is_some(), "{code} is not in problem_types");
        let title = known.map(|kind| kind.title).or(status.canonical_reason());
        Self {
            kind: format!("/problems/{code}"),
            title: title.unwrap_or("Error").into(),
            status: status.as_u16(),
            code: code.into(),
            message: message.into(),
            detail: None,
            errors: BTreeMap::new(),
            request_id: request_id.into(),
        }
    }

    /// The HTTP answer; headers such as `Allow` and `Retry-After` are the caller's.
    pub fn into_response<B: From<Vec<u8>>>(self) -> Response<B> {
        let body = serde_json::to_vec(&self).expect("a problem is plain strings and numbers");
        let mut response = Response::new(body.into());
        *response.status_mut() =
            StatusCode::from_u16(self.status).expect("a problem is made from a StatusCode");
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        response
    }
}
