//! Questions to Postgres, why they are asked, and what their answers mean: joining, catching up, the reconcile.

use std::{collections::HashSet, num::NonZeroU32};

use protocol::{feed::Login, ids::UserId, position::Position};

use super::{
    Asker, Engine, bytes_of,
    connection::{Key, Resume, Stage},
    jittered,
};
use crate::{
    backfill::{HeadQuestion, HeadsAnswered, RangeAnswer, RangeQuestion, WhyHead},
    frame::Goodbye,
    metrics::DeliveryPath,
    sequencer::{Answer, Verdict, judge},
    subscriber::Link,
};

impl Engine {
    pub(super) fn ask_range(&mut self, key: Key, after: u64) {
        self.question = self.question.checked_add(1).unwrap_or(NonZeroU32::MIN);
        let question = self.question;
        let Some(connection) = self.connection(key) else { return };
        connection.asked = Some(question);
        let user = connection.user;
        let Some(entry) = self.hub.get(user) else { return };
        self.backfill.ask_range(RangeQuestion {
            user: entry.user,
            after,
            asker: Asker::Connection(key, question),
            way: DeliveryPath::Replay,
            asked_at: entry.sequencer.place(),
        });
    }

    pub(super) fn on_range(&mut self, question: RangeQuestion<Asker>, answer: RangeAnswer) {
        let Some(user) = self.hub.find(question.user) else { return };
        let Some(entry) = self.hub.get_mut(user) else { return };
        let before = entry.sequencer.place();
        let mut steps = Vec::new();
        match question.asker {
            Asker::User => {
                let events = answer.events.into_iter().map(|event| (event.head.seq, event)).collect();
                let answer = Answer {
                    asked_at: question.asked_at,
                    head: answer.head,
                    events,
                    after: Some(question.after),
                    more: answer.more,
                };
                entry.sequencer.answer(answer, self.now, &mut steps);
                self.take(user, steps, DeliveryPath::Repair);
            }
            Asker::Connection(key, number) => {
                let head_only = Answer {
                    asked_at: question.asked_at,
                    head: answer.head,
                    events: vec![],
                    after: None,
                    more: false,
                };
                entry.sequencer.observe(head_only, self.now, &mut steps);
                self.take(user, steps, DeliveryPath::Repair);
                self.on_page(key, number, question.after, answer);
            }
        }
        self.go_on_from(before, user);
    }

    /// The answer to a connection's own question.
    fn on_page(&mut self, key: Key, number: NonZeroU32, after: u64, answer: RangeAnswer) {
        let room = self.settings.backlog_bytes.saturating_sub(self.backlog);
        let Some(connection) = self.connection(key) else { return };
        if connection.asked != Some(number) {
            return; // Its place was lost since.
        }
        connection.asked = None;
        let cursor = Position { epoch: connection.head.epoch, seq: after };
        match judge(cursor, answer.head, answer.events.first().map(|event| event.head.seq)) {
            Verdict::Gone => self.part(key, Goodbye::Revoked),
            Verdict::Lost(why) => {
                if !connection.is_placed() {
                    connection.stage = Stage::Placed;
                    connection.owes_ready = Some(false);
                }
                connection.lost = Some(why);
                self.pull(key);
            }
            Verdict::Follows => {
                if !connection.is_placed() {
                    Self::place_at_cursor(connection);
                }
                let mut bytes = 0;
                let passed = connection.head.seq;
                let page = answer.events.into_iter().filter(|event| event.head.seq > passed).enumerate();
                // At least one, so that a full backlog slows readers down and does not stop them.
                connection.page = page
                    .take_while(|(index, event)| {
                        bytes += event.frame.len();
                        *index == 0 || bytes <= room
                    })
                    .map(|(_, event)| event)
                    .collect();
                let bytes = bytes_of(&connection.page);
                self.backlog += bytes;
                self.pull(key);
            }
        }
    }

    pub(super) fn on_heads(&mut self, answered: HeadsAnswered) {
        let HeadsAnswered { request, questions, heads, ended, keys } = answered;
        self.keys.hear_of(&keys);
        for question in questions {
            if question.why == WhyHead::Reconcile {
                self.reconciling = self.reconciling.saturating_sub(1);
            }
            match question.login() {
                Some(login) if ended.contains(&login) => self.end_session(login.user, login.session),
                Some(login) => self.confirm_session(login, request),
                None => {}
            }
            let Some(user) = self.hub.find(question.user) else { continue };
            let Some(entry) = self.hub.get_mut(user) else { continue };
            let place = entry.sequencer.place();
            let answer =
                |head| Answer { asked_at: question.asked_at, head, events: vec![], after: None, more: false };
            let mut steps = Vec::new();
            match (heads.get(&question.user).copied(), question.why) {
                (Some(head), WhyHead::Place) => entry.sequencer.answer(answer(head), self.now, &mut steps),
                (Some(head), WhyHead::Join) => entry.sequencer.observe(answer(head), self.now, &mut steps),
                (Some(head), WhyHead::Reconcile) => {
                    let beyond =
                        head.zip(place).is_some_and(|(head, place)| head != place && head.seq >= place.seq);
                    self.metrics.reconcile_recovered_feeds.inc_by(u64::from(beyond));
                    entry.sequencer.observe(answer(head), self.now, &mut steps);
                }
                // Only what differs is answered.
                (None, _) => {}
            }
            self.take(user, steps, DeliveryPath::Repair);
            self.go_on_from(place, user);
        }
        if self.reconciling == 0 && self.reconcile_again {
            self.reconcile_again = false;
            self.reconcile_soon();
        }
    }

