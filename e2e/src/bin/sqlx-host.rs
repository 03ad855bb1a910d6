//! The Rust host of `examples`, as it is there.
#![expect(clippy::print_stdout, reason = "it says what failed")]
#![expect(clippy::disallowed_methods, reason = "it takes its two settings from the environment")]

include!("../../../examples/sqlx/host.rs");
