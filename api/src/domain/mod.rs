//! What the product is about: people, conversations, messages. Values and rules, no I/O; the JSON form that clients see is
//! part of the value.

pub mod conversation;
pub mod device;
pub mod message;
pub mod name;
pub mod session;
pub mod user;

use chrono::{DateTime, Utc};
use serde::Serializer;

/// For `#[serde(serialize_with)]`: the one form of a time in JSON.
pub(crate) fn time<S: Serializer>(at: &DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&protocol::event::rfc3339(*at))
}
