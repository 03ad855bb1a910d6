//! The API over real HTTP, against a real Postgres (`DATABASE_URL`, a database per test) and a real Redis (`REDIS_URL`, a
//! channel prefix per test).

#![allow(clippy::disallowed_methods, reason = "a test fails if a task of its own does")]
#![expect(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod blocks;
mod checks;
mod contract;
mod database;
mod documents;
mod editing;
mod erasing;
mod explain;
mod external;
mod external_users;
mod failures;
mod feeds;
mod groups;
mod input;
mod limits;
mod model;
mod names;
mod origins;
mod paging;
mod presence;
mod process;
mod profile;
mod providers;
mod publish;
mod publish_http;
mod races;
mod raw;
mod retention;
mod services;
mod sessions;
mod sign_in;
mod support;
mod tls;
mod typing;
mod web;
