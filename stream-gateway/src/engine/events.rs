//! Events from Redis or a backfill, through the sequencer to the connections of their user.

use protocol::ids::{SessionId, UserId};

use super::{
    Engine, Requester,
    connection::{Resume, State},
    sockets::begin_flush,
};
use crate::{
    backfill::{HeadReason, HeadRequest, RangeRequest},
    event::EncodedEvent,
    frame::Goodbye,
    hub::ConnectionKey,
    metrics::DeliveryPath,
    sequencer::Step,
    subscriber::RedisUpdate,
};

impl Engine {
    pub(super) fn on_redis(&mut self, updates: RedisUpdate) {
        match updates {
            RedisUpdate::Event(user, event) => self.on_event(user, event),
            RedisUpdate::SessionEnded(user, session) => self.close_session(user, session),
            RedisUpdate::Subscribed(link, users) => {
                users.into_iter().for_each(|user| self.on_subscribed(user, link));
            }
            RedisUpdate::Moved(link, users) => {
                for user in users {
                    if let Some(entry) = self.hub.find(user).and_then(|at| self.hub.get_mut(at)) {
                        entry.subscribed_on = entry.subscribed_on.filter(|by| *by != link);
                    }
                }
            }
            RedisUpdate::Disconnected(link) => {
                self.hub
                    .iter_mut()
                    .for_each(|entry| entry.subscribed_on = entry.subscribed_on.filter(|by| *by != link));
            }
            RedisUpdate::Degraded(degraded) if degraded == self.redis_degraded => {}
            RedisUpdate::Degraded(degraded) => {
                self.redis_degraded = degraded;
                self.metrics.redis_degraded.set(i64::from(degraded));
                if degraded {
                    // No subscription will be confirmed now: connections join without one.
                    let joining = self.connections.iter().filter(|(_, connection)| !connection.is_joined());
                    let joining: Vec<_> = joining
                        .map(|(index, connection)| ConnectionKey {
                            index: index as u32,
                            generation: connection.generation,
                        })
                        .collect();
                    joining.into_iter().for_each(|key| self.join(key));
                }
                self.reconcile_now();
            }
            RedisUpdate::Uncertain(user) => {
                if let Some(at) = self.hub.find(user)
                    && let Some(entry) = self.hub.get_mut(at)
                {
                    entry.sequencer.mark_uncertain(self.now);
                    self.apply(at, vec![], DeliveryPath::Repair);
                }
            }
            RedisUpdate::Dropped => self.reconcile_now(),
        }
    }

    fn on_event(&mut self, user: UserId, event: EncodedEvent) {
        let Some(user) = self.hub.find(user) else { return };
        let at = event.position;
        let count = self.hub.get(user).map_or(0, |entry| entry.connections.len());
        for index in 0..count {
            let Some(key) = self.hub.get(user).and_then(|entry| entry.connections.get(index).copied()) else {
                break;
            };
            let Some(connection) = self.connection(key) else { continue };
            let follows = connection.position.epoch == at.epoch && connection.position.seq + 1 == at.seq;
            if !follows {
                continue;
            }
            match connection.state {
                // The event follows the cursor, so nothing is missing.
                State::Joining(Resume::After(_)) if connection.session_confirmed => {
                    Self::join_at_cursor(connection);
                    self.write_pending(key);
                }
                State::Joining(_) => continue,
                State::Joined => {}
            }
            self.write_next(key, &event, DeliveryPath::Redis);
        }
        let Some(entry) = self.hub.get_mut(user) else { return };
        let mut steps = Vec::new();
        if entry.sequencer.position().is_some() {
            entry.sequencer.live(at, event, self.now, &mut steps);
        } else {
            // Not buffered, in case `api` is down: the check includes this event, and a stream that needs it reads the feed.
            entry.sequencer.mark_uncertain(self.now);
        }
        self.apply(user, steps, DeliveryPath::Redis);
    }

    /// Writes the event if it is the connection's next one and the connection is live.
    fn write_next(&mut self, key: ConnectionKey, event: &EncodedEvent, path: DeliveryPath) {
        let now = self.now;
        let Some(connection) = self.connections.get_mut(key.index as usize) else { return };
        if connection.generation != key.generation {
            return;
        }
        let follows = connection.position.epoch == event.position.epoch
            && connection.position.seq + 1 == event.position.seq;
        if follows && connection.is_live() {
            connection.position = event.position;
            let flush = begin_flush(&self.hub, connection, event);
            let written = connection.write_block(&event.frame, now);
            self.note_delivery(event.created_at, path);
            self.note_flush(key, flush, &written);
            self.note_write(key, written);
        }
    }

