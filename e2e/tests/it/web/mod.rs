//! The web client in a real Chromium, through a real nginx, over the real services.

mod away;
mod deploys;
mod endings;
mod front;
mod groups;
mod history;
mod keyboard;
mod looks;
mod messenger;
mod model;
mod original;
mod poison;
mod sending;
mod sign_in;
mod site;
pub(crate) mod stream;
mod talk;
