//! One user: the order of the feed, the events that lagging streams need, and the streams.

use std::{
    collections::VecDeque,
    mem,
    num::NonZeroU32,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use protocol::{
    ids::{SessionId, UserId},
    position::{Position, Seq},
};
use rand::{RngExt, rngs::SmallRng};
use smallvec::SmallVec;

use super::{
    Millis,
    connection::{Connection, FeedView, NewConnection},
    effect::{
        ConnectionKey, Effect, HeadReason, HeadRequest, Observation, RangeAnswer, RangeRequest,
        RedisConnectionId, RequestId, Requester,
    },
    replay::ReplayBuffer,
    rule::{Rule, kept},
    sequencer::{FeedAnswer, Sequencer, Step},
    wheel::Wheel,
};
use crate::{
    config::{Delivery, HEARTBEAT_JITTER},
    event::EncodedEvent,
    frame::{Chunk, Goodbye},
};

/// Emptied lists of steps keep memory for as many.
const KEPT_STEPS: usize = 16;

pub struct LocalUser {
    pub id: UserId,
    pub sequencer: Sequencer<EncodedEvent>,
    replay: ReplayBuffer,
    /// In no order.
    connections: SmallVec<[Connection; 1]>,
    /// The [`RedisConnectionId`] on which the subscription is confirmed.
    subscribed_on: Option<NonZeroU32>,
    /// Writes whose result is not reported yet.
    pub unreported: u32,
    /// When the user may be forgotten. The entry stays for a moment after the last stream, because people reload pages.
    pub forget_at: Millis,
}

/// What every user of the process shares.
pub struct Context<'a> {
    pub now: Millis,
    pub wall: SystemTime,
    pub settings: &'a Delivery,
    pub redis_degraded: bool,
    pub effects: &'a mut Vec<Effect>,
    pub wheel: &'a mut Wheel,
    pub rng: &'a mut SmallRng,
    /// Bytes in replay buffers and pages.
    pub backlog: &'a mut usize,
    pub last_request: &'a mut RequestId,
    /// Writes that this input has begun.
    pub writes: u32,
    /// A stream has joined during this input.
    pub joined: bool,
    /// Emptied steps of sequencers.
    pub steps: &'a mut Vec<Step<EncodedEvent>>,
    /// This input has left events in memory, where they wait.
    pub has_left_events: bool,
}

impl Context<'_> {
    pub fn observed(&mut self, observation: Observation) {
        self.effects.push(Effect::Observed(observation));
    }

    pub fn next_request(&mut self) -> RequestId {
        *self.last_request = self.last_request.checked_add(1).unwrap_or(NonZeroU32::MIN);
        *self.last_request
    }

    pub fn request_range(&mut self, feed: FeedView<'_>, after: Seq, requester: Requester) {
        let request = RangeRequest { user: feed.user, after, requester, requested_at: feed.position };
        self.effects.push(Effect::RequestRange(request));
    }

    pub fn request_head(&mut self, feed: FeedView<'_>, why: HeadReason, session: Option<SessionId>) {
        let request = HeadRequest { user: feed.user, requested_at: feed.position, why, session };
        self.effects.push(Effect::RequestHead(request));
    }

    /// As much of a page as there is room for, and at least one event, so that lagging streams progress.
    pub fn take_page(&mut self, events: Vec<EncodedEvent>) -> VecDeque<EncodedEvent> {
        let room = self.settings.replay_buffer_bytes.saturating_sub(*self.backlog);
        let (mut bytes, mut page) = (0, VecDeque::from(events));
        let fits = page.iter().take_while(|event| {
            bytes += event.frame.len();
            bytes <= room
        });
        let fits = fits.count().max(1);
        page.truncate(fits);
        *self.backlog += page.iter().map(|event| event.frame.len()).sum::<usize>();
        page
    }

    pub fn release(&mut self, bytes: usize) {
        *self.backlog -= bytes;
    }

    pub fn jittered(&mut self, every: Duration) -> Millis {
        jittered(self.rng, every)
    }
}