    /// Carries out a sequencer's steps and schedules its next tick.
    pub(super) fn apply(&mut self, user: u32, steps: Vec<Step<EncodedEvent>>, path: DeliveryPath) {
        let Some(entry) = self.hub.get(user) else { return };
        let id = entry.user;
        for step in steps {
            match step {
                Step::Deliver(_, event) => self.deliver(user, event, path),
                Step::Request { after: Some(after) } => {
                    self.metrics.pending_gaps.inc();
                    let requested_at = self.hub.get(user).and_then(|entry| entry.sequencer.position());
                    self.backfill.request_range(RangeRequest {
                        user: id,
                        after,
                        requester: Requester::User,
                        path: DeliveryPath::Repair,
                        requested_at,
                    });
                }
                Step::Request { after: None } => {
                    self.backfill.request_head(HeadRequest {
                        user: id,
                        requested_at: None,
                        why: HeadReason::Position,
                        session: None,
                    });
                }
                Step::Resync(why, head) => {
                    tracing::warn!(user.id = %id, event.seq = head.seq, reason = why.as_str(), "feed position is invalid; its streams must resync");
                    self.clear_replay(user);
                    for key in self.connections_of(user) {
                        if let Some(connection) =
                            self.connection(key).filter(|connection| connection.is_joined())
                        {
                            connection.pending_resync = Some(why);
                            self.write_pending(key);
                        }
                    }
                }
                Step::Gone => {
                    for key in self.connections_of(user) {
                        self.start_closing(key, Goodbye::Revoked);
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

    /// Writes the event to the live connections; the replay buffer keeps it for lagging ones.
    fn deliver(&mut self, user: u32, event: EncodedEvent, path: DeliveryPath) {
        let at = event.position;
        let mut behind = false;
        let count = self.hub.get(user).map_or(0, |entry| entry.connections.len());
        for index in 0..count {
            let Some(key) = self.hub.get(user).and_then(|entry| entry.connections.get(index).copied()) else {
                break;
            };
            let Some(connection) = self.connection(key) else { continue };
            if !connection.is_joined()
                || connection.position.epoch != at.epoch
                || connection.position.seq >= at.seq
            {
                continue;
            }
            if connection.position.seq + 1 == at.seq && connection.is_live() {
                self.write_next(key, &event, path);
            } else {
                behind = true;
            }
        }
        if behind {
            self.buffer_for_replay(user, event);
        }
    }

    fn buffer_for_replay(&mut self, user: u32, event: EncodedEvent) {
        let Some(entry) = self.hub.get_mut(user) else { return };
        self.backlog -= entry.replay.bytes();
        entry.replay.push(event);
        self.backlog += entry.replay.bytes();
        if self.backlog > self.settings.replay_buffer_bytes {
            // Lagging connections read from the feed when their sockets take bytes again.
            self.clear_replay(user);
        }
    }

    fn clear_replay(&mut self, user: u32) {
        let Some(entry) = self.hub.get_mut(user) else { return };
        self.backlog -= entry.replay.bytes();
        entry.replay.clear();
    }

    /// Frees frames that all joined connections of the user have passed.
    pub(super) fn trim(&mut self, user: u32) {
        let Some(entry) = self.hub.get_mut(user) else { return };
        if entry.replay.is_empty() {
            return;
        }
        let connections = entry.connections.iter().filter_map(|key| self.connections.get(key.index as usize));
        let passed = connections
            .filter(|connection| connection.is_joined())
            .map(|connection| connection.position.seq)
            .min();
        self.backlog -= entry.replay.bytes();
        entry.replay.trim(passed.unwrap_or(u64::MAX));
        self.backlog += entry.replay.bytes();
    }

    pub(super) fn connections_of(&self, user: u32) -> Vec<ConnectionKey> {
        self.hub.get(user).map_or_else(Vec::new, |entry| entry.connections.clone())
    }

    pub(super) fn close_session(&mut self, user: UserId, session: SessionId) {
        self.ended.note(user, session);
        let Some(user) = self.hub.find(user) else { return };
        for key in self.connections_of(user) {
            if self.connection(key).is_some_and(|connection| connection.session == Some(session)) {
                self.start_closing(key, Goodbye::Revoked);
            }
        }
    }
}
