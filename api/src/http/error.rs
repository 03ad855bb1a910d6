//! Error answers: status, code and headers of each; handlers supply the sentences that only they know.

use std::sync::Arc;

use http::{HeaderValue, StatusCode, header};
use protocol::problem::Problem;
use service_kit::{limiter::Over, origins::OriginNotAllowed};
use warp::reply::Response;

use crate::{domain::service_token::Scope, external::ExternalError, store::StoreError};

#[derive(Debug)]
pub(super) enum ApiError {
    /// Code and sentence.
    NotFound(&'static str, &'static str),
    /// The value of `Allow`.
    MethodNotAllowed(HeaderValue),
    ContentType,
    Unauthorized,
    OriginNotAllowed(OriginNotAllowed),
    /// Code and sentence.
    Forbidden(&'static str, &'static str),
    RateLimited(Over),
    BodyTooLarge,
    BodyTooSlow,
    BadBody(String),
    /// Field and sentence.
    Unacceptable(&'static str, String),
    /// A 422 by the state of things: code and sentence.
    NotNow(&'static str, &'static str),
    /// An external token cannot be verified without its issuer's keys.
    NoExternalKeys,
    /// Presence could not be read or written in Redis, in time.
    NoPresence,
    Store(StoreError),
}

impl ApiError {
    pub(super) const NOT_FOUND: Self = Self::NotFound("not_found", "Not found");
    pub(super) const NO_USER: Self = Self::NotFound("user_not_found", "User not found");
    pub(super) const NO_CONVERSATION: Self =
        Self::NotFound("conversation_not_found", "Conversation not found");
    pub(super) const NO_MESSAGE: Self = Self::NotFound("message_not_found", "Message not found");

    pub(super) const NO_EXTERNAL_ISSUER: Self =
        Self::NotFound("no_external_issuer", "There are no subjects here: EXTERNAL_ISSUER is not set");

    pub(super) const USER_REQUIRED: Self =
        Self::Forbidden("user_token_required", "This needs the token of a user, not of a service");

    pub(super) const SERVICE_REQUIRED: Self =
        Self::Forbidden("service_token_required", "This needs a service token, not the token of a user");

    pub(super) fn lacks(scope: Scope) -> Self {
        let sentence = match scope {
            Scope::Publish => "This service token lacks the scope publish",
            Scope::Users => "This service token lacks the scope users",
            Scope::Admin => "This service token lacks the scope admin",
        };
        Self::Forbidden("scope_required", sentence)
    }

    pub(super) fn name_taken() -> Self {
        Self::unacceptable("username", "Username taken")
    }

    pub(super) fn unacceptable(field: &'static str, sentence: impl Into<String>) -> Self {
        Self::Unacceptable(field, sentence.into())
    }

    /// A fault of ours goes into the response's extensions, where the edge finds it for the log.
    pub(super) fn into_response(self, request_id: &str) -> Response {
        let (status, code, message) = match &self {
            Self::NotFound(code, sentence) => (StatusCode::NOT_FOUND, *code, (*sentence).to_owned()),
            Self::MethodNotAllowed(_) => {
                (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "Method not allowed".into())
            }
            Self::ContentType => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "unsupported_media_type",
                "Content type of application/json required".into(),
            ),
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, "unauthorized", "Unauthorized".into()),
            Self::OriginNotAllowed(why) => (StatusCode::FORBIDDEN, OriginNotAllowed::CODE, why.to_string()),
            Self::Forbidden(code, sentence) => (StatusCode::FORBIDDEN, *code, (*sentence).to_owned()),
            Self::RateLimited(over) => (
                StatusCode::TOO_MANY_REQUESTS,
                "rate_limited",
                match over.retry_after() {
                    1 => "Too many requests, try again in a second".into(),
                    seconds => format!("Too many requests, try again in {seconds} seconds"),
                },
            ),
            Self::BodyTooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", "Body too large".into()),
            Self::BodyTooSlow => {
                (StatusCode::REQUEST_TIMEOUT, "body_too_slow", "The body did not arrive in time".into())
            }
            Self::BadBody(sentence) => (StatusCode::BAD_REQUEST, "bad_body", sentence.clone()),
            Self::Unacceptable(_, sentence) => {
                (StatusCode::UNPROCESSABLE_ENTITY, "unacceptable", sentence.clone())
            }
            Self::NotNow(code, sentence) => (StatusCode::UNPROCESSABLE_ENTITY, *code, (*sentence).to_owned()),
            Self::NoExternalKeys
            | Self::NoPresence
            | Self::Store(StoreError::Unavailable(_) | StoreError::Crowded) => {
                (StatusCode::SERVICE_UNAVAILABLE, "unavailable", "Service unavailable, try again soon".into())
            }
            Self::Store(StoreError::Fault(_)) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "internal", "Internal server error".into())
            }
        };
        let mut problem = Problem::new(status, code, message, request_id);
        if let Self::Unacceptable(field, sentence) = &self {
            problem.errors.insert((*field).into(), sentence.clone());
        }
        let mut response: Response = problem.into_response();
        let header = match &self {
            Self::MethodNotAllowed(allow) => Some((header::ALLOW, allow.clone())),
            Self::Unauthorized => Some((header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))),
            Self::RateLimited(over) => Some((header::RETRY_AFTER, over.retry_after().into())),
            Self::NoExternalKeys | Self::NoPresence => {
                Some((header::RETRY_AFTER, HeaderValue::from_static("5")))
            }
            Self::Store(StoreError::Unavailable(_) | StoreError::Crowded) => {
                Some((header::RETRY_AFTER, HeaderValue::from_static("1")))
            }
            _ => None,
        };
        response.headers_mut().extend(header);
        if let Self::Store(error) = self {
            response.extensions_mut().insert(RequestFailure::from(error));
        }
        response
    }
}

/// In a response's extensions: the error behind a 500 or 503, for the log.
#[derive(Debug, Clone)]
pub(super) struct RequestFailure(Arc<StoreError>);

impl RequestFailure {
    pub(super) fn log(&self) {
        match &*self.0 {
            StoreError::Unavailable(reason) => {
                tracing::warn!(reason, "postgres is unavailable; the request was rejected");
            }
            StoreError::Fault(error) => tracing::error!(%error, "request failed"),
            StoreError::Crowded => {
                tracing::warn!("too many requests wait for one conversation; the request was rejected");
            }
        }
    }
}

impl From<StoreError> for RequestFailure {
    fn from(error: StoreError) -> Self {
        Self(Arc::new(error))
    }
}

impl From<Over> for ApiError {
    fn from(over: Over) -> Self {
        Self::RateLimited(over)
    }
}

impl From<OriginNotAllowed> for ApiError {
    fn from(why: OriginNotAllowed) -> Self {
        Self::OriginNotAllowed(why)
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<ExternalError> for ApiError {
    fn from(error: ExternalError) -> Self {
        match error {
            ExternalError::Token(_) | ExternalError::Subject => Self::Unauthorized,
            ExternalError::NoKeys => Self::NoExternalKeys,
            ExternalError::Store(error) => Self::Store(error),
        }
    }
}
