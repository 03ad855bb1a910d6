//! Every user with a stream here, and their timers. In memory only: all of it may be lost.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    mem,
    num::NonZeroU32,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use protocol::{
    ids::{SessionId, UserId},
    position::Position,
};
use rand::rngs::SmallRng;
use slab::Slab;

use super::{
    Millis,
    connection::{Connection, GOODBYE_WITHIN, NewConnection},
    drain::DrainSchedule,
    effect::{
        ConnectionKey, Effect, HeadReason, HeadRequest, RangeAnswer, RangeRequest, RedisConnectionId,
        RequestId, Requester, UserSlot,
    },
    reconcile::Reconcile,
    rule::{Rule, kept},
    sequencer::Step,
    user::{Context, LocalUser, jittered},
    wheel::{Due, Wheel},
};
use crate::{
    config::Delivery,
    event::EncodedEvent,
    frame::{Chunk, Goodbye},
};

/// A user without streams stays this long.
const LINGER: Millis = 1_000;
/// Events wait in memory, for a stream or for a gap, at most this long. A deleted text is gone within a minute; the rest of it is for a
/// block that a socket has taken in part ([`super::connection::BLOCK_WITHIN`]).
pub const EVENTS_WAIT: Millis = 5_000;

/// The pure machine of the whole process.
pub struct Hub {
    settings: Delivery,
    by_id: HashMap<UserId, UserSlot>,
    users: Slab<LocalUser>,
    /// Where each connection is, by the index of its key.
    places: Vec<Place>,
    connections: usize,
    wheel: Wheel,
    /// When the uncertain sequencers are next ticked.
    ticks: BTreeSet<(Millis, UserSlot)>,
    /// Users without streams, by when they may be forgotten.
    lingering: VecDeque<(Millis, UserId)>,
    /// Users with events that wait, each once, by when those are dropped.
    waiting: VecDeque<(Millis, UserSlot)>,
    waiting_users: HashSet<UserSlot>,
    reconcile: Reconcile,
    redis_degraded: bool,
    drain: Option<DrainSchedule>,
    backlog: usize,
    last_request: RequestId,
    rng: SmallRng,
    now: Millis,
    wall: SystemTime,
    effects: Vec<Effect>,
    /// Emptied steps of sequencers.
    steps: Vec<Step<EncodedEvent>>,
}

/// A connection's place, as long as the generation is the key's; 0: no connection. `at` is its place among its user's connections.
#[derive(Clone, Copy, Default)]
struct Place {
    generation: u32,
    user: u32,
    at: u32,
}

impl Hub {
    /// Redis counts as degraded until its first health probe returns.
    pub fn new(settings: Delivery, rng: SmallRng) -> Self {
        Self {
            settings,
            by_id: HashMap::new(),
            users: Slab::new(),
            places: Vec::new(),
            connections: 0,
            wheel: Wheel::new(0),
            ticks: BTreeSet::new(),
            lingering: VecDeque::new(),
            waiting: VecDeque::new(),
            waiting_users: HashSet::new(),
            reconcile: Reconcile::default(),
            redis_degraded: true,
            drain: None,
            backlog: 0,
            last_request: NonZeroU32::MIN,
            rng,
            now: 0,
            wall: SystemTime::UNIX_EPOCH,
            effects: Vec::new(),
            steps: Vec::new(),
        }
    }

    /// Swaps the effects of the inputs since the last call into the empty `batch`. Returns whether there are any.
    pub fn swap_effects(&mut self, batch: &mut Vec<Effect>) -> bool {
        mem::swap(&mut self.effects, batch);
        !batch.is_empty()
    }

    pub fn users(&self) -> usize {
        self.users.len()
    }

    pub fn connections(&self) -> usize {
        self.connections
    }

    /// Bytes in replay buffers and pages.
    pub fn backlog(&self) -> usize {
        self.backlog
    }

    pub fn redis_degraded(&self) -> bool {
        self.redis_degraded
    }

    pub fn user(&self, id: UserId) -> Option<&LocalUser> {
        self.users.get(self.by_id.get(&id)?.0 as usize)
    }

    /// When the oldest event that waits came, by its `created_at`.
    #[cfg(test)]
    pub fn oldest_waiting(&self) -> Option<i64> {
        self.users.iter().flat_map(|(_, user)| user.waiting_events()).map(|event| event.created_at).min()
    }

