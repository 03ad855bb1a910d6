//! A small load bench over the services' own binaries, as they are shipped: durable Postgres, every limit, check and
//! heartbeat on, load from processes of their own. It prints ratios and percentiles together with the machine they came from,
//! and fails when an event was lost, repeated or out of order.
//!
//! Everything runs on one machine, so load and servers share its cores: rates are a lower bound, CPU per delivery and bytes
//! per stream are not disturbed by it.

#![allow(clippy::disallowed_methods, reason = "a tool, whose user notices")]

mod clock;
mod fixtures;
mod http;
pub mod load;
mod machine;
mod peers;
mod publisher;
mod report;
pub mod scenarios;
mod source;

use report::{figure, heading};

pub fn describe(quick: bool) {
    heading(chrono::Utc::now().format("%Y-%m-%d %H:%M UTC"));
    figure("machine", machine::describe());
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    figure("build", profile);
    if quick || cfg!(debug_assertions) {
        figure("note", "not for the record: small numbers or a debug build");
    }
}
