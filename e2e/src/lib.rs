//! What the end-to-end suite adds to `testkit`: a real browser, a real collector, and clients in other languages.

#![allow(clippy::disallowed_methods, reason = "a test fails if a task of its own does")]

pub mod browser;
pub mod clients;
pub mod collector;

pub use browser::Browser;
pub use collector::Collector;
pub use testkit::{
    ledger,
    nginx::{self, Front},
    programs::program,
    service::{self, Service},
    user::TestUser,
    world::{self, World},
};