    /// The session lives, by the answer to this request: those of its connections that had come before may join.
    fn confirm_session(&mut self, login: Login, request: u32) {
        let Some(user) = self.hub.find(login.user) else { return };
        for key in self.connections_of(user) {
            let Some(connection) = self.connection(key) else { continue };
            let is_later = request.wrapping_sub(connection.came_after_request).cast_signed() > 0;
            if connection.session == Some(login.session) && !connection.session_confirmed && is_later {
                connection.session_confirmed = true;
                self.keep_to_limit(user, true);
                self.join(key);
            }
        }
    }

    /// After an answer: if it told the user's place for the first time, those who waited for it go on.
    fn go_on_from(&mut self, before: Option<Position>, user: u32) {
        let known = self.hub.get(user).is_some_and(|entry| entry.sequencer.place().is_some());
        if before.is_some() || !known {
            return;
        }
        for key in self.connections_of(user) {
            match self.connection(key).map(|connection| connection.stage) {
                Some(Stage::Joining(Resume::Head | Resume::Nonsense)) => self.place_at_head(key),
                Some(Stage::Placed) => self.pull(key), // It was ahead of the hub and may be behind it now.
                _ => {}
            }
        }
    }

    /// From here on Redis brings what is published for this user; what was committed before is asked for.
    pub(super) fn on_confirmed(&mut self, user: UserId, link: Link) {
        let Some(at) = self.hub.find(user) else { return };
        let Some(entry) = self.hub.get_mut(at) else { return };
        entry.confirmed = Some(link);
        if let Some(place) = entry.sequencer.place() {
            let question = HeadQuestion { user, asked_at: Some(place), why: WhyHead::Join, session: None };
            self.backfill.ask_head(question);
        } else if entry.connections.iter().any(|key| self.connections[key.index as usize].session_asked) {
            // The answer that is on its way was asked for too early: look again after it.
            entry.sequencer.suspect(self.now);
            self.take(at, vec![], DeliveryPath::Repair);
        }
        for key in self.connections_of(at) {
            self.join(key);
        }
    }

    /// Whose head is beyond what is here? One round at a time.
    pub(super) fn reconcile(&mut self) {
        let every = if self.trusted { self.settings.reconcile } else { self.settings.suspect_reconcile };
        self.reconcile_at = self.now + jittered(every);
        if self.backfill.failing() {
            self.drop_stale_questions();
        }
        if self.reconciling > 0 {
            return;
        }
        for (_, entry) in self.hub.iter() {
            let question = |session| HeadQuestion {
                user: entry.user,
                asked_at: entry.sequencer.place(),
                why: WhyHead::Reconcile,
                session,
            };
            let sessions =
                entry.connections.iter().filter_map(|key| self.connections.get(key.index as usize));
            let mut sessions: Vec<_> = sessions.filter_map(|connection| connection.session).collect();
            sessions.sort_unstable();
            sessions.dedup();
            if sessions.is_empty() {
                self.backfill.ask_head(question(None));
                self.reconciling += 1;
            }
            for session in sessions {
                self.backfill.ask_head(question(Some(session)));
                self.reconciling += 1;
            }
        }
    }

    /// A doubt about everybody. During a round, another one follows: the present one may have asked too early.
    pub(super) fn reconcile_soon(&mut self) {
        if self.reconciling > 0 {
            self.reconcile_again = true;
        } else {
            self.reconcile_at = self.now;
        }
    }

    /// While `api` does not answer, connections that came and went must not leave questions behind.
    fn drop_stale_questions(&mut self) {
        let (hub, connections) = (&self.hub, &self.connections);
        let mut dropped = 0;
        let mut seen = HashSet::new();
        self.backfill.retain(
            |question| match question.asker {
                Asker::User => hub.find(question.user).is_some(),
                Asker::Connection(key, number) => {
                    connections.get(key.index as usize).is_some_and(|connection| {
                        connection.generation == key.generation && connection.asked == Some(number)
                    })
                }
            },
            |question| {
                let Some(entry) = hub.find(question.user).and_then(|user| hub.get(user)) else {
                    dropped += usize::from(question.why == WhyHead::Reconcile);
                    return false;
                };
                match question.why {
                    WhyHead::Place => true,
                    // Of several that ask the same, the first is enough.
                    WhyHead::Join => {
                        let wanted = question.session.is_none_or(|session| {
                            let mut here = entry.connections.iter();
                            here.any(|key| {
                                connections
                                    .get(key.index as usize)
                                    .is_some_and(|c| c.session == Some(session))
                            })
                        });
                        wanted && seen.insert((question.user, question.session))
                    }
                    // The next round asks anew.
                    WhyHead::Reconcile => {
                        dropped += 1;
                        false
                    }
                }
            },
        );
        self.reconciling = self.reconciling.saturating_sub(dropped);
    }
}
