//! The Rust block of `docs/clients.md`, as it is there.
#![expect(clippy::print_stdout, reason = "the block shows each event so")]
#![expect(clippy::disallowed_methods, reason = "the block takes its two settings from the environment")]

include!(concat!(env!("OUT_DIR"), "/client.rs"));
