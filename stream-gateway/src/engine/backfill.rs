//! Backfill requests and what their answers mean: joining, catching up, reconciling.

use std::{collections::HashSet, num::NonZeroU32};

use protocol::{feed::Login, ids::UserId, position::Position};

use super::{
    Engine, Requester, bytes_of,
    connection::{Resume, State},
    jittered,
};
use crate::{
    backfill::{HeadReason, HeadRequest, HeadsAnswered, RangeAnswer, RangeRequest},
    frame::Goodbye,
    hub::ConnectionKey,
    metrics::DeliveryPath,
    sequencer::{Answer, Verdict, judge},
    subscriber::RedisConnectionId,
};

impl Engine {
    pub(super) fn request_range(&mut self, key: ConnectionKey, after: u64) {
        self.last_request = self.last_request.checked_add(1).unwrap_or(NonZeroU32::MIN);
        let request = self.last_request;
        let Some(connection) = self.connection(key) else { return };
        connection.range_request = Some(request);
        let user = connection.user;
        let Some(entry) = self.hub.get(user) else { return };
        self.backfill.request_range(RangeRequest {
            user: entry.user,
            after,
            requester: Requester::Connection(key, request),
            path: DeliveryPath::Replay,
            requested_at: entry.sequencer.position(),
        });
    }

    pub(super) fn on_range(&mut self, request: RangeRequest<Requester>, answer: RangeAnswer) {
        let Some(user) = self.hub.find(request.user) else { return };
        let Some(entry) = self.hub.get_mut(user) else { return };
        let before = entry.sequencer.position();
        let mut steps = Vec::new();
        match request.requester {
            Requester::User => {
                let events = answer.events.into_iter().map(|event| (event.position.seq, event)).collect();
                let answer = Answer {
                    requested_at: request.requested_at,
                    head: answer.head,
                    events,
                    after: Some(request.after),
                    more: answer.more,
                };
                entry.sequencer.answer(answer, self.now, &mut steps);
                self.apply(user, steps, DeliveryPath::Repair);
            }
            Requester::Connection(key, number) => {
                let head_only = Answer {
                    requested_at: request.requested_at,
                    head: answer.head,
                    events: vec![],
                    after: None,
                    more: false,
                };
                entry.sequencer.observe(head_only, self.now, &mut steps);
                self.apply(user, steps, DeliveryPath::Repair);
                self.on_page(key, number, request.after, answer);
            }
        }
        self.on_position_known(before, user);
    }

    /// The answer to a connection's own request.
    fn on_page(&mut self, key: ConnectionKey, number: NonZeroU32, after: u64, answer: RangeAnswer) {
        let room = self.settings.replay_buffer_bytes.saturating_sub(self.backlog);
        let Some(connection) = self.connection(key) else { return };
        if connection.range_request != Some(number) {
            return; // A resync came in between.
        }
        connection.range_request = None;
        let cursor = Position { epoch: connection.position.epoch, seq: after };
        match judge(cursor, answer.head, answer.events.first().map(|event| event.position.seq)) {
            Verdict::Gone => self.start_closing(key, Goodbye::Revoked),
            Verdict::Resync(why) => {
                if !connection.is_joined() {
                    connection.state = State::Joined;
                    connection.pending_ready = Some(false);
                }
                connection.pending_resync = Some(why);
                self.write_pending(key);
            }
            Verdict::Follows => {
                if !connection.is_joined() {
                    Self::join_at_cursor(connection);
                }
                let mut bytes = 0;
                let passed = connection.position.seq;
                let page = answer.events.into_iter().filter(|event| event.position.seq > passed).enumerate();
                // At least one event, so that lagging connections progress although the replay buffers are full.
                connection.page = page
                    .take_while(|(index, event)| {
                        bytes += event.frame.len();
                        *index == 0 || bytes <= room
                    })
                    .map(|(_, event)| event)
                    .collect();
                let bytes = bytes_of(&connection.page);
                self.backlog += bytes;
                self.write_pending(key);
            }
        }
    }

    pub(super) fn on_heads(&mut self, answered: HeadsAnswered) {
        let HeadsAnswered { batch, requests, heads, ended, keys } = answered;
        self.keys.notice_version(&keys);
        for request in requests {
            if request.why == HeadReason::Reconcile {
                self.reconciling = self.reconciling.saturating_sub(1);
            }
            match request.login() {
                Some(login) if ended.contains(&login) => self.close_session(login.user, login.session),
                Some(login) => self.confirm_session(login, batch),
                None => {}
            }
            let Some(user) = self.hub.find(request.user) else { continue };
            let Some(entry) = self.hub.get_mut(user) else { continue };
            let position = entry.sequencer.position();
            let answer = |head| Answer {
                requested_at: request.requested_at,
                head,
                events: vec![],
                after: None,
                more: false,
            };
            let mut steps = Vec::new();
            match (heads.get(&request.user).copied(), request.why) {
                (Some(head), HeadReason::Position) => {
                    entry.sequencer.answer(answer(head), self.now, &mut steps);
                }
                (Some(head), HeadReason::Join) => entry.sequencer.observe(answer(head), self.now, &mut steps),
                (Some(head), HeadReason::Reconcile) => {
                    let beyond = head
                        .zip(position)
                        .is_some_and(|(head, position)| head != position && head.seq >= position.seq);
                    self.metrics.reconcile_recovered_feeds.inc_by(u64::from(beyond));
                    entry.sequencer.observe(answer(head), self.now, &mut steps);
                }
                // api answers only with heads that differ.
                (None, _) => {}
            }
            self.apply(user, steps, DeliveryPath::Repair);
            self.on_position_known(position, user);
        }
        if self.reconciling == 0 && self.reconcile_again {
            self.reconcile_again = false;
            self.reconcile_now();
        }
    }

