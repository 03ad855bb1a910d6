//! What only the end-to-end suite has beside `testkit`: a real browser, a real collector, and readers by other people's
//! libraries. The promises themselves are in `tests/it`.

#![allow(clippy::disallowed_methods, reason = "tests notice the end of what they start")]

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
    user::User,
    world::{self, World},
};
