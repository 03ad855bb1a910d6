//! The answer to an operator's explain request, and the record of closed streams that it needs.

use std::collections::VecDeque;

use chrono::{DateTime, Utc};
use protocol::{
    ids::{SessionId, UserId},
    position::{Epoch, Position, Seq},
};
use serde::Serialize;

use super::connection::Connection;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    pub user: UserId,
    pub seq: Seq,
    /// In sentences, the most important one first.
    pub says: Vec<String>,
    /// This user's events were delivered here up to this one; absent without a stream, or before Postgres first answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<Position>,
    /// Whether the subscription of this user's channel is confirmed and Redis is not degraded.
    pub subscribed: bool,
    /// Oldest first.
    pub streams: Vec<OpenStream>,
    /// Newest first; limited by the record of all users' closed streams.
    pub ended: Vec<EndedStream>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OpenStream {
    /// As in the log.
    pub connection: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<SessionId>,
    /// It receives the events after this one.
    pub after: Seq,
    /// The last event that was written to its socket.
    pub upto: Seq,
    pub says: &'static str,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndedStream {
    pub connection: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<SessionId>,
    pub after: Seq,
    pub upto: Seq,
    pub reason: &'static str,
    pub ended_at: DateTime<Utc>,
    pub says: &'static str,
}

/// Closed streams of all users, about 300 KB.
const REMEMBERED: usize = 4_096;
/// The newest is the last.
#[derive(Default)]
pub struct ClosedStreams(VecDeque<ClosedStream>);

pub struct ClosedStream {
    pub user: UserId,
    pub connection: u32,
    pub session: Option<SessionId>,
    pub epoch: Epoch,
    pub after: Seq,
    pub upto: Seq,
    pub reason: &'static str,
    pub at: DateTime<Utc>,
}

impl ClosedStreams {
    pub fn newest_first(&self) -> impl Iterator<Item = &ClosedStream> {
        self.0.iter().rev()
    }

    pub fn note(&mut self, user: UserId, connection: &Connection, reason: &'static str) {
        if self.0.len() == REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back(ClosedStream {
            user,
            connection: connection.generation,
            session: connection.session,
            epoch: connection.position.epoch,
            after: connection.started_after,
            upto: connection.position.seq,
            reason,
            at: Utc::now(),
        });
    }
}
