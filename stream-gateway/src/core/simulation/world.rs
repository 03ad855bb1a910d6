//! Everything around the core: feeds in Postgres, `api`, Redis, sockets, clients and the clock.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use protocol::{
    claims::KeyName,
    ids::{SessionId, UserId},
    position::{Epoch, Position, Seq},
};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

use super::{
    LossNotice, Publish, ScheduleStep,
    client::{ClientStream, HEAD, SimulatedClient},
};
use crate::{
    config::Delivery,
    core::{
        ConnectionKey, Effect, HeadReason, HeadRequest, Hub, Millis, NewConnection, Observation, RangeAnswer,
        RangeRequest, RedisConnectionId, Resume, connection::GOODBYE_WITHIN, effect::Requester,
        hub::EVENTS_WAIT,
    },
    event::EncodedEvent,
    frame::{self, Chunk, Framing, Goodbye, Heartbeat, ResyncReason},
    metrics::DeliveryPath,
};

const USERS: i64 = 2;
const CLIENTS: u8 = 6;
/// Events in one answer of `api`.
const PAGE: usize = 3;
const SETTINGS: Delivery = Delivery {
    heartbeat: Duration::from_secs(15),
    reconcile: Duration::from_secs(15),
    degraded_reconcile: Duration::from_secs(1),
    write_deadline: Duration::from_secs(20),
    streams_per_user: 2,
    replay_buffer_bytes: 150,
};
/// A simulated frame is shorter.
const FRAME: usize = 64;

/// What a step or the end of a schedule finds broken.
type Checked = Result<(), String>;

/// A feed as Postgres has it. Its events are their positions.
#[derive(Clone, Copy)]
struct SimulatedFeed {
    head: Position,
    /// Events up to here are pruned.
    pruned: Seq,
}

enum PendingRequest {
    Range(RangeRequest),
    Head(HeadRequest),
}

enum PendingAnswer {
    Range(RangeRequest, RangeAnswer),
    Head(HeadRequest, Option<Option<Position>>, bool),
}

pub struct SimulatedWorld {
    hub: Hub,
    rng: SmallRng,
    now: Millis,
    generation: u32,
    draining: bool,
    feeds: BTreeMap<UserId, SimulatedFeed>,
    ended: BTreeSet<SessionId>,
    /// Sessions that the gateway knows have ended.
    known_ended: BTreeSet<SessionId>,
    /// Streams whose sockets take no bytes, by the core's own count.
    blocked: usize,
    removed_keys: BTreeSet<u8>,
    clients: Vec<SimulatedClient>,
    /// Reasons for a resync that there were.
    reasons: BTreeSet<&'static str>,
    // api
    away: bool,
    requests: Vec<PendingRequest>,
    answers: Vec<PendingAnswer>,
    // Redis
    link: Option<RedisConnectionId>,
    links: u32,
    desired: BTreeSet<UserId>,
    /// Desired subscriptions that Redis has not confirmed.
    unconfirmed: BTreeSet<UserId>,
    subscribed: BTreeSet<UserId>,
    published: Vec<(UserId, Position)>,
    /// Ephemeral events so far.
    ephemeral: u32,
    /// Users who are present, as the core says.
    present: BTreeSet<UserId>,
    /// Users of whom a stream's session was confirmed, or had none to confirm, since they were last without a stream. That stream may have ended since.
    may_be_present: BTreeSet<UserId>,
}

/// `created_at`: when the gateway has it, from which time on it may wait there.
fn event(position: Position, now: Millis) -> EncodedEvent {
    let frame = Chunk::new(&format!("data: {}\nid: {position}\n\n", position.seq));
    assert!(frame.len() <= FRAME);
    EncodedEvent { position, created_at: now as i64, frame, path: DeliveryPath::Redis, trace: None }
}

