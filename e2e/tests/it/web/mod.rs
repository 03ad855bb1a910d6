//! What people see: the web client in a real Chromium, through a real nginx, over the real services.

mod front;
mod original;
mod site;
mod stream;