pub fn jittered(rng: &mut SmallRng, every: Duration) -> Millis {
    every.mul_f64(rng.random_range(1.0 - HEARTBEAT_JITTER..1.0 + HEARTBEAT_JITTER)).as_millis() as Millis
}

impl LocalUser {
    pub fn new(id: UserId) -> Self {
        Self {
            id,
            sequencer: Sequencer::default(),
            replay: ReplayBuffer::default(),
            connections: SmallVec::new(),
            subscribed_on: None,
            unreported: 0,
            forget_at: 0,
        }
    }

    pub fn connections(&self) -> &[Connection] {
        &self.connections
    }

    pub fn replay_bytes(&self) -> usize {
        self.replay.bytes()
    }

    #[cfg(test)]
    pub fn waiting_events(&self) -> impl Iterator<Item = &EncodedEvent> {
        let pages = self.connections.iter().flat_map(Connection::page_events);
        self.replay.events().chain(pages).chain(self.sequencer.buffered())
    }

    #[cfg(test)]
    pub fn count_backlog(&self) -> usize {
        self.replay.bytes() + self.connections.iter().map(Connection::page_bytes).sum::<usize>()
    }

    pub fn is_subscribed(&self) -> bool {
        self.subscribed_on.is_some()
    }

    /// The sessions of the streams, each once.
    pub fn sessions(&self) -> SmallVec<[SessionId; 4]> {
        let mut sessions: SmallVec<_> =
            self.connections.iter().filter_map(|connection| connection.session).collect();
        sessions.sort_unstable();
        sessions.dedup();
        sessions
    }

    /// The streams, and what each sees of the user.
    fn split(&mut self) -> (&mut [Connection], FeedView<'_>) {
        let feed = FeedView {
            user: self.id,
            streams: self.connections.len(),
            position: self.sequencer.position(),
            replay: &self.replay,
            subscribed: self.subscribed_on.is_some(),
        };
        (&mut self.connections, feed)
    }