impl SimulatedWorld {
    pub fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(!seed);
        let feeds = (1..=USERS).map(|id| {
            let head = Position { epoch: Epoch(rng.random()), seq: rng.random_range(0..6) };
            (UserId(id), SimulatedFeed { head, pruned: 0 })
        });
        let feeds = feeds.collect();
        let clients = (0..CLIENTS).map(|number| SimulatedClient {
            user: UserId(1 + i64::from(number) % USERS),
            // The last one has a token of the external issuer. Two have the same session.
            session: (number + 1 < CLIENTS).then_some(SessionId(1 + i64::from(number % 4))),
            key: number % 3,
            cursor: None,
            connection: None,
            revoked: false,
        });
        Self {
            hub: Hub::new(SETTINGS, SmallRng::seed_from_u64(seed)),
            now: 0,
            generation: 0,
            draining: false,
            feeds,
            ended: BTreeSet::new(),
            known_ended: BTreeSet::new(),
            blocked: 0,
            removed_keys: BTreeSet::new(),
            clients: clients.collect(),
            reasons: BTreeSet::new(),
            away: false,
            requests: Vec::new(),
            answers: Vec::new(),
            link: None,
            links: 0,
            desired: BTreeSet::new(),
            unconfirmed: BTreeSet::new(),
            subscribed: BTreeSet::new(),
            published: Vec::new(),
            ephemeral: 0,
            present: BTreeSet::new(),
            may_be_present: BTreeSet::new(),
            rng,
        }
    }

    pub fn step(&mut self, step: ScheduleStep) -> Checked {
        match step {
            ScheduleStep::Commit { user, publish } => self.commit(user, publish),
            ScheduleStep::Deliver { message } => self.deliver(message.into()),
            ScheduleStep::Ephemeral { user } => self.ephemeral(pick_user(user), false)?,
            ScheduleStep::Lose { message, notice } => self.lose(message.into(), notice),
            ScheduleStep::Confirm { user } => self.confirm(user.into()),
            ScheduleStep::Move { user } => self.move_slot(user.into()),
            ScheduleStep::Disconnect => self.disconnect(),
            ScheduleStep::Reconnect => self.reconnect(),
            ScheduleStep::Probe { healthy } => self.hub.set_redis_degraded(!(healthy && self.link.is_some())),
            // Several, because a reconcile asks much.
            ScheduleStep::Serve { request } => (0..4).for_each(|_| self.serve(request.into())),
            ScheduleStep::Arrive { answer } => {
                for _ in 0..4 {
                    self.arrive(answer.into());
                    self.carry_out()?;
                }
            }
            ScheduleStep::ApiAway { away } => self.away = away,
            ScheduleStep::BatchFailed => {
                let hub = &mut self.hub;
                self.requests.retain(|request| match request {
                    PendingRequest::Range(request) => hub.wants_range(request),
                    PendingRequest::Head(request) => hub.wants_head(request),
                });
            }
            ScheduleStep::Wait { millis } => self.wait(millis.into())?,
            ScheduleStep::Open { client, how } => self.open(self.client(client), how)?,
            ScheduleStep::Stall { client, bytes } => self.stall(self.client(client), bytes.into()),
            ScheduleStep::Read { client, bytes } => self.read(self.client(client), bytes.into()),
            ScheduleStep::HangUp { client } => self.hang_up(self.client(client)),
            ScheduleStep::Break { client } => {
                let client = self.client(client);
                self.clients[client].connection.iter_mut().for_each(|open| open.broken = true);
            }
            ScheduleStep::EndSession { client, publish } => self.end_session(self.client(client), publish),
            ScheduleStep::Prune { user, keep } => self.prune(user, keep.into()),
            ScheduleStep::Restore { back } => self.restore(back.into()),
            ScheduleStep::DeleteUser { user } => _ = self.feeds.remove(&pick_user(user)),
            ScheduleStep::RemoveKey => {
                self.removed_keys.insert(0);
                self.hub.close_all(Goodbye::Revoked, |connection| connection.signed_by == KeyName([0; 8]));
            }
            ScheduleStep::Kill => self.replace_gateway(),
            ScheduleStep::Drain { seconds } => {
                if !self.draining {
                    self.draining = true;
                    self.hub.begin_drain(Duration::from_secs(seconds.into()));
                }
            }
        }
        self.carry_out()?;
        self.check_bounds()
    }

    fn client(&self, number: u8) -> usize {
        usize::from(number) % self.clients.len()
    }
}

fn pick_user(number: u8) -> UserId {
    UserId(1 + i64::from(number) % USERS)
}

