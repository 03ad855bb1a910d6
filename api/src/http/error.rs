//! How a failure is answered. Nothing else knows that a failure has a status, a code and a sentence.

use http::{HeaderValue, StatusCode, header};
use protocol::problem::Problem;
use service_kit::{limiter::Over, origins::OriginNotAllowed};
use warp::reply::Response;

use crate::{commands::CommandError, external::ExternalError, store::StoreError};

#[derive(Debug)]
pub(super) enum ApiError {
    /// Code and sentence.
    NotFound(&'static str, &'static str),
    /// What is allowed instead.
    MethodNotAllowed(&'static str),
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
    /// It cannot be told whether a external token is good.
    NoExternalKeys,
    Store(StoreError),
}

impl ApiError {
    pub(super) const NOT_FOUND: Self = Self::NotFound("not_found", "Not found");
    pub(super) const NO_USER: Self = Self::NotFound("user_not_found", "User not found");
    pub(super) const NO_CONVERSATION: Self =
        Self::NotFound("conversation_not_found", "Conversation not found");

    pub(super) fn unacceptable(field: &'static str, sentence: impl Into<String>) -> Self {
        Self::Unacceptable(field, sentence.into())
    }

    /// A response whose problem still lacks the request's id: the edge, which knows it, completes it.
    pub(super) fn into_response(self) -> Response {
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
            Self::NoExternalKeys | Self::Store(StoreError::Unavailable(_)) => {
                (StatusCode::SERVICE_UNAVAILABLE, "unavailable", "Service unavailable, try again soon".into())
            }
            Self::Store(StoreError::Fault(_)) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "internal", "Internal server error".into())
            }
        };
        let mut problem = Problem::new(status, code, message, "");
        let mut extra = None;
        match self {
            Self::MethodNotAllowed(allow) => extra = Some((header::ALLOW, HeaderValue::from_static(allow))),
            Self::Unauthorized => {
                extra = Some((header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")));
            }
            Self::RateLimited(over) => {
                extra = Some((header::RETRY_AFTER, HeaderValue::from(over.retry_after())));
            }
            Self::Unacceptable(field, sentence) => {
                problem.errors.insert(field.into(), sentence);
            }
            Self::NoExternalKeys => extra = Some((header::RETRY_AFTER, HeaderValue::from_static("5"))), // Its source logs why.
            Self::Store(StoreError::Unavailable(reason)) => {
                tracing::warn!(reason, "the database is not available");
                extra = Some((header::RETRY_AFTER, HeaderValue::from_static("1")));
            }
            Self::Store(StoreError::Fault(error)) => tracing::error!(%error, "a request failed"),
            _ => {}
        }
        let mut response = super::empty(status);
        if let Some((name, value)) = extra {
            response.headers_mut().insert(name, value);
        }
        response.extensions_mut().insert(problem);
        response
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
            ExternalError::Token(error) => {
                tracing::debug!(reason = %error, "a external token was refused");
                Self::Unauthorized
            }
            ExternalError::Subject => Self::Unauthorized,
            ExternalError::NoKeys => Self::NoExternalKeys,
            ExternalError::Store(error) => Self::Store(error),
        }
    }
}

impl<R: std::error::Error + Into<ApiError>> From<CommandError<R>> for ApiError {
    fn from(error: CommandError<R>) -> Self {
        match error {
            CommandError::NoSession => Self::Unauthorized,
            CommandError::Refused(refusal) => refusal.into(),
            CommandError::Store(error) => Self::Store(error),
        }
    }
}