    fn each(&mut self, mut input: impl FnMut(&mut Connection, FeedView<'_>)) {
        let (connections, feed) = self.split();
        connections.iter_mut().for_each(|connection| input(connection, feed));
    }

    /// One stream, by its place among the user's.
    fn one(&mut self, at: usize, input: impl FnOnce(&mut Connection, FeedView<'_>)) {
        let (connections, feed) = self.split();
        if let Some(connection) = connections.get_mut(at) {
            input(connection, feed);
        }
    }
}

/// Streams.
impl LocalUser {
    pub fn open(
        &mut self,
        key: ConnectionKey,
        new: NewConnection,
        close: Option<Goodbye>,
        cx: &mut Context<'_>,
    ) {
        let mut connection = Connection::open(key, new, cx);
        if let Some(why) = close {
            connection.close(why, cx);
        }
        let confirmed = connection.session_confirmed();
        self.connections.push(connection);
        self.enforce_limit(confirmed, cx);
        self.one(self.connections.len() - 1, |connection, feed| connection.join(feed, cx));
    }

    /// Closes the user's oldest streams over the limit. Confirmed and unconfirmed streams are counted separately, so that the
    /// token of an ended session cannot replace live streams.
    fn enforce_limit(&mut self, confirmed: bool, cx: &mut Context<'_>) {
        let counts =
            |connection: &Connection| !connection.is_closing() && connection.session_confirmed() == confirmed;
        while self.connections.iter().filter(|connection| counts(connection)).count()
            > cx.settings.streams_per_user
        {
            let staying = self.connections.iter_mut().filter(|connection| counts(connection));
            let Some(oldest) = staying.min_by_key(|connection| connection.key.generation) else { return };
            oldest.close(Goodbye::Replaced, cx);
        }
    }

    pub fn close_session(&mut self, session: SessionId, cx: &mut Context<'_>) {
        self.close(Goodbye::Revoked, |connection| connection.session == Some(session), cx);
    }

    pub fn close(&mut self, why: Goodbye, which: impl Fn(&Connection) -> bool, cx: &mut Context<'_>) {
        self.connections
            .iter_mut()
            .filter(|connection| which(connection))
            .for_each(|connection| connection.close(why, cx));
    }

    /// Forgets a stream. Its place is taken by the last one, whose key is returned.
    pub fn remove(&mut self, at: usize, reason: &'static str, cx: &mut Context<'_>) -> Option<ConnectionKey> {
        let connection = self.connections.swap_remove(at);
        self.unreported -= u32::from(connection.is_writing());
        let key = connection.key;
        let closed = connection.closed(self.id, reason, cx);
        cx.effects.push(Effect::Close(key, Box::new(closed)));
        self.trim(cx);
        self.connections.get(at).map(|moved| moved.key)
    }

    pub fn wrote(&mut self, at: usize, rest: Bytes, cx: &mut Context<'_>) {
        self.unreported -= 1;
        self.one(at, |connection, feed| connection.wrote(rest, feed, cx));
        self.enforce_bounds(cx);
    }

    pub fn writable(&mut self, at: usize, cx: &mut Context<'_>) {
        self.one(at, |connection, feed| connection.writable(feed, cx));
    }

    /// Returns why the stream must be removed.
    pub fn on_due(&mut self, at: usize, cx: &mut Context<'_>) -> Option<&'static str> {
        self.connections[at].on_due(cx)
    }

    pub fn end_body(&mut self, at: usize, cx: &mut Context<'_>) {
        self.connections[at].end_body(cx);
    }
}

/// Events.
impl LocalUser {
    /// An event has come from Redis.
    pub fn event(&mut self, event: EncodedEvent, cx: &mut Context<'_>) {
        if self.sequencer.follow(event.position) {
            // The usual case, in one pass over the streams.
            return self.deliver_with(event, Connection::offer, cx);
        }
        self.each(|connection, feed| connection.offer(&event, feed, cx));
        let mut steps = mem::take(cx.steps);
        if self.sequencer.position().is_some() {
            self.sequencer.live(event.position, event, cx.now, &mut steps);
        } else {
            // Not buffered, in case `api` is down: the check includes this event, and a stream that needs it reads the feed.
            self.sequencer.mark_uncertain(cx.now);
        }
        cx.has_left_events |= self.sequencer.buffers_events();
        self.apply(steps, cx);
    }

    /// Events have waited in memory long enough: their texts may be deleted meanwhile. The feed has them, and the streams read it when
    /// they can continue.
    pub fn drop_waiting_events(&mut self, cx: &mut Context<'_>) {
        if kept(Rule::Aged) {
            self.clear_replay(cx);
            self.each(|connection, _| connection.drop_page(cx));
            self.sequencer.drop_buffered();
        }
    }

    /// Writes it to the streams that can take it now. It is kept for none, and moves nothing.
    pub fn ephemeral(&mut self, event: &Chunk, cx: &mut Context<'_>) {
        let mut delivered = 0;
        self.each(|connection, _| delivered += u32::from(connection.ephemeral(event, cx)));
        let dropped = self.connections.len() as u32 - delivered;
        cx.observed(Observation::Ephemeral { delivered, dropped });
    }

    /// Events may be missing.
    pub fn mark_uncertain(&mut self, cx: &Context<'_>) {
        self.sequencer.mark_uncertain(cx.now);
    }

    /// The sequencer's timer is due.
    pub fn tick(&mut self, cx: &mut Context<'_>) {
        let mut steps = mem::take(cx.steps);
        self.sequencer.tick(cx.now, &mut steps);
        self.apply(steps, cx);
    }

    /// Redis delivers this user's events from here on; earlier ones are requested.
    pub fn subscribed(&mut self, on: RedisConnectionId, cx: &mut Context<'_>) {
        self.subscribed_on = NonZeroU32::new(on.0);
        if self.sequencer.position().is_some() {
            cx.request_head(self.split().1, HeadReason::Subscribed, None);
        } else if self.connections.iter().any(Connection::is_head_requested) {
            // The request in flight was made before the subscription: check again after it.
            self.sequencer.mark_uncertain(cx.now);
        }
        self.join(cx);
    }

    pub fn unsubscribed(&mut self, from: RedisConnectionId) {
        self.subscribed_on = self.subscribed_on.filter(|on| on.get() != from.0);
    }

    /// The streams that wait for a condition of joining continue if it is met.
    pub fn join(&mut self, cx: &mut Context<'_>) {
        self.each(|connection, feed| connection.join(feed, cx));
    }

    pub fn range(&mut self, request: RangeRequest, answer: RangeAnswer, cx: &mut Context<'_>) {
        let before = self.sequencer.position();
        let mut steps = mem::take(cx.steps);
        match request.requester {
            Requester::User => {
                let events = answer.events.into_iter().map(|event| (event.position.seq, event)).collect();
                let answer = FeedAnswer {
                    requested_at: request.requested_at,
                    head: answer.head,
                    events,
                    after: Some(request.after),
                    more: answer.more,
                };
                self.sequencer.answer(answer, cx.now, &mut steps);
                self.apply(steps, cx);
            }
            Requester::Connection(key, number) => {
                self.sequencer.observe(
                    FeedAnswer::head_only(request.requested_at, answer.head),
                    cx.now,
                    &mut steps,
                );
                self.apply(steps, cx);
                if let Some(at) = self.connections.iter().position(|connection| connection.key == key) {
                    self.one(at, |connection, feed| connection.page(number, request.after, answer, feed, cx));
                }
            }
        }
        self.on_position(before, cx);
    }

    /// An answer about the head, `None` if it is the requested position, and about the session.
    pub fn head(
        &mut self,
        request: &HeadRequest,
        head: Option<Option<Position>>,
        session_ended: bool,
        cx: &mut Context<'_>,
    ) {
        match (request.session, request.why) {
            (Some(session), _) if session_ended && kept(Rule::EndedSession) => {
                self.close_session(session, cx);
            }
            (_, HeadReason::Join(key)) => self.confirm_session(key, cx),
            _ => {}
        }
        let before = self.sequencer.position();
        let mut steps = mem::take(cx.steps);
        if let Some(head) = head {
            let answer = FeedAnswer::head_only(request.requested_at, head);
            if request.why == HeadReason::Position {
                self.sequencer.answer(answer, cx.now, &mut steps);
            } else {
                let beyond =
                    head.zip(before).is_some_and(|(head, before)| head != before && head.seq >= before.seq);
                if beyond && request.why == HeadReason::Reconcile {
                    cx.observed(Observation::RecoveredFeed);
                }
                self.sequencer.observe(answer, cx.now, &mut steps);
            }
        }
        self.apply(steps, cx);
        self.on_position(before, cx);
    }

    /// An answer to a request of this stream confirms its session: one that was read before the stream opened does not.
    fn confirm_session(&mut self, key: ConnectionKey, cx: &mut Context<'_>) {
        let asked = |own: ConnectionKey| own == key || own.index == key.index && !kept(Rule::OwnAnswer);
        let Some(at) = self.connections.iter().position(|connection| asked(connection.key)) else { return };
        if !self.connections[at].session_confirmed() {
            self.connections[at].confirm_session();
            self.enforce_limit(true, cx);
        }
        self.one(at, |connection, feed| connection.join(feed, cx));
    }

    /// If an answer brought the first position, the streams that waited for it continue.
    fn on_position(&mut self, before: Option<Position>, cx: &mut Context<'_>) {
        if before.is_none() && self.sequencer.position().is_some() {
            self.join(cx);
        }
    }

    fn apply(&mut self, mut steps: Vec<Step<EncodedEvent>>, cx: &mut Context<'_>) {
        for step in steps.drain(..) {
            match step {
                Step::Deliver(_, event) => self.deliver(event, cx),
                Step::Request { after: Some(after) } => {
                    cx.observed(Observation::PendingGap);
                    if kept(Rule::GapRequested) {
                        cx.request_range(self.split().1, after, Requester::User);
                    }
                }
                Step::Request { after: None } => cx.request_head(self.split().1, HeadReason::Position, None),
                Step::Resync(why, head) => {
                    cx.observed(Observation::InvalidPosition { user: self.id, head, why });
                    self.clear_replay(cx);
                    if kept(Rule::ResyncReachesStreams) {
                        self.each(|connection, feed| connection.resync(why, feed, cx));
                    }
                }
                Step::Gone => self.close(Goodbye::Revoked, |_| true, cx),
            }
        }
        steps.shrink_to(KEPT_STEPS);
        *cx.steps = steps;
    }

    /// Writes the event to the live streams; the replay buffer keeps it for lagging ones.
    fn deliver(&mut self, event: EncodedEvent, cx: &mut Context<'_>) {
        self.deliver_with(event, |_, _, _, _| {}, cx);
    }

    /// The same, after this input to each stream.
    fn deliver_with(
        &mut self,
        event: EncodedEvent,
        mut first: impl FnMut(&mut Connection, &EncodedEvent, FeedView<'_>, &mut Context<'_>),
        cx: &mut Context<'_>,
    ) {
        let mut needed_later = false;
        self.each(|connection, feed| {
            first(connection, &event, feed, cx);
            needed_later |= connection.deliver(&event, feed, cx);
        });
        if needed_later {
            *cx.backlog -= self.replay.bytes();
            self.replay.push(event);
            cx.has_left_events = true;
            *cx.backlog += self.replay.bytes();
            self.enforce_bounds(cx);
        }
    }

    /// Not before every write is reported: until then, live streams need the buffer, too.
    fn enforce_bounds(&mut self, cx: &mut Context<'_>) {
        let waits = kept(Rule::LiveFirst) && self.unreported + cx.writes > 0;
        if self.replay.is_empty() || waits {
            return;
        }
        self.trim(cx);
        *cx.backlog -= self.replay.bytes();
        self.replay.shrink();
        *cx.backlog += self.replay.bytes();
        if kept(Rule::Bounded) && *cx.backlog > cx.settings.replay_buffer_bytes {
            // Lagging streams read from the feed when their sockets take bytes again.
            self.clear_replay(cx);
        }
    }

    fn clear_replay(&mut self, cx: &mut Context<'_>) {
        cx.release(self.replay.bytes());
        self.replay.clear();
    }

    /// Frees the events that all joined streams have passed.
    fn trim(&mut self, cx: &mut Context<'_>) {
        if self.replay.is_empty() || !kept(Rule::Trimmed) {
            return;
        }
        let joined = self.connections.iter().filter(|connection| connection.is_joined());
        let passed = joined.map(|connection| connection.position().seq).min();
        *cx.backlog -= self.replay.bytes();
        self.replay.trim(passed.unwrap_or(Seq::MAX));
        *cx.backlog += self.replay.bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::wheel::SLOT;

    #[test]
    fn shortest_heartbeat_comes_within_the_shortest_read_timeout() {
        let latest = Duration::from_secs(4).mul_f64(1.0 + HEARTBEAT_JITTER) + Duration::from_millis(2 * SLOT);
        assert!(latest < Duration::from_secs(5), "{latest:?}");
    }

    /// Every idle stream costs this, its socket, and its entries in maps.
    #[test]
    fn a_user_with_one_stream_stays_within_its_size() {
        assert!(size_of::<Connection>() <= 96, "{}", size_of::<Connection>());
        assert!(size_of::<LocalUser>() <= 168, "{}", size_of::<LocalUser>());
    }
}