/// Removes the element that a number selects.
fn take<T>(from: &mut Vec<T>, number: usize) -> Option<T> {
    (!from.is_empty()).then(|| from.remove(number % from.len()))
}

/// Postgres and `api`.
impl SimulatedWorld {
    fn commit(&mut self, user: u8, publish: Publish) {
        let user = pick_user(user);
        let Some(feed) = self.feeds.get_mut(&user) else { return };
        feed.head.seq += 1;
        let times = match publish {
            Publish::Once => 1,
            Publish::Twice => 2,
            Publish::Never => 0,
        };
        if self.subscribed.contains(&user) {
            self.published.extend(std::iter::repeat_n((user, feed.head), times));
        }
    }

    fn prune(&mut self, user: u8, keep: Seq) {
        self.reasons.insert(ResyncReason::Expired.as_str());
        if let Some(feed) = self.feeds.get_mut(&pick_user(user)) {
            feed.pruned = feed.pruned.max(feed.head.seq.saturating_sub(keep));
        }
    }

    fn restore(&mut self, back: Seq) {
        self.reasons.extend([ResyncReason::Unknown.as_str(), ResyncReason::Future.as_str()]);
        for feed in self.feeds.values_mut() {
            let seq = feed.head.seq.saturating_sub(back);
            feed.head = Position { epoch: Epoch(self.rng.random()), seq };
            feed.pruned = feed.pruned.min(seq);
        }
    }

    fn serve(&mut self, number: usize) {
        if self.away {
            return;
        }
        let Some(request) = take(&mut self.requests, number) else { return };
        let answer = match request {
            PendingRequest::Range(request) => PendingAnswer::Range(request, self.read_range(request)),
            PendingRequest::Head(request) => {
                let head = self.feeds.get(&request.user).map(|feed| feed.head);
                let ended = request.session.is_some_and(|session| self.ended.contains(&session));
                let differs = request.requested_at.is_none() || head != request.requested_at;
                PendingAnswer::Head(request, differs.then_some(head), ended)
            }
        };
        self.answers.push(answer);
    }

    fn read_range(&self, request: RangeRequest) -> RangeAnswer {
        let Some(feed) = self.feeds.get(&request.user) else {
            return RangeAnswer { head: None, events: vec![], more: false };
        };
        let seqs = request.after.max(feed.pruned) + 1..=feed.head.seq;
        let events = seqs.map(|seq| event(Position { seq, ..feed.head }, 0));
        let events: Vec<_> = events.take(PAGE).collect();
        let more = events.last().is_some_and(|last| last.position != feed.head);
        RangeAnswer { head: Some(feed.head), events, more }
    }

    fn arrive(&mut self, number: usize) {
        match take(&mut self.answers, number) {
            None => {}
            Some(PendingAnswer::Range(request, mut answer)) => {
                answer.events.iter_mut().for_each(|event| event.created_at = self.now as i64);
                if let Requester::Connection(key, id) = request.requester
                    && let Some(open) = self.find(key).and_then(|client| client.connection.as_mut())
                {
                    open.reading = open.reading.filter(|reading| *reading != id);
                }
                self.hub.range(request, answer);
            }
            Some(PendingAnswer::Head(request, head, ended)) => {
                if ended {
                    self.known_ended.extend(request.session);
                } else if let HeadReason::Join(key) = request.why {
                    for client in &mut self.clients {
                        if let Some(open) = client.connection.as_mut().filter(|open| open.key == key) {
                            open.confirmed = true;
                            self.may_be_present.insert(client.user);
                        }
                    }
                }
                self.hub.head(request, head, ended);
            }
        }
    }

    fn end_session(&mut self, client: usize, publish: bool) {
        let SimulatedClient { user, session: Some(session), .. } = self.clients[client] else { return };
        self.ended.insert(session);
        if publish && self.subscribed.contains(&user) {
            self.known_ended.insert(session);
            self.hub.close_session(user, session);
        }
    }
}

/// Redis.
impl SimulatedWorld {
    fn deliver(&mut self, number: usize) {
        if let Some((user, position)) = take(&mut self.published, number) {
            self.hub.event(user, event(position, self.now));
        }
    }

