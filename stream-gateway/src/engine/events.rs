//! Events, from Redis or from an answer, through the sequencer to the connections of their user.

use protocol::ids::{SessionId, UserId};

use super::{
    Asker, Engine,
    connection::{Key, Resume, Stage},
    sockets::begin_flush,
};
use crate::{
    backfill::{HeadQuestion, RangeQuestion, WhyHead},
    frame::{Event, Goodbye},
    metrics::DeliveryPath,
    sequencer::Step,
    subscriber::News,
};

impl Engine {
    pub(super) fn hear(&mut self, news: News) {
        match news {
            News::Event(user, event) => self.on_event(user, event),
            News::Revoked(user, session) => self.end_session(user, session),
            News::Confirmed(link, users) => {
                users.into_iter().for_each(|user| self.on_confirmed(user, link));
            }
            News::SentAway(link, users) => {
                for user in users {
                    if let Some(entry) = self.hub.find(user).and_then(|at| self.hub.get_mut(at)) {
                        entry.confirmed = entry.confirmed.filter(|by| *by != link);
                    }
                }
            }
            News::Lost(link) => {
                self.hub
                    .iter_mut()
                    .for_each(|entry| entry.confirmed = entry.confirmed.filter(|by| *by != link));
            }
            News::Trusted(trusted) if trusted == self.trusted => {}
            News::Trusted(trusted) => {
                self.trusted = trusted;
                self.metrics.redis_degraded.set(i64::from(!trusted));
                if !trusted {
                    // Nobody will confirm now; answers are all there is.
                    let joining = self.connections.iter().filter(|(_, connection)| !connection.is_placed());
                    let joining: Vec<_> = joining
                        .map(|(index, connection)| Key {
                            index: index as u32,
                            generation: connection.generation,
                        })
                        .collect();
                    joining.into_iter().for_each(|key| self.join(key));
                }
                self.reconcile_soon();
            }
            News::Doubted(user) => {
                if let Some(at) = self.hub.find(user)
                    && let Some(entry) = self.hub.get_mut(at)
                {
                    entry.sequencer.suspect(self.now);
                    self.take(at, vec![], DeliveryPath::Repair);
                }
            }
            News::Missed => self.reconcile_soon(),
        }
    }

    fn on_event(&mut self, user: UserId, event: Event) {
        let Some(user) = self.hub.find(user) else { return };
        let at = event.head;
        let count = self.hub.get(user).map_or(0, |entry| entry.connections.len());
        for index in 0..count {
            let Some(key) = self.hub.get(user).and_then(|entry| entry.connections.get(index).copied()) else {
                break;
            };
            let Some(connection) = self.connection(key) else { continue };
            let follows = connection.head.epoch == at.epoch && connection.head.seq + 1 == at.seq;
            if !follows {
                continue;
            }
            match connection.stage {
                // The event proves the cursor, and nothing was missed.
                Stage::Joining(Resume::After(_)) if connection.session_confirmed => {
                    Self::place_at_cursor(connection);
                    self.pull(key);
                }
                Stage::Joining(_) => continue,
                Stage::Placed => {}
            }
            self.write_next(key, &event, DeliveryPath::Redis);
        }
        let Some(entry) = self.hub.get_mut(user) else { return };
        let mut steps = Vec::new();
        if entry.sequencer.place().is_some() {
            entry.sequencer.live(at, event, self.now, &mut steps);
        } else {
            // The answer that brings the place brings what comes before it: nothing is kept while `api` is away.
            entry.sequencer.suspect(self.now);
        }
        self.take(user, steps, DeliveryPath::Redis);
    }

    /// Writes an event to a connection that has the one before it, if its socket is free.
    fn write_next(&mut self, key: Key, event: &Event, way: DeliveryPath) {
        let now = self.now;
        let Some(connection) = self.connections.get_mut(key.index as usize) else { return };
        if connection.generation != key.generation {
            return;
        }
        let follows = connection.head.epoch == event.head.epoch && connection.head.seq + 1 == event.head.seq;
        if follows && connection.is_clear() {
            connection.head = event.head;
            let flush = begin_flush(&self.hub, connection, event);
            let written = connection.write_block(&event.frame, now);
            self.note_delivery(event.created_at, way);
            self.note_flush(key, flush, &written);
            self.note_write(key, written);
        }
    }

