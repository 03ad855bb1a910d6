//! Explains what this gateway did with one event of one user. Read-only.

use protocol::{ids::UserId, position::Seq};

use super::{
    Engine,
    connection::{Connection, Resume, State},
    explanation::{EndedStream, Explanation, OpenStream},
};

/// Closed streams of one user in one explanation.
const MAX_CLOSED: usize = 100;

impl Engine {
    pub(super) fn explain(&self, user: UserId, seq: Seq) -> Explanation {
        let entry = self.hub.find(user).and_then(|at| self.hub.get(at));
        let position = entry.and_then(|entry| entry.sequencer.position());
        let subscribed = !self.redis_degraded && entry.is_some_and(|entry| entry.subscribed_on.is_some());
        let open = entry.into_iter().flat_map(|entry| &entry.connections);
        let open = open.filter_map(|key| self.connections.get(key.index as usize));
        let streams: Vec<_> = open
            .map(|connection| OpenStream {
                connection: connection.generation,
                session: connection.session,
                after: connection.started_after,
                upto: connection.position.seq,
                says: if position.is_some_and(|position| position.epoch != connection.position.epoch)
                    && connection.is_joined()
                {
                    "It must resync: its position is from another history of the feed"
                } else {
                    state(connection, seq)
                },
            })
            .collect();
        let ended = self.closed_streams.newest_first().filter(|closed| closed.user == user).take(MAX_CLOSED);
        let ended: Vec<_> = ended
            .map(|closed| EndedStream {
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
            })
            .collect();

        let mut says = Vec::new();
        match (entry, position) {
            (None, _) => says.push(format!("User {user} has no stream here")),
            (Some(_), None) => says.push("The head of this user's feed is not known yet: it was requested from api".into()),
            (Some(_), Some(position)) if seq <= position.seq => {
                says.push(format!("Event {seq} was delivered here: position is {}", position.seq));
            }
            (Some(_), Some(position)) => says.push(format!(
                "Event {seq} has not been delivered here: position is {}. If api says that it was written, it is requested \
                 within {:?}",
                position.seq,
                if self.redis_degraded { self.settings.degraded_reconcile } else { self.settings.reconcile },
            )),
        }
        if entry.is_some_and(|entry| entry.sequencer.is_uncertain()) {
            says.push(
                "This feed is uncertain, mostly because of a gap: the missing events are requested".into(),
            );
        }
        if self.backfill.failing() {
            says.push(
                "api does not answer backfill requests now; events from Redis are still delivered".into(),
            );
        }
        if self.redis_degraded {
            says.push("Redis is degraded: delivery falls back to reconciliation".into());
        } else if entry.is_some() && !subscribed {
            says.push("The subscription of this user's channel is not confirmed yet".into());
        }
        Explanation { user, seq, says, position, subscribed, streams, ended }
    }
}

fn state(connection: &Connection, seq: Seq) -> &'static str {
    match connection.state {
        State::Joining(_) if !connection.session_confirmed => {
            "Joining: its session is not confirmed yet, and until then it receives nothing"
        }
        State::Joining(Resume::After(_)) => {
            "Joining: it waits for the events after its cursor, or for its subscription"
        }
        State::Joining(_) => "Joining: it waits for the head of the feed, or for its subscription",
        State::Joined if connection.pending_resync.is_some() => "It must resync: the event is sent soon",
        State::Joined if seq <= connection.started_after => {
            "The event is before its start: the client had it, or reads it by REST"
        }
        State::Joined if seq > connection.position.seq => {
            if !connection.rest.is_empty() {
                "Not written yet: its socket cannot take bytes now (a slow consumer)"
            } else if connection.closing.is_some() {
                "Not written: the stream is closing, and its client resumes from its cursor"
            } else if connection.range_request.is_some() || !connection.page.is_empty() {
                "Not written yet: it is catching up from the feed"
            } else {
                "Not written yet: it waits for the event"
            }
        }
        State::Joined if seq == connection.position.seq && !connection.rest.is_empty() => {
            "Written in part: its socket cannot take bytes now (a slow consumer)"
        }
        State::Joined => "The event was written to it",
    }
}