    /// Streams that can take it read it in this step, and no other one ever does. `healed`: every stream can.
    fn ephemeral(&mut self, user: UserId, healed: bool) -> Checked {
        if !self.subscribed.contains(&user) {
            return Ok(());
        }
        self.ephemeral += 1;
        let (number, before) = (self.ephemeral, self.requests.len());
        let mut must = Vec::new();
        for client in self.clients.iter_mut().filter(|client| client.user == user) {
            let (is_ready, is_whole) = (client.is_ready(), client.is_flawless() || healed);
            let ended = client.session.is_some_and(|session| self.known_ended.contains(&session));
            let has_rights = !ended && !self.removed_keys.contains(&client.key);
            let Some(open) = &mut client.connection else { continue };
            if has_rights && is_ready && open.untaken == 0 && open.reading.is_none() {
                open.ephemeral.insert(number);
                if is_whole && open.room == usize::MAX && !open.broken {
                    must.push(open.key);
                }
            }
        }
        self.hub.ephemeral(user, &Chunk::new(&format!("event: typing\ndata: {number}\n\n")));
        self.carry_out()?;
        if self.requests.len() > before {
            return Err("an ephemeral event caused a request".into());
        }
        let open = self.clients.iter().filter_map(|client| client.connection.as_ref());
        let missed = open.filter(|open| must.contains(&open.key) && open.ephemeral.contains(&number)).count();
        if missed > 0 { Err(format!("{missed} live streams missed an ephemeral event")) } else { Ok(()) }
    }

    fn lose(&mut self, number: usize, notice: LossNotice) {
        let Some((user, _)) = take(&mut self.published, number) else { return };
        match notice {
            LossNotice::Never => {}
            LossNotice::Uncertain => self.hub.mark_uncertain(user),
            LossNotice::Dropped => self.hub.mark_all_uncertain(),
        }
    }

    fn confirm(&mut self, number: usize) {
        let Some(link) = self.link else { return };
        let mut unconfirmed: Vec<_> = self.unconfirmed.iter().copied().collect();
        if let Some(user) = take(&mut unconfirmed, number) {
            self.unconfirmed.remove(&user);
            self.subscribed.insert(user);
            self.hub.subscribed(link, [user]);
        }
    }

    fn move_slot(&mut self, number: usize) {
        let Some(link) = self.link else { return };
        let mut subscribed: Vec<_> = self.subscribed.iter().copied().collect();
        if let Some(user) = take(&mut subscribed, number) {
            self.subscribed.remove(&user);
            self.unconfirmed.insert(user);
            self.hub.unsubscribed(link, [user]);
        }
    }

    fn disconnect(&mut self) {
        if let Some(link) = self.link.take() {
            self.subscribed.clear();
            self.published.clear();
            self.unconfirmed.clone_from(&self.desired);
            self.hub.disconnected(link);
            self.hub.set_redis_degraded(true);
        }
    }

    fn reconnect(&mut self) {
        if self.link.is_none() {
            self.links += 1;
            self.link = Some(RedisConnectionId(self.links));
        }
    }
}

