//! What an explanation says, and the record of closed streams that it needs.

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
    /// Up to where this user's events were delivered here; absent without a stream, or before Postgres first answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<Position>,
    /// Whether Redis brings what is published for this user.
    pub subscribed: bool,
    /// Oldest first.
    pub streams: Vec<OpenStream>,
    /// Of this user's, the newest first; bounded by what is remembered of everybody's.
    pub ended: Vec<EndedStream>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OpenStream {
    /// As in the log.
    pub connection: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<SessionId>,
    /// It was told what follows this event.
    pub after: Seq,
    /// Up to this one, the last that was written to its socket.
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

/// Streams of all users: some 300 KB.
const REMEMBERED: usize = 4_096;
/// The streams that closed last, the newest at the end.
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