    /// Does what a sequencer says.
    pub(super) fn take(&mut self, user: u32, steps: Vec<Step<Event>>, way: DeliveryPath) {
        let Some(entry) = self.hub.get(user) else { return };
        let id = entry.user;
        for step in steps {
            match step {
                Step::Deliver(_, event) => self.deliver(user, event, way),
                Step::Ask { after: Some(after) } => {
                    self.metrics.pending_gaps.inc();
                    let asked_at = self.hub.get(user).and_then(|entry| entry.sequencer.place());
                    self.backfill.ask_range(RangeQuestion {
                        user: id,
                        after,
                        asker: Asker::User,
                        way: DeliveryPath::Repair,
                        asked_at,
                    });
                }
                Step::Ask { after: None } => {
                    self.backfill.ask_head(HeadQuestion {
                        user: id,
                        asked_at: None,
                        why: WhyHead::Place,
                        session: None,
                    });
                }
                Step::Lost(why, head) => {
                    tracing::warn!(user.id = %id, event.seq = head.seq, reason = why.as_str(), "a feed lost its place");
                    self.clear_ring(user);
                    for key in self.connections_of(user) {
                        if let Some(connection) =
                            self.connection(key).filter(|connection| connection.is_placed())
                        {
                            connection.lost = Some(why);
                            self.pull(key);
                        }
                    }
                }
                Step::Gone => {
                    for key in self.connections_of(user) {
                        self.part(key, Goodbye::Revoked);
                    }
                }
            }
        }
        let Some(entry) = self.hub.get_mut(user) else { return };
        let due = entry.sequencer.due().unwrap_or(0);
        if due != entry.tick_at {
            self.ticks.remove(&(entry.tick_at, user));
            entry.tick_at = due;
            if due > 0 {
                self.ticks.insert((due, user));
            }
        }
    }

    /// The next event of a feed: to every socket that is free and has the one before; for the others it is kept.
    fn deliver(&mut self, user: u32, event: Event, way: DeliveryPath) {
        let at = event.head;
        let mut behind = false;
        let count = self.hub.get(user).map_or(0, |entry| entry.connections.len());
        for index in 0..count {
            let Some(key) = self.hub.get(user).and_then(|entry| entry.connections.get(index).copied()) else {
                break;
            };
            let Some(connection) = self.connection(key) else { continue };
            if !connection.is_placed() || connection.head.epoch != at.epoch || connection.head.seq >= at.seq {
                continue;
            }
            if connection.head.seq + 1 == at.seq && connection.is_clear() {
                self.write_next(key, &event, way);
            } else {
                behind = true;
            }
        }
        if behind {
            self.keep(user, event);
        }
    }

    fn keep(&mut self, user: u32, event: Event) {
        let Some(entry) = self.hub.get_mut(user) else { return };
        self.backlog -= entry.ring.bytes();
        entry.ring.push(event);
        self.backlog += entry.ring.bytes();
        if self.backlog > self.settings.backlog_bytes {
            // Those who are behind read from the feed when their sockets drain.
            self.clear_ring(user);
        }
    }

    fn clear_ring(&mut self, user: u32) {
        let Some(entry) = self.hub.get_mut(user) else { return };
        self.backlog -= entry.ring.bytes();
        entry.ring.clear();
    }

    /// Lets go of frames that every connection of the user has passed.
    pub(super) fn trim(&mut self, user: u32) {
        let Some(entry) = self.hub.get_mut(user) else { return };
        if entry.ring.is_empty() {
            return;
        }
        let connections = entry.connections.iter().filter_map(|key| self.connections.get(key.index as usize));
        let passed = connections
            .filter(|connection| connection.is_placed())
            .map(|connection| connection.head.seq)
            .min();
        self.backlog -= entry.ring.bytes();
        entry.ring.trim(passed.unwrap_or(u64::MAX));
        self.backlog += entry.ring.bytes();
    }

    pub(super) fn connections_of(&self, user: u32) -> Vec<Key> {
        self.hub.get(user).map_or_else(Vec::new, |entry| entry.connections.clone())
    }

    pub(super) fn end_session(&mut self, user: UserId, session: SessionId) {
        self.ended.note(user, session);
        let Some(user) = self.hub.find(user) else { return };
        for key in self.connections_of(user) {
            if self.connection(key).is_some_and(|connection| connection.session == Some(session)) {
                self.part(key, Goodbye::Revoked);
            }
        }
    }
}