/// Sockets and clients.
impl SimulatedWorld {
    fn open(&mut self, number: usize, how: u8) -> Checked {
        if self.clients[number].connection.is_some() || self.clients[number].revoked {
            return Ok(());
        }
        let taken: BTreeSet<_> =
            self.clients.iter().filter_map(|client| Some(client.connection.as_ref()?.key.index)).collect();
        let index = (0..=CLIENTS.into()).find(|index| !taken.contains(index)).unwrap_or_default();
        self.generation += 1;
        let key = ConnectionKey { index, generation: self.generation };
        let client = &mut self.clients[number];
        let resume = match client.cursor {
            _ if how % 16 == 1 => Resume::Invalid,
            Some(cursor) if how % 16 == 2 => {
                self.reasons.insert(ResyncReason::Future.as_str());
                Resume::After(Position { seq: cursor.seq + 9, ..cursor })
            }
            Some(cursor) if how % 16 == 3 => {
                Resume::After(Position { seq: cursor.seq.saturating_sub(2), ..cursor })
            }
            Some(cursor) if how % 16 > 3 => Resume::After(cursor),
            _ => Resume::Head,
        };
        let cursor = if let Resume::After(cursor) = resume { Some(cursor) } else { None };
        client.cursor = cursor;
        if resume == Resume::Invalid {
            self.reasons.insert(ResyncReason::Unknown.as_str());
        }
        let (lasts, ends_why) =
            if how >= 240 { (5_000, Goodbye::Rotate) } else { (3_600_000, Goodbye::Expired) };
        let ends_at = self.now + lasts;
        client.connection = Some(ClientStream::new(key, cursor, client.session.is_none(), self.now, ends_at));
        if client.session.is_none() {
            self.may_be_present.insert(client.user);
        }
        let ended = client.session.is_some_and(|session| self.known_ended.contains(&session));
        let revoked = ended || self.removed_keys.contains(&client.key);
        let head = [HEAD.as_bytes(), &Framing::Chunked.bytes(&frame::retry(2_000))].concat();
        let new = NewConnection {
            user: client.user,
            session: client.session,
            signed_by: KeyName([client.key; 8]),
            resume,
            heartbeat: Heartbeat::default(),
            framing: Framing::Chunked,
            head: head.into(),
            ends_at,
            ends_why,
        };
        if how % 8 == 7 {
            self.clients[number].connection.iter_mut().for_each(|open| open.room = usize::from(how));
        }
        self.hub.open(key, new, revoked.then_some(Goodbye::Revoked));
        self.carry_out()
    }

    fn stall(&mut self, client: usize, bytes: usize) {
        self.clients[client].connection.iter_mut().for_each(|open| open.room = bytes);
    }

    fn read(&mut self, client: usize, bytes: usize) {
        if let Some(open) = &mut self.clients[client].connection {
            open.room = if bytes > 200 { usize::MAX } else { open.room.saturating_add(bytes) };
            let key = open.key;
            self.hub.writable(key);
        }
    }

    fn hang_up(&mut self, client: usize) {
        if let Some(open) = self.clients[client].connection.take() {
            self.hub.gone(open.key);
        }
    }

    fn find(&mut self, key: ConnectionKey) -> Option<&mut SimulatedClient> {
        self.clients.iter_mut().find(|client| client.connection.as_ref().is_some_and(|open| open.key == key))
    }

    fn carry_out(&mut self) -> Checked {
        let mut effects = Vec::new();
        while self.hub.swap_effects(&mut effects) {
            for effect in effects.drain(..) {
                match effect {
                    Effect::Write { to, bytes, event } => self.write(to, bytes, event.is_some())?,
                    // A client that has the end of the body closes its side.
                    Effect::FinishWriting(key) => {
                        if let Some(client) = self.find(key) {
                            if !client.has_ended() {
                                return Err("a body was cut".into());
                            }
                            client.connection = None;
                            self.hub.gone(key);
                        }
                    }
                    Effect::Close(key, _) => {
                        if let Some(client) = self.find(key) {
                            client.connection = None;
                        }
                    }
                    Effect::RequestRange(request) => {
                        if let Requester::Connection(key, _) = request.requester
                            && self.find(key).is_some_and(|client| client.is_flawless())
                        {
                            return Err("a stream that took every byte reads the feed".into());
                        }
                        if let Requester::Connection(key, id) = request.requester
                            && let Some(client) = self.find(key).filter(|client| client.is_ready())
                            && let Some(open) = &mut client.connection
                        {
                            open.reading = Some(id);
                        }
                        self.requests.push(PendingRequest::Range(request));
                    }
                    Effect::RequestHead(request) => self.requests.push(PendingRequest::Head(request)),
                    Effect::Subscribe(user) => {
                        self.desired.insert(user);
                        self.unconfirmed.insert(user);
                    }
                    Effect::Unsubscribe(user) => {
                        self.desired.remove(&user);
                        self.unconfirmed.remove(&user);
                        self.subscribed.remove(&user);
                    }
                    Effect::Observed(Observation::Resync { why, .. })
                        if !self.reasons.contains(why.as_str()) =>
                    {
                        return Err(format!("a resync without a reason: {}", why.as_str()));
                    }
                    Effect::Observed(Observation::Blocked) => self.blocked += 1,
                    Effect::Observed(Observation::Unblocked) => {
                        self.blocked = self.blocked.checked_sub(1).ok_or("unblocked twice")?;
                    }
                    Effect::Presence(user, is_present) => self.set_present(user, is_present)?,
                    Effect::SessionEnded(..) | Effect::Observed(_) => {}
                }
            }
        }
        if self.draining && self.hub.is_drained(true) {
            self.replace_gateway();
        }
        Ok(())
    }

