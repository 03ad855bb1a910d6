//! The delivery core: which bytes each stream gets next, and what must be requested for it. Pure: no I/O, no clock, no thread.
//!
//! Three machines, one inside the other: a [`connection`] is one stream, a [`user`] is one feed with its streams, the [`Hub`] is
//! all users of the process with their timers. An input is a method of the hub. It appends [`Effect`]s, which the caller carries
//! out in order before the next input. The engine does so with sockets, `api` and Redis; `simulation` does so with simulated ones
//! and every fault.
//!
//! After `ready`, each stream receives every event after its cursor, once and in order, or a resync. No stream delays another.

mod connection;
mod drain;
mod effect;
mod explain;
mod hub;
mod reconcile;
mod replay;
mod rule;
mod sequencer;
mod user;
mod wheel;

#[cfg(test)]
mod simulation;

pub use self::{
    connection::{NewConnection, Resume},
    effect::{
        ConnectionKey, Effect, HeadReason, HeadRequest, Observation, RangeAnswer, RangeRequest,
        RedisConnectionId, WrittenEvent,
    },
    explain::{ClosedStream, ClosedStreams, Explanation},
    hub::Hub,
};

/// Milliseconds on the caller's monotonic clock.
pub type Millis = u64;
