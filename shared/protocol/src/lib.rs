//! What `api`, `stream-gateway` and their clients agree on: ids, positions, events, tokens, channel names, internal
//! requests, and the form of errors. It does no I/O.

pub mod channels;
pub mod claims;
pub mod event;
pub mod external;
pub mod feed;
pub mod ids;
pub mod jose;
pub mod keys_version;
pub mod position;
pub mod problem;