    fn write(&mut self, to: ConnectionKey, mut bytes: Bytes, has_event: bool) -> Checked {
        let now = self.now;
        let mut clients = self.clients.iter_mut();
        let client = clients.find(|client| client.connection.as_ref().is_some_and(|open| open.key == to));
        let client = client.ok_or("a write to a closed connection")?;
        let ended = client.session.is_some_and(|session| self.known_ended.contains(&session));
        if has_event && (ended || self.removed_keys.contains(&client.key)) {
            return Err("an event for a stream without rights".into());
        }
        let Some(open) = client.connection.as_mut() else { return Ok(()) };
        if open.broken {
            client.connection = None;
            self.hub.remove(to, "client");
            return Ok(());
        }
        let taken = bytes.split_to(bytes.len().min(open.room));
        if !taken.is_empty() {
            open.heard_at = now;
        }
        open.flawless &= bytes.is_empty();
        open.untaken = bytes.len();
        if open.room != usize::MAX {
            open.room -= taken.len();
        }
        for position in client.read(&taken)? {
            let feed = self.feeds.get(&client.user).filter(|feed| feed.head.epoch == position.epoch);
            if feed.is_some_and(|feed| position.seq > feed.head.seq) {
                return Err(format!("event {position} was never committed"));
            }
        }
        self.hub.wrote(to, bytes);
        Ok(())
    }

    /// Nobody is present by a stream without a confirmed session.
    fn set_present(&mut self, user: UserId, is_present: bool) -> Checked {
        if !is_present {
            self.present.remove(&user);
            self.may_be_present.remove(&user);
        } else if self.may_be_present.contains(&user) {
            self.present.insert(user);
        } else {
            return Err("a user without a confirmed session is present".into());
        }
        Ok(())
    }

    /// Every connection is cut, and all that the gateway knew is lost.
    fn replace_gateway(&mut self) {
        self.disconnect();
        self.hub = Hub::new(SETTINGS, SmallRng::seed_from_u64(self.rng.random()));
        self.hub.set_time(self.now, SystemTime::UNIX_EPOCH);
        self.hub.run_timers();
        self.draining = false;
        self.requests.clear();
        self.answers.clear();
        self.desired.clear();
        self.unconfirmed.clear();
        self.known_ended.clear();
        self.present.clear();
        self.may_be_present.clear();
        self.blocked = 0;
        self.clients.iter_mut().for_each(|client| client.connection = None);
    }
}

/// Time, and the end.
impl SimulatedWorld {
    fn wait(&mut self, millis: Millis) -> Checked {
        let until = self.now + millis;
        while self.now < until {
            self.now = self.hub.next_timer().clamp(self.now, until);
            self.hub.set_time(self.now, SystemTime::UNIX_EPOCH);
            self.hub.run_timers();
            self.carry_out()?;
            if self.hub.next_timer() <= self.now {
                return Err("a timer does not advance".into());
            }
            self.check_time()?;
        }
        Ok(())
    }

    /// No timer is lost.
    fn check_time(&self) -> Checked {
        /// Two slots of the wheel.
        const LATE: Millis = 500;
        if self.hub.oldest_waiting().is_some_and(|came| self.now > came as Millis + EVENTS_WAIT) {
            return Err("an event waits in memory for too long".into());
        }
        for open in self.clients.iter().filter_map(|client| client.connection.as_ref()) {
            let silent = self.now - open.heard_at;
            if open.room == usize::MAX && !open.broken && silent > 16_500 + LATE {
                return Err("a heartbeat is missing".into());
            }
            // A heartbeat finds out that the socket takes nothing. A goodbye before the deadline has its own time.
            if silent > 16_500 + 20_000 + GOODBYE_WITHIN + LATE {
                return Err("a stream without progress is not cut".into());
            }
            if self.now > open.ends_at + GOODBYE_WITHIN + LATE {
                return Err("a stream is open after its end".into());
            }
        }
        Ok(())
    }