    /// The answer to this batch confirms the session: its connections that were opened before the batch may join.
    fn confirm_session(&mut self, login: Login, batch: u32) {
        let Some(user) = self.hub.find(login.user) else { return };
        for key in self.connections_of(user) {
            let Some(connection) = self.connection(key) else { continue };
            let is_later = batch.wrapping_sub(connection.came_after_batch).cast_signed() > 0;
            if connection.session == Some(login.session) && !connection.session_confirmed && is_later {
                connection.session_confirmed = true;
                self.enforce_user_limit(user, true);
                self.join(key);
            }
        }
    }

    /// If an answer brought the user's first position, the connections that waited for it continue.
    fn on_position_known(&mut self, before: Option<Position>, user: u32) {
        let known = self.hub.get(user).is_some_and(|entry| entry.sequencer.position().is_some());
        if before.is_some() || !known {
            return;
        }
        for key in self.connections_of(user) {
            match self.connection(key).map(|connection| connection.state) {
                Some(State::Joining(Resume::Head | Resume::Invalid)) => self.join_at_head(key),
                Some(State::Joined) => self.write_pending(key), // It was ahead of the sequencer and may be behind it now.
                _ => {}
            }
        }
    }

    /// Redis delivers this user's events from here on; earlier ones are requested.
    pub(super) fn on_subscribed(&mut self, user: UserId, link: RedisConnectionId) {
        let Some(at) = self.hub.find(user) else { return };
        let Some(entry) = self.hub.get_mut(at) else { return };
        entry.subscribed_on = Some(link);
        if let Some(position) = entry.sequencer.position() {
            let request =
                HeadRequest { user, requested_at: Some(position), why: HeadReason::Join, session: None };
            self.backfill.request_head(request);
        } else if entry.connections.iter().any(|key| self.connections[key.index as usize].session_requested) {
            // The request in flight was made before the subscription: check again after it.
            entry.sequencer.mark_uncertain(self.now);
            self.apply(at, vec![], DeliveryPath::Repair);
        }
        for key in self.connections_of(at) {
            self.join(key);
        }
    }

    /// Requests the head of every user. One round at a time.
    pub(super) fn reconcile(&mut self) {
        let every =
            if self.redis_degraded { self.settings.degraded_reconcile } else { self.settings.reconcile };
        self.reconcile_at = self.now + jittered(every);
        if self.backfill.failing() {
            self.drop_stale_requests();
        }
        if self.reconciling > 0 {
            return;
        }
        for (_, entry) in self.hub.iter() {
            let request = |session| HeadRequest {
                user: entry.user,
                requested_at: entry.sequencer.position(),
                why: HeadReason::Reconcile,
                session,
            };
            let sessions =
                entry.connections.iter().filter_map(|key| self.connections.get(key.index as usize));
            let mut sessions: Vec<_> = sessions.filter_map(|connection| connection.session).collect();
            sessions.sort_unstable();
            sessions.dedup();
            if sessions.is_empty() {
                self.backfill.request_head(request(None));
                self.reconciling += 1;
            }
            for session in sessions {
                self.backfill.request_head(request(Some(session)));
                self.reconciling += 1;
            }
        }
    }

    /// Events of any user may be missing. During a round, another one follows: the current one may have been requested too early.
    pub(super) fn reconcile_now(&mut self) {
        if self.reconciling > 0 {
            self.reconcile_again = true;
        } else {
            self.reconcile_at = self.now;
        }
    }

    /// While `api` does not answer, requests of closed connections must not pile up.
    fn drop_stale_requests(&mut self) {
        let (hub, connections) = (&self.hub, &self.connections);
        let mut dropped = 0;
        let mut seen = HashSet::new();
        self.backfill.retain(
            |request| match request.requester {
                Requester::User => hub.find(request.user).is_some(),
                Requester::Connection(key, number) => {
                    connections.get(key.index as usize).is_some_and(|connection| {
                        connection.generation == key.generation && connection.range_request == Some(number)
                    })
                }
            },
            |request| {
                let Some(entry) = hub.find(request.user).and_then(|user| hub.get(user)) else {
                    dropped += usize::from(request.why == HeadReason::Reconcile);
                    return false;
                };
                match request.why {
                    HeadReason::Position => true,
                    // One request per session is enough.
                    HeadReason::Join => {
                        let wanted = request.session.is_none_or(|session| {
                            let mut here = entry.connections.iter();
                            here.any(|key| {
                                connections
                                    .get(key.index as usize)
                                    .is_some_and(|c| c.session == Some(session))
                            })
                        });
                        wanted && seen.insert((request.user, request.session))
                    }
                    // The next round requests it again.
                    HeadReason::Reconcile => {
                        dropped += 1;
                        false
                    }
                }
            },
        );
        self.reconciling = self.reconciling.saturating_sub(dropped);
    }
}
