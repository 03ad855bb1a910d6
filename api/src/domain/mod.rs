//! Users, conversations, messages, sessions: values and rules without I/O, in the JSON form that clients see.

pub mod conversation;
pub mod device;
pub mod event;
pub mod export;
pub mod group;
pub mod idempotency;
pub mod message;
pub mod name;
pub mod published;
pub mod service_token;
pub mod session;
mod text;
pub mod user;

use chrono::{DateTime, Utc};
use serde::Serializer;

/// For `#[serde(serialize_with)]`: times in JSON.
pub(crate) fn time<S: Serializer>(at: &DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&protocol::event::rfc3339(*at))
}

/// The same for a time that may be absent.
#[expect(clippy::ref_option, reason = "the form that serde calls")]
pub(crate) fn optional_time<S: Serializer>(
    at: &Option<DateTime<Utc>>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match at {
        Some(at) => time(at, serializer),
        None => serializer.serialize_none(),
    }
}
