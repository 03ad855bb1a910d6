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
                    "It is about to be told resync: its place is from another history"
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
                    "Its numbers are from another history"
                } else if seq <= closed.after {
                    "The event was before its time"
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
            (Some(_), None) => says.push("Where this user's feed ends is not known yet: api was asked".into()),
            (Some(_), Some(position)) if seq <= position.seq => {
                says.push(format!("Event {seq} has passed here: what follows {} is awaited", position.seq));
            }
            (Some(_), Some(position)) => says.push(format!(
                "Event {seq} has not come by here: events are known up to {}. If api says that it was written, it is asked for \
                 within {:?}",
                position.seq,
                if self.redis_degraded { self.settings.degraded_reconcile } else { self.settings.reconcile },
            )),
        }
        if entry.is_some_and(|entry| entry.sequencer.is_uncertain()) {
            says.push("There is a hole or another doubt in this feed: Postgres is asked what follows".into());
        }
        if self.backfill.failing() {
            says.push("api does not answer this gateway's questions now; what Redis brings goes on".into());
        }
        if self.redis_degraded {
            says.push("Redis is away or in doubt: events come by asking api".into());
        } else if entry.is_some() && !subscribed {
            says.push("Redis has not confirmed this user's channel yet".into());
        }
        Explanation { user, seq, says, position, subscribed, streams, ended }
    }
}

fn state(connection: &Connection, seq: Seq) -> &'static str {
    match connection.state {
        State::Joining(_) if !connection.session_confirmed => {
            "It has just come: whether its session lives was asked, and it receives nothing before that is answered"
        }
        State::Joining(Resume::After(_)) => {
            "It has just come: what follows its cursor was asked, or waits for Redis's confirmation"
        }
        State::Joining(_) => {
            "It has just come: where the feed ends was asked, or waits for Redis's confirmation"
        }
        State::Joined if connection.pending_resync.is_some() => "It is about to be told resync",
        State::Joined if seq <= connection.started_after => {
            "The event was before its time: its client had it, or reads it by REST"
        }
        State::Joined if seq > connection.position.seq => {
            if !connection.rest.is_empty() {
                "Not written yet: its socket takes no more (a slow or stalled client)"
            } else if connection.closing.is_some() {
                "Not written: the stream is being ended, and its client will ask again by its cursor"
            } else if connection.range_request.is_some() || !connection.page.is_empty() {
                "Not written yet: it is catching up from the feed"
            } else {
                "Not written yet: it waits for the event"
            }
        }
        State::Joined if seq == connection.position.seq && !connection.rest.is_empty() => {
            "Written in part: its socket takes no more (a slow or stalled client)"
        }
        State::Joined => "The event was written to it",
    }
}