    #[cfg(test)]
    pub fn count_backlog(&self) -> usize {
        self.users.iter().map(|(_, user)| user.count_backlog()).sum()
    }

    fn slot(&self, id: UserId) -> Option<UserSlot> {
        self.by_id.get(&id).copied()
    }

    /// An input for one user; afterwards its timers are set.
    fn with<T>(
        &mut self,
        slot: UserSlot,
        input: impl FnOnce(&mut LocalUser, &mut Context<'_>) -> T,
    ) -> Option<T> {
        let user = self.users.get_mut(slot.0 as usize)?;
        let mut cx = Context {
            now: self.now,
            wall: self.wall,
            settings: &self.settings,
            redis_degraded: self.redis_degraded,
            effects: &mut self.effects,
            wheel: &mut self.wheel,
            rng: &mut self.rng,
            backlog: &mut self.backlog,
            last_request: &mut self.last_request,
            writes: 0,
            joined: false,
            steps: &mut self.steps,
            has_left_events: false,
        };
        let before = user.sequencer.due();
        let output = input(user, &mut cx);
        user.unreported += cx.writes;
        let has_left_events = cx.has_left_events;
        if cx.joined {
            self.effects.push(Effect::Presence(user.id, true));
        }
        let due = user.sequencer.due();
        if due != before {
            before.map(|before| self.ticks.remove(&(before, slot)));
            due.map(|due| self.ticks.insert((due, slot)));
        }
        if has_left_events && self.waiting_users.insert(slot) {
            self.waiting.push_back((self.now + EVENTS_WAIT, slot));
        }
        Some(output)
    }

    fn with_user(&mut self, id: UserId, input: impl FnOnce(&mut LocalUser, &mut Context<'_>)) {
        if let Some(slot) = self.slot(id) {
            self.with(slot, input);
        }
    }

    fn slots(&self) -> Vec<UserSlot> {
        self.users.iter().map(|(slot, _)| UserSlot(slot as u32)).collect()
    }

    fn each_user(&mut self, mut input: impl FnMut(&mut LocalUser, &mut Context<'_>)) {
        for slot in self.slots() {
            self.with(slot, &mut input);
        }
    }

    fn place(&self, key: ConnectionKey) -> Option<Place> {
        let place = self.places.get(key.index as usize)?;
        (place.generation == key.generation && place.generation != 0).then_some(*place)
    }

    /// An input for one connection: its user, and its place among the user's.
    fn with_connection<T>(
        &mut self,
        key: ConnectionKey,
        input: impl FnOnce(&mut LocalUser, usize, &mut Context<'_>) -> T,
    ) -> Option<T> {
        let place = self.place(key)?;
        self.with(UserSlot(place.user), |user, cx| input(user, place.at as usize, cx))
    }
}

/// Streams.
impl Hub {
    /// Opens a stream under a key that no open one has; `close`: says only a goodbye on it.
    pub fn open(&mut self, key: ConnectionKey, new: NewConnection, close: Option<Goodbye>) {
        let id = new.user;
        let slot = self.slot(id).unwrap_or_else(|| {
            let slot = UserSlot(self.users.insert(LocalUser::new(id)) as u32);
            self.by_id.insert(id, slot);
            self.effects.push(Effect::Subscribe(id));
            slot
        });
        let at = self.users[slot.0 as usize].connections().len() as u32;
        let index = key.index as usize;
        if self.places.len() <= index {
            self.places.resize(index + 1, Place::default());
        }
        self.places[index] = Place { generation: key.generation, user: slot.0, at };
        self.connections += 1;
        let close = close.or(self.drain.as_ref().map(|_| Goodbye::Drain));
        self.with(slot, |user, cx| user.open(key, new, close, cx));
    }

    /// Says goodbye to one stream.
    pub fn close(&mut self, key: ConnectionKey, why: Goodbye) {
        self.with_connection(key, |user, _, cx| user.close(why, |connection| connection.key == key, cx));
    }

    /// Says goodbye to the streams that `which` selects; returns how many.
    pub fn close_all(&mut self, why: Goodbye, which: impl Fn(&Connection) -> bool) -> usize {
        let mut closing = 0;
        self.each_user(|user, cx| {
            let which = |connection: &Connection| !connection.is_closing() && which(connection);
            closing += user.connections().iter().filter(|connection| which(connection)).count();
            user.close(why, which, cx);
        });
        closing
    }

    /// Of the last [`Effect::Write`] to this stream, its socket did not take this rest.
    pub fn wrote(&mut self, key: ConnectionKey, rest: Bytes) {
        self.with_connection(key, |user, at, cx| user.wrote(at, rest, cx));
    }

    /// The socket may take bytes.
    pub fn writable(&mut self, key: ConnectionKey) {
        self.with_connection(key, LocalUser::writable);
    }

    /// The client has closed its side, or the connection is broken.
    pub fn gone(&mut self, key: ConnectionKey) {
        let reason = self.with_connection(key, |user, at, _| user.connections()[at].reason_to_go());
        if let Some(reason) = reason {
            self.remove(key, reason);
        }
    }

    /// The client sends what a stream does not expect.
    pub fn unexpected_input(&mut self, key: ConnectionKey) {
        self.with_connection(key, LocalUser::end_body);
        self.remove(key, "unexpected_input");
    }

    /// Removes a stream whose socket is of no use any more.
    pub fn remove(&mut self, key: ConnectionKey, reason: &'static str) {
        let Some(place) = self.place(key) else { return };
        self.places[key.index as usize] = Place::default();
        self.connections -= 1;
        let slot = UserSlot(place.user);
        let moved = self.with(slot, |user, cx| user.remove(place.at as usize, reason, cx)).flatten();
        if let Some(moved) = moved {
            self.places[moved.index as usize].at = place.at;
        }
        let user = &mut self.users[slot.0 as usize];
        if user.connections().is_empty() {
            self.effects.push(Effect::Presence(user.id, false));
            user.forget_at = self.now + LINGER;
            self.lingering.push_back((user.forget_at, user.id));
        }
    }

    pub fn close_session(&mut self, user: UserId, session: SessionId) {
        self.effects.push(Effect::SessionEnded(user, session));
        self.with_user(user, |user, cx| user.close_session(session, cx));
    }

    /// Closes all streams at a steady rate over `window`.
    pub fn begin_drain(&mut self, window: Duration) {
        self.drain = Some(DrainSchedule::new(self.now, window.as_millis() as Millis));
    }

    /// Whether a drain has closed all streams and `none_to_come`, or its time is over.
    pub fn is_drained(&self, none_to_come: bool) -> bool {
        self.drain.as_ref().is_some_and(|drain| {
            self.connections == 0 && none_to_come || self.now >= drain.end() + 2 * GOODBYE_WITHIN
        })
    }
}

/// Redis.
impl Hub {
    pub fn event(&mut self, user: UserId, event: EncodedEvent) {
        self.with_user(user, |user, cx| user.event(event, cx));
    }

    /// An event that is in no feed.
    pub fn ephemeral(&mut self, user: UserId, event: &Chunk) {
        self.with_user(user, |user, cx| user.ephemeral(event, cx));
    }

    /// Redis has confirmed these users' channels on this connection.
    pub fn subscribed(&mut self, on: RedisConnectionId, users: impl IntoIterator<Item = UserId>) {
        for user in users {
            self.with_user(user, |user, cx| user.subscribed(on, cx));
        }
    }

    /// This connection no longer delivers these users' events.
    pub fn unsubscribed(&mut self, from: RedisConnectionId, users: impl IntoIterator<Item = UserId>) {
        for user in users {
            self.with_user(user, |user, _| user.unsubscribed(from));
        }
    }

    /// This connection is closed.
    pub fn disconnected(&mut self, from: RedisConnectionId) {
        self.users.iter_mut().for_each(|(_, user)| user.unsubscribed(from));
    }

    pub fn set_redis_degraded(&mut self, degraded: bool) {
        if degraded == self.redis_degraded {
            return;
        }
        self.redis_degraded = degraded;
        if degraded {
            // No subscription will be confirmed now: streams join without one.
            self.each_user(LocalUser::join);
        }
        self.reconcile.hasten(self.now);
    }

    /// An event of this user may have been lost.
    pub fn mark_uncertain(&mut self, user: UserId) {
        self.with_user(user, |user, cx| user.mark_uncertain(cx));
    }

    /// Events of any user may have been lost.
    pub fn mark_all_uncertain(&mut self) {
        self.reconcile.hasten(self.now);
    }
}

/// Answers of `api`.
impl Hub {
    pub fn range(&mut self, request: RangeRequest, answer: RangeAnswer) {
        self.with_user(request.user, |user, cx| user.range(request, answer, cx));
    }

    /// `head`: `None` if it is the position of the request.
    pub fn head(&mut self, request: HeadRequest, head: Option<Option<Position>>, session_ended: bool) {
        if let Some(session) = request.session.filter(|_| session_ended) {
            self.effects.push(Effect::SessionEnded(request.user, session));
        }
        self.with_user(request.user, |user, cx| user.head(&request, head, session_ended, cx));
        if request.why == HeadReason::Reconcile {
            self.reconcile.answered(self.now);
            self.continue_reconcile();
        }
    }

    /// Whether anything still waits for the answer to this request.
    pub fn wants_range(&self, request: &RangeRequest) -> bool {
        match request.requester {
            Requester::User => self.slot(request.user).is_some(),
            Requester::Connection(key, _) => self.place(key).is_some(),
        }
    }

    /// Whether anything still waits for the answer to this request. If not, it must be dropped.
    pub fn wants_head(&mut self, request: &HeadRequest) -> bool {
        match request.why {
            HeadReason::Position | HeadReason::Subscribed => self.slot(request.user).is_some(),
            HeadReason::Join(key) => self.place(key).is_some(),
            HeadReason::Reconcile => {
                let wanted = self.user(request.user).is_some_and(|user| {
                    request.session.is_none_or(|session| user.sessions().contains(&session))
                });
                if !wanted {
                    self.reconcile.answered(self.now);
                }
                wanted
            }
        }
    }

    pub fn reconcile_interval(&self) -> Duration {
        if self.redis_degraded { self.settings.degraded_reconcile } else { self.settings.reconcile }
    }

    fn begin_reconcile(&mut self) {
        let every = self.reconcile_interval();
        let next = self.now + jittered(&mut self.rng, every);
        self.reconcile.begin(next);
        self.continue_reconcile();
    }

    fn continue_reconcile(&mut self) {
        while let Some(slot) = self.reconcile.next(self.users.capacity()) {
            let Some(user) = self.users.get(slot).filter(|_| kept(Rule::Reconciled)) else { continue };
            let sessions = user.sessions();
            let request = |session| {
                Effect::RequestHead(HeadRequest {
                    user: user.id,
                    requested_at: user.sequencer.position(),
                    why: HeadReason::Reconcile,
                    session,
                })
            };
            let requests = sessions.len().max(1);
            if sessions.is_empty() {
                self.effects.push(request(None));
            }
            self.effects.extend(sessions.into_iter().map(|session| request(Some(session))));
            self.reconcile.requested(requests);
        }
    }
}

/// Time.
impl Hub {
    pub fn set_time(&mut self, now: Millis, wall: SystemTime) {
        self.now = now;
        self.wall = wall;
    }

    /// When [`Self::run_timers`] has something to do.
    pub fn next_timer(&self) -> Millis {
        let wheel = if self.connections == 0 { Millis::MAX } else { self.wheel.next() };
        let tick = self.ticks.first().map_or(Millis::MAX, |(at, _)| *at);
        let linger = self.lingering.front().map_or(Millis::MAX, |(at, _)| *at);
        let waiting = self.waiting.front().map_or(Millis::MAX, |(at, _)| *at);
        let drain = self.drain.as_ref().map_or(Millis::MAX, DrainSchedule::next);
        wheel.min(waiting).min(tick).min(linger).min(drain).min(self.reconcile.at)
    }

    pub fn run_timers(&mut self) {
        while let Some((at, slot)) = self.waiting.front().copied()
            && at <= self.now
        {
            self.waiting.pop_front();
            self.waiting_users.remove(&slot);
            self.with(slot, LocalUser::drop_waiting_events);
        }
        let mut due = Vec::new();
        self.wheel.turn(self.now, &mut due);
        for (index, at) in due {
            self.on_due(index, at);
        }
        while let Some((at, slot)) = self.ticks.first().copied()
            && at <= self.now
        {
            self.ticks.pop_first();
            self.with(slot, LocalUser::tick);
        }
        while let Some((at, user)) = self.lingering.front().copied()
            && at <= self.now
        {
            self.lingering.pop_front();
            self.forget(user);
        }
        if self.reconcile.at <= self.now {
            self.begin_reconcile();
        }
        self.continue_drain();
    }

    fn on_due(&mut self, index: u32, due: Due) {
        let Some(&Place { generation, .. }) = self.places.get(index as usize) else { return };
        let key = ConnectionKey { index, generation };
        let removed = self.with_connection(key, |user, at, cx| {
            let is_due = user.connections()[at].is_due(due);
            is_due.then(|| user.on_due(at, cx)).flatten()
        });
        if let Some(reason) = removed.flatten() {
            self.remove(key, reason);
        }
    }

    /// Forgets a user who has had no stream for [`LINGER`].
    fn forget(&mut self, id: UserId) {
        let Some(slot) = self.slot(id) else { return };
        let user = &self.users[slot.0 as usize];
        if !user.connections().is_empty() || user.forget_at > self.now {
            return;
        }
        self.by_id.remove(&id);
        let user = self.users.remove(slot.0 as usize);
        user.sequencer.due().map(|due| self.ticks.remove(&(due, slot)));
        self.backlog -= user.replay_bytes();
        self.effects.push(Effect::Unsubscribe(id));
    }

    fn continue_drain(&mut self) {
        let now = self.now;
        let Some(drain) = self.drain.as_mut().filter(|drain| drain.next() <= now) else { return };
        let users = self.users.iter();
        let staying =
            users.flat_map(|(_, user)| user.connections()).filter(|connection| !connection.is_closing());
        let staying: Vec<_> = staying.map(|connection| connection.key).collect();
        let share = drain.step(staying.len(), now);
        for key in staying.into_iter().take(share) {
            self.close(key, Goodbye::Drain);
        }
    }
}

#[cfg(test)]
mod tests {
    use protocol::{claims::KeyName, position::Epoch};
    use rand::SeedableRng;

    use super::*;
    use crate::{
        core::{Resume, connection::BLOCK_WITHIN, wheel::SLOT},
        frame::{Chunk, Framing, Heartbeat},
        metrics::DeliveryPath,
    };

    const KEY: ConnectionKey = ConnectionKey { index: 0, generation: 1 };
    const USER: UserId = UserId(1);

    fn at(seq: u64) -> Position {
        Position { epoch: Epoch(1), seq }
    }

    /// Carries out what the hub wants; of each write the socket takes only so many bytes. Whether the stream was closed.
    fn carry_out(hub: &mut Hub, takes: usize) -> bool {
        let (mut effects, mut closed) = (Vec::new(), false);
        while hub.swap_effects(&mut effects) {
            for effect in effects.drain(..) {
                match effect {
                    Effect::Write { to, mut bytes, .. } => {
                        let _ = bytes.split_to(bytes.len().min(takes));
                        hub.wrote(to, bytes);
                    }
                    Effect::RequestHead(request) => hub.head(request, Some(Some(at(0))), false),
                    Effect::Close(..) => closed = true,
                    _ => {}
                }
            }
        }
        closed
    }

    /// The socket makes progress, so the write deadline never comes.
    #[test]
    fn a_block_that_a_socket_takes_too_slowly_ends_the_stream() {
        let settings = Delivery {
            heartbeat: Duration::from_secs(15),
            reconcile: Duration::from_secs(15),
            degraded_reconcile: Duration::from_secs(1),
            write_deadline: Duration::from_mins(1),
            streams_per_user: 2,
            replay_buffer_bytes: 1_000,
        };
        let mut hub = Hub::new(settings, SmallRng::seed_from_u64(1));
        let new = NewConnection {
            user: USER,
            session: None,
            signed_by: KeyName([0; 8]),
            resume: Resume::Head,
            heartbeat: Heartbeat::default(),
            framing: Framing::Chunked,
            head: Bytes::new(),
            ends_at: 3_600_000,
            ends_why: Goodbye::Expired,
        };
        hub.open(KEY, new, None);
        hub.subscribed(RedisConnectionId(1), [USER]);
        assert!(!carry_out(&mut hub, usize::MAX));
        let frame = Chunk::new(&"x".repeat(1_000));
        hub.event(
            USER,
            EncodedEvent { position: at(1), created_at: 0, frame, path: DeliveryPath::Redis, trace: None },
        );
        assert!(!carry_out(&mut hub, 1));
        for now in (0..).step_by(SLOT as usize) {
            hub.set_time(now, SystemTime::UNIX_EPOCH);
            hub.run_timers();
            if carry_out(&mut hub, 1) {
                assert!((BLOCK_WITHIN..=BLOCK_WITHIN + 2 * SLOT).contains(&now), "{now}");
                break;
            }
            assert!(now < 2 * BLOCK_WITHIN, "it is never closed");
            if now % 1_000 == 0 {
                hub.writable(KEY);
                carry_out(&mut hub, 1);
            }
        }
    }
}