    fn check_bounds(&self) -> Checked {
        let streams = self.hub.connections();
        let (backlog, counted) = (self.hub.backlog(), self.hub.count_backlog());
        if backlog != counted {
            return Err(format!("{counted} bytes are buffered and {backlog} are counted"));
        }
        if backlog > SETTINGS.replay_buffer_bytes + streams * FRAME {
            return Err(format!("{backlog} bytes are buffered for {streams} streams"));
        }
        let connected = |user: &UserId| {
            self.clients.iter().any(|client| client.user == *user && client.connection.is_some())
        };
        if !self.present.iter().all(connected) {
            return Err("a user without a stream is present".into());
        }
        if self.clients.iter().any(|client| client.is_ready() && !self.present.contains(&client.user)) {
            return Err("a user with a live stream is not present".into());
        }
        let open = self.clients.iter().filter(|client| client.connection.is_some()).count();
        if open != streams {
            return Err(format!("{open} clients are connected and {streams} streams are open"));
        }
        Ok(())
    }

    /// The faults stop. Every client whose session is valid reconnects, and must be at the head within a minute.
    pub fn heal(&mut self) -> Checked {
        self.away = false;
        for client in 0..self.clients.len() {
            self.read(client, usize::from(u8::MAX));
        }
        self.carry_out()?;
        // Without those that a user has too many of.
        let mut streams = BTreeMap::new();
        let stays = |client: &SimulatedClient| {
            let valid = client.session.is_none_or(|session| !self.ended.contains(&session));
            let valid =
                valid && !self.removed_keys.contains(&client.key) && self.feeds.contains_key(&client.user);
            let streams = streams.entry(client.user).or_insert(0);
            *streams += usize::from(valid);
            (valid, valid && *streams <= SETTINGS.streams_per_user)
        };
        let rights: Vec<_> = self.clients.iter().map(stays).collect();
        for (client, (valid, stays)) in rights.iter().enumerate() {
            if *valid && !stays {
                self.hang_up(client);
            }
        }
        let staying: Vec<_> = rights.iter().map(|(_, stays)| *stays).collect();
        for round in 0..240 {
            self.reconnect();
            self.hub.set_redis_degraded(false);
            for (client, stays) in staying.iter().enumerate() {
                if *stays {
                    self.clients[client].revoked = false;
                    self.open(client, 8)?;
                }
            }
            for number in 0..8 {
                self.confirm(number);
                self.carry_out()?;
                self.deliver(0);
                self.carry_out()?;
                self.serve(0);
                self.arrive(0);
                self.carry_out()?;
            }
            self.wait(250)?;
            self.check_bounds().map_err(|why| format!("{why} in round {round}"))?;
            let mut open = self.clients.iter().filter(|client| client.connection.is_some());
            let at_head = open.all(|client| {
                let head = self.feeds.get(&client.user).map(|feed| feed.head);
                client.is_ready() && head.is_some() && client.cursor == head
            });
            if at_head && self.hub.backlog() > 0 {
                return Err(format!("{} bytes are buffered for nobody in round {round}", self.hub.backlog()));
            }
        }
        for (client, _) in self.clients.iter().zip(staying).filter(|(_, stays)| *stays) {
            let head = self.feeds.get(&client.user).map(|feed| feed.head);
            if !client.is_ready() || client.cursor != head {
                return Err(format!("client at {:?} and head at {head:?}", client.cursor));
            }
        }
        for user in 1..=USERS {
            self.ephemeral(UserId(user), true)?;
        }
        let mut without_rights = self.clients.iter().zip(&rights).filter(|(_, (valid, _))| !valid);
        if without_rights.any(|(client, _)| client.connection.is_some()) {
            return Err("a stream without rights is open".into());
        }
        if self.blocked > 0 {
            return Err(format!("{} streams count as blocked", self.blocked));
        }
        if self.hub.backlog() > 0 {
            return Err(format!("{} bytes are buffered for nobody", self.hub.backlog()));
        }
        Ok(())
    }
}
