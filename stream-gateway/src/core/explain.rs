//! What this gateway did with one event of one user, for an operator; and the record of closed streams that it needs. Read-only.

use std::collections::VecDeque;

use chrono::{DateTime, Utc};
use protocol::{
    ids::{SessionId, UserId},
    position::{Epoch, Position, Seq},
};
use serde::Serialize;

use super::{connection::Connection, hub::Hub, user::LocalUser};

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

impl Hub {
    /// `api_fails`: whether `api` does not answer now.
    pub fn explain(&self, id: UserId, seq: Seq, closed: &ClosedStreams, api_fails: bool) -> Explanation {
        let user = self.user(id);
        let position = user.and_then(|user| user.sequencer.position());
        let is_subscribed = user.is_some_and(LocalUser::is_subscribed);
        let mut open: Vec<_> = user.into_iter().flat_map(LocalUser::connections).collect();
        open.sort_unstable_by_key(|connection| connection.key.generation);

        let mut says = Vec::new();
        match (user, position) {
            (None, _) => says.push(format!("User {id} has no stream here")),
            (Some(_), None) => says.push("The head of this user's feed is not known yet: it was requested from api".into()),
            (Some(_), Some(position)) if seq <= position.seq => {
                says.push(format!("Event {seq} was delivered here: position is {}", position.seq));
            }
            (Some(_), Some(position)) => says.push(format!(
                "Event {seq} has not been delivered here: position is {}. If api says that it was written, it is requested \
                 within {:?}",
                position.seq,
                self.reconcile_interval(),
            )),
        }
        if user.is_some_and(|user| user.sequencer.is_uncertain()) {
            says.push(
                "This feed is uncertain, mostly because of a gap: the missing events are requested".into(),
            );
        }
        if api_fails {
            says.push(
                "api does not answer backfill requests now; events from Redis are still delivered".into(),
            );
        }
        if self.redis_degraded() {
            says.push("Redis is degraded: delivery falls back to reconciliation".into());
        } else if user.is_some() && !is_subscribed {
            says.push("The subscription of this user's channel is not confirmed yet".into());
        }
        Explanation {
            user: id,
            seq,
            says,
            position,
            subscribed: is_subscribed && !self.redis_degraded(),
            streams: open.into_iter().map(|connection| connection.explain(position, seq)).collect(),
            ended: closed.of(id, position, seq),
        }
    }
}

impl Connection {
    fn explain(&self, position: Option<Position>, seq: Seq) -> OpenStream {
        let of_another_history = position.is_some_and(|position| position.epoch != self.position().epoch);
        OpenStream {
            connection: self.key.generation,
            session: self.session,
            after: self.started_after(),
            upto: self.position().seq,
            says: if of_another_history && self.is_joined() {
                "It must resync: its position is from another history of the feed"
            } else {
                self.says(seq)
            },
        }
    }
}

/// Closed streams of all users, about 300 KB.
const REMEMBERED: usize = 4_096;
/// Closed streams of one user in one explanation.
const EXPLAINED: usize = 100;

/// The newest is the last.
#[derive(Default)]
pub struct ClosedStreams(VecDeque<ClosedStream>);

#[derive(Debug)]
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
    pub fn note(&mut self, stream: ClosedStream) {
        if self.0.len() == REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back(stream);
    }

    fn of(&self, user: UserId, position: Option<Position>, seq: Seq) -> Vec<EndedStream> {
        let streams = self.0.iter().rev().filter(|closed| closed.user == user).take(EXPLAINED);
        let explained = streams.map(|closed| EndedStream {
            connection: closed.connection,
            session: closed.session,
            after: closed.after,
            upto: closed.upto,
            reason: closed.reason,
            ended_at: closed.at,
            says: if position.is_some_and(|position| position.epoch != closed.epoch) {
                "Its positions are from another history of the feed"
            } else if seq <= closed.after {
                "The event is before its start"
            } else if seq <= closed.upto {
                "The event was written to it"
            } else {
                "It ended before the event was written to it"
            },
        });
        explained.collect()
    }
}
