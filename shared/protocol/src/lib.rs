//! What `api`, `stream-gateway` and their clients must agree on: ids, positions in a feed, events, tokens, channel names, the
//! requests of gateways to `api`, and the form of a failure. No I/O, and nothing that only one of them needs.

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
