//! The harness of the end-to-end suite: the real binaries as child processes, a database and a channel prefix for each
//! test, and the comparison of what a browser saw with what the feed says. The promises themselves are in `tests/it`.

pub mod ledger;
pub mod service;
mod settings;
pub mod world;

pub use service::Service;
pub use world::{User, World};
