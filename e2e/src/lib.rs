//! The harness of the end-to-end suite: the real binaries as child processes, a database and a channel prefix for each
//! test, a real browser and a real nginx, and the comparison of what a browser saw with what the feed says. The promises themselves are in `tests/it`.

#![allow(clippy::disallowed_methods, reason = "tests notice the end of what they start")]

pub mod browser;
pub mod clients;
pub mod collector;
pub mod ledger;
pub mod nginx;
pub mod service;
mod settings;
pub mod world;

pub use browser::Browser;
pub use collector::Collector;
pub use nginx::Front;
pub use service::Service;
pub use settings::program;
pub use world::{User, World};
