//! The promise, with the real binaries over real Postgres, Redis and sockets: every event of a user's feed, once, in order, from
//! the cursor on. Failures may delay events; none is lost.
#![allow(clippy::disallowed_methods, reason = "a test fails if a task of its own does")]
#![allow(clippy::unwrap_used, reason = "a test fails where an assumption does not hold")]

mod bad_input;
mod clients;
mod crashes;
mod delivery;
mod drain;
mod endings;
mod examples;
mod exports;
mod external;
mod fuzz;
mod gone;
mod groups;
mod heads;
mod keys;
mod monitoring;
mod numbering;
mod opening;
mod own_events;
mod presence;
mod publish;
mod redis;
mod redis_acl;
mod redis_cluster;
mod redis_sentinel;
mod resume;
mod revocation;
mod secrets;
mod slow_consumers;
mod support;
mod traces;
mod typing;
mod web;
