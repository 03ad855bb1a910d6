//! Delivery: one thread that owns every stream of the process.
//!
//! It brings together what Redis says ([`crate::subscriber`]), what Postgres answers ([`crate::backfill`]) and the sockets:
//! an event goes from the sequencer straight to each socket of its user, with no queue and no task in between. All sockets
//! are watched by one epoll, which tokio watches in turn; one timing wheel serves all heartbeats and deadlines. An idle
//! connection costs its slot here and a heartbeat every few seconds.
//!
//! It promises per connection: after `ready`, every event after the cursor, once, in order, or a resync. No connection can
//! hold up another: a socket that takes nothing is left alone until it drains, and its events are read from the feed.

mod connection;
mod wheel;

use std::{
    collections::{BTreeSet, HashSet, VecDeque},
    io,
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use bytes::Bytes;
use mio::{Events, Interest, Poll, Token};
use prometheus_client::metrics::{counter::Counter, histogram::Histogram};
use rand::RngExt;
use shared::{
    cursor::Cursor,
    feed::Head,
    ids::{SessionId, UserId},
};
use slab::Slab;
use tokio::{
    io::{Interest as Readiness, unix::AsyncFd},
    runtime::Handle,
    sync::{mpsc, oneshot},
    time::sleep_until,
};

pub use self::connection::{Key, Resume};
use self::{
    connection::{Connection, MAX_NOISE, Stage, Written},
    wheel::Wheel,
};
use crate::{
    backfill::{Answers, Api, Backfill, HeadQuestion, HeadsAnswered, RangeAnswer, RangeQuestion, WhyHead},
    config::Delivery,
    drain::Drain,
    frame::{self, Event, Goodbye, HEARTBEAT},
    hub::Hub,
    limits::Place,
    metrics::{Metrics, Path, Reason},
    sequencer::{Answer, Lost, Millis, Step, Verdict, judge},
    subscriber::{News, Wishes},
};

/// Streams that were accepted and not yet taken over.
pub const ADMISSIONS: usize = 1_024;
/// An entry without connections stays this long.
const LINGER: Millis = 1_000;
/// A goodbye must be out, and the client gone, this long after it was due.
const GOODBYE_WITHIN: Millis = 3_000;
/// News taken before sockets and timers get their turn.
const NEWS_AT_ONCE: usize = 512;
/// The kernel doubles it. Enough for a page of the feed; what does not fit stays in the ring or in Postgres.
const SEND_BUFFER: usize = 64 * 1024;

/// A stream that the HTTP side has decided to open.
pub struct Admission {
    pub socket: std::net::TcpStream,
    pub user: UserId,
    pub session: SessionId,
    pub resume: Resume,
    /// The head of the HTTP answer and the first `retry`.
    pub head: Bytes,
    /// How long the stream may last, and why it ends then.
    pub lasts: Duration,
    pub ends_why: Goodbye,
    pub place: Place,
}

/// What the rest of the process tells the engine.
pub enum Command {
    /// Part from everybody, at a steady rate over this time; then answer.
    Drain { window: Duration, done: oneshot::Sender<()> },
}

/// The engine's inputs.
pub struct Inputs {
    pub admissions: mpsc::Receiver<Admission>,
    pub news: mpsc::Receiver<News>,
    pub commands: mpsc::Receiver<Command>,
}

/// Starts the engine's thread and returns its end: after a drain, or when its inputs are gone. Nothing comes when it
/// panicked; nothing can be delivered then, and the process must end.
pub fn start(
    settings: Delivery,
    api: Api,
    wishes: Wishes,
    metrics: Arc<Metrics>,
    inputs: Inputs,
) -> anyhow::Result<oneshot::Receiver<anyhow::Result<()>>> {
    let workers = Handle::current();
    let (ended_in, ended) = oneshot::channel();
    let run = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let sockets = watch(Poll::new()?)?;
            let backfill = Backfill::new(api, workers, metrics.clone());
            Engine::new(settings, sockets, backfill, wishes, metrics).run(inputs).await
        })
    };
    let thread = thread::Builder::new().name("delivery".into());
    thread.spawn(move || _ = ended_in.send(run())).context("cannot start the delivery thread")?;
    Ok(ended)
}

/// Lets tokio watch the epoll that watches the sockets.
#[expect(unsafe_code, reason = "tokio asks us to vouch for the descriptor")]
fn watch(poll: Poll) -> io::Result<AsyncFd<Poll>> {
    // SAFETY: `Poll` owns its descriptor, keeps it open until it is dropped and always names the same one.
    unsafe { AsyncFd::register_with_interest(poll, Readiness::READABLE) }
        .map_err(|error| error.into_parts().1)
}

/// Who asked what follows a place.
#[derive(Debug, Clone, Copy)]
enum Asker {
    User,
    Connection(Key, u32),
}

/// By which way an event came: it shows in the metrics.
#[derive(Clone, Copy)]
enum Way {
    Redis,
    Repair,
    Replay,
}

struct Deliveries {
    counter: Counter,
    lag: Histogram,
}

struct Engine {
    settings: Delivery,
    metrics: Arc<Metrics>,
    deliveries: [Deliveries; 3],
    sockets: AsyncFd<Poll>,
    backfill: Backfill<Asker>,
    wishes: Wishes,
    hub: Hub,
    connections: Slab<Connection>,
    wheel: Wheel,
    /// When the sequencers in doubt are next looked at.
    ticks: BTreeSet<(Millis, u32)>,
    /// Entries without connections, by when they may go.
    lingering: VecDeque<(Millis, UserId)>,
    /// Connections that ended while others were being served.
    dead: Vec<(Key, &'static str)>,
    trusted: bool,
    reconcile_at: Millis,
    /// Questions of the present reconcile round that are not answered yet.
    reconciling: usize,
    /// Something may have been missed since the present round began.
    reconcile_again: bool,
    drain: Option<Drain>,
    draining: Option<oneshot::Sender<()>>,
    generation: u32,
    question: u32,
    backlog: usize,
    started: Instant,
    now: Millis,
    /// Milliseconds since 1970.
    wall: i64,
}

impl Engine {
    fn new(
        settings: Delivery,
        sockets: AsyncFd<Poll>,
        backfill: Backfill<Asker>,
        wishes: Wishes,
        metrics: Arc<Metrics>,
    ) -> Self {
        let deliveries = ["redis", "repair", "replay"].map(|path| Deliveries {
            counter: metrics.events_delivered.get_or_create_owned(&Path { path }),
            lag: metrics.delivery_lag_seconds.get_or_create_owned(&Path { path }),
        });
        metrics.redis_suspect.set(1);
        Self {
            settings,
            metrics,
            deliveries,
            sockets,
            backfill,
            wishes,
            hub: Hub::default(),
            connections: Slab::new(),
            wheel: Wheel::new(0),
            ticks: BTreeSet::new(),
            lingering: VecDeque::new(),
            dead: Vec::new(),
            trusted: false,
            reconcile_at: 0,
            reconciling: 0,
            reconcile_again: false,
            drain: None,
            draining: None,
            generation: 0,
            question: 0,
            backlog: 0,
            started: Instant::now(),
            now: 0,
            wall: 0,
        }
    }

    async fn run(mut self, mut inputs: Inputs) -> anyhow::Result<()> {
        let mut events = Events::with_capacity(1_024);
        let mut news = Vec::with_capacity(NEWS_AT_ONCE);
        loop {
            let wake = tokio::time::Instant::from_std(self.started + Duration::from_millis(self.next_wake()));
            tokio::select! {
                count = inputs.news.recv_many(&mut news, NEWS_AT_ONCE) => {
                    self.look_at_clock();
                    if count == 0 {
                        return Ok(());
                    }
                    news.drain(..).for_each(|news| self.hear(news));
                }
                ready = self.sockets.readable_mut() => {
                    let mut ready = ready?;
                    ready.get_inner_mut().poll(&mut events, Some(Duration::ZERO))?;
                    if events.iter().count() < events.capacity() {
                        ready.clear_ready();
                    }
                    self.look_at_clock();
                    for event in &events {
                        self.on_socket(event);
                    }
                }
                Some(admission) = inputs.admissions.recv() => {
                    self.look_at_clock();
                    self.admit(admission);
                }
                answers = self.backfill.next() => {
                    self.look_at_clock();
                    match answers {
                        Answers::Ranges(answers) => answers.into_iter().for_each(|(q, a)| self.on_range(q, a)),
                        Answers::Heads(answered) => self.on_heads(answered),
                    }
                }
                () = sleep_until(wake) => self.look_at_clock(),
                Some(command) = inputs.commands.recv() => {
                    self.look_at_clock();
                    match command {
                        Command::Drain { window, done } => self.begin_drain(window, done),
                    }
                }
            }
            self.keep_time();
            self.bury();
            if self.drained(inputs.admissions.is_empty()) {
                return Ok(());
            }
        }
    }

    fn look_at_clock(&mut self) {
        self.now = self.started.elapsed().as_millis() as Millis;
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.wall = since_1970.as_millis() as i64;
    }

    // ---- Time

    fn next_wake(&self) -> Millis {
        let wheel = if self.connections.is_empty() { Millis::MAX } else { self.wheel.next() };
        let tick = self.ticks.first().map_or(Millis::MAX, |(at, _)| *at);
        let linger = self.lingering.front().map_or(Millis::MAX, |(at, _)| *at);
        let drain = self.drain.as_ref().map_or(Millis::MAX, Drain::next);
        wheel.min(tick).min(linger).min(drain).min(self.reconcile_at)
    }

    fn keep_time(&mut self) {
        let mut due = Vec::new();
        self.wheel.turn(self.now, &mut due);
        for (key, at) in due {
            if self.connection(key).is_some_and(|connection| connection.due == at) {
                self.on_due(key);
            }
        }
        while let Some((at, user)) = self.ticks.first().copied()
            && at <= self.now
        {
            self.ticks.pop_first();
            if let Some(entry) = self.hub.get_mut(user) {
                entry.tick_at = 0;
                let mut steps = Vec::new();
                entry.sequencer.tick(self.now, &mut steps);
                self.take(user, steps, Way::Repair);
            }
        }
        while let Some((at, user)) = self.lingering.front().copied()
            && at <= self.now
        {
            self.lingering.pop_front();
            self.forget(user);
        }
        if self.reconcile_at <= self.now {
            self.reconcile();
        }
        self.go_on_draining();
    }

    /// Whatever one connection is due for: an end, a heartbeat, a look at its progress.
    fn on_due(&mut self, key: Key) {
        let write_deadline = self.settings.write_deadline.as_millis() as Millis;
        let now = self.now;
        let beat = jittered(self.settings.heartbeat);
        let Some(connection) = self.connection(key) else { return };
        if let Some(why) = connection.parting {
            return self.end(key, why.as_str());
        }
        if !connection.rest.is_empty() && now >= connection.blocked_since + write_deadline {
            return self.end(key, "stalled");
        }
        if now >= connection.ends_at {
            let why = connection.ends_why;
            return self.part(key, why);
        }
        if now >= connection.beat_at {
            connection.beat_at = now + beat;
            if connection.rest.is_empty() {
                let written = connection.write(Bytes::from_static(HEARTBEAT), now);
                self.note_write(key, written);
            }
        }
        self.schedule(key);
    }

    fn schedule(&mut self, key: Key) {
        let write_deadline = self.settings.write_deadline.as_millis() as Millis;
        let Some(connection) = self.connections.get_mut(key.index as usize) else { return };
        let mut due = connection.beat_at.min(connection.ends_at);
        if !connection.rest.is_empty() {
            due = due.min(connection.blocked_since + write_deadline);
        }
        connection.due = due;
        self.wheel.insert(key, due);
    }

    fn forget(&mut self, user: UserId) {
        let Some(at) = self.hub.find(user) else { return };
        let idle =
            self.hub.get(at).is_some_and(|entry| entry.left_at.is_some_and(|left| left + LINGER <= self.now));
        if idle && let Some(entry) = self.hub.remove(at) {
            self.backlog -= entry.ring.bytes();
            self.ticks.remove(&(entry.tick_at, at));
            self.wishes.unwant(user);
            self.metrics.users.set(self.hub.users() as i64);
        }
    }

    // ---- Connections come and go

    fn admit(&mut self, admission: Admission) {
        let Admission { socket, user, session, resume, head, lasts, ends_why, place } = admission;
        let options = socket2::SockRef::from(&socket);
        let prepared = socket.set_nonblocking(true).and_then(|()| {
            options.set_send_buffer_size(SEND_BUFFER)?;
            // What the kernel holds unacknowledged, or cannot send to a full receiver, may make no progress this long.
            options.set_tcp_user_timeout(Some(self.settings.write_deadline))
        });
        let mut socket = mio::net::TcpStream::from_std(socket);
        let slot = self.connections.vacant_entry();
        self.generation = self.generation.wrapping_add(1);
        let key = Key { index: slot.key() as u32, generation: self.generation };
        let registered = prepared.and_then(|()| {
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.sockets.get_ref().registry().register(&mut socket, Token(slot.key()), interest)
        });
        if let Err(error) = registered {
            tracing::warn!(%error, user.id = %user, "a stream could not be taken over");
            self.metrics.ended("error");
            return;
        }
        let (at, new) = self.hub.enter(user);
        if new {
            self.wishes.want(user);
            self.metrics.users.set(self.hub.users() as i64);
        }
        slot.insert(Connection {
            socket,
            generation: key.generation,
            user: at,
            session,
            stage: Stage::Joining(resume),
            head: match resume {
                Resume::After(Cursor { epoch, seq }) => Head { epoch, seq },
                Resume::Head | Resume::Nonsense => Head { epoch: shared::cursor::Epoch(0), seq: 0 },
            },
            rest: Bytes::new(),
            page: VecDeque::new(),
            inquired: false,
            asked: None,
            owes_ready: None,
            lost: None,
            parting: None,
            said_goodbye: false,
            beat_at: self.now + jittered(self.settings.heartbeat),
            ends_at: self.now + lasts.as_millis() as Millis,
            ends_why,
            blocked_since: self.now,
            due: 0,
            noise: 0,
            _place: place,
        });
        self.metrics.streams.inc();
        self.metrics.streams_opened.inc();
        self.make_room(at);
        if let Some(entry) = self.hub.get_mut(at) {
            entry.connections.push(key);
        }
        tracing::debug!(user.id = %user, connection = key.generation, resumes = resume != Resume::Head, new, "stream opened");
        self.schedule(key);
        let now = self.now;
        if let Some(connection) = self.connection(key) {
            let written = connection.write(head, now);
            self.note_write(key, written);
        }
        if self.drain.is_some() {
            return self.part(key, Goodbye::Drain);
        }
        self.join(key);
    }

    /// One user's streams beyond the limit: the oldest goes.
    fn make_room(&mut self, user: u32) {
        let limit = self.settings.streams_per_user;
        let Some(entry) = self.hub.get(user) else { return };
        let staying = entry.connections.iter().copied().filter(|key| {
            self.connections.get(key.index as usize).is_some_and(|connection| connection.parting.is_none())
        });
        let staying: Vec<_> = staying.collect();
        let over = (staying.len() + 1).saturating_sub(limit);
        for key in staying.into_iter().take(over) {
            self.part(key, Goodbye::Replaced);
        }
    }

    /// Asks what must be known of a joining connection, as soon as asking makes sense: an answer given before Redis listens
    /// for this user could miss what comes between the two.
    fn join(&mut self, key: Key) {
        let trusted = self.trusted;
        let Some(connection) = self.connections.get_mut(key.index as usize) else { return };
        let Some(entry) = self.hub.get(connection.user) else { return };
        let place = entry.sequencer.place();
        let may_ask = entry.confirmed || !trusted;
        if !connection.inquired && (may_ask || place.is_some()) {
            connection.inquired = true;
            self.backfill.ask_head(HeadQuestion {
                user: entry.user,
                asked_at: place,
                why: WhyHead::Join,
                session: Some(connection.session),
            });
        }
        match connection.stage {
            Stage::Joining(Resume::After(cursor)) if may_ask && connection.asked.is_none() => {
                self.ask_range(key, cursor.seq);
            }
            // The head that was just asked for places it otherwise.
            Stage::Joining(Resume::Head | Resume::Nonsense) if place.is_some() => self.place_at_head(key),
            Stage::Joining(_) | Stage::Placed => {}
        }
    }

    fn place_at_head(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(key.index as usize) else { return };
        let Some(place) = self.hub.get(connection.user).and_then(|entry| entry.sequencer.place()) else {
            return;
        };
        let Stage::Joining(resume) = connection.stage else { return };
        connection.stage = Stage::Placed;
        connection.head = place;
        connection.owes_ready = Some(false);
        connection.lost = (resume == Resume::Nonsense).then_some(Lost::Unknown);
        self.pull(key);
    }

    fn place_at_cursor(connection: &mut Connection) {
        connection.stage = Stage::Placed;
        connection.owes_ready = Some(true);
    }

    /// Says goodbye, once what was begun is written, and closes.
    fn part(&mut self, key: Key, why: Goodbye) {
        let now = self.now;
        let Some(connection) = self.connection(key) else { return };
        if connection.parting.is_some() {
            return;
        }
        connection.parting = Some(why);
        connection.due = now + GOODBYE_WITHIN;
        let due = connection.due;
        self.wheel.insert(key, due);
        self.pull(key);
    }

    fn end(&mut self, key: Key, reason: &'static str) {
        self.dead.push((key, reason));
    }

    /// Removes what has ended. Not where it ends, because there somebody may be walking over the user's connections.
    fn bury(&mut self) {
        while let Some((key, reason)) = self.dead.pop() {
            if self.connection(key).is_none() {
                continue;
            }
            let mut connection = self.connections.remove(key.index as usize);
            let _ = self.sockets.get_ref().registry().deregister(&mut connection.socket);
            self.backlog -= bytes_of(&connection.page);
            if !connection.rest.is_empty() {
                self.metrics.readers_behind.dec();
            }
            self.metrics.streams.dec();
            self.metrics.ended(reason);
            if let Some(entry) = self.hub.get_mut(connection.user) {
                entry.connections.retain(|other| *other != key);
                tracing::debug!(user.id = %entry.user, connection = key.generation, reason, "stream ended");
                if entry.connections.is_empty() {
                    entry.left_at = Some(self.now);
                    self.lingering.push_back((self.now + LINGER, entry.user));
                }
            }
            self.trim(connection.user);
        }
        self.metrics.backlog_bytes.set(self.backlog as i64);
    }

    fn connection(&mut self, key: Key) -> Option<&mut Connection> {
        let connection = self.connections.get_mut(key.index as usize)?;
        (connection.generation == key.generation).then_some(connection)
    }

    // ---- Sockets

    fn on_socket(&mut self, event: &mio::event::Event) {
        let index = event.token().0;
        let Some(connection) = self.connections.get_mut(index) else { return };
        let key = Key { index: index as u32, generation: connection.generation };
        if event.is_error() {
            let timed_out = matches!(
                connection.socket.take_error(),
                Ok(Some(error)) if error.kind() == io::ErrorKind::TimedOut
            );
            return self.end(key, if timed_out { "stalled" } else { "client" });
        }
        if event.is_readable() {
            let open = connection.discard_input();
            let parting = connection.parting;
            if connection.noise > MAX_NOISE {
                return self.end(key, "noise");
            }
            if !matches!(open, Ok(true)) {
                return self.end(key, parting.map_or("client", Goodbye::as_str));
            }
        }
        if event.is_writable() {
            self.pull(key);
        }
    }

    /// Accounts for a write. `true` when the socket took everything.
    fn note_write(&mut self, key: Key, written: io::Result<Written>) -> bool {
        match written {
            Ok(Written::All) => true,
            Ok(Written::Short) => {
                self.metrics.readers_behind.inc();
                self.metrics.readers_fell_behind.inc();
                let parting = self.connection(key).is_some_and(|connection| connection.parting.is_some());
                if !parting {
                    self.schedule(key);
                }
                false
            }
            Err(error) => {
                let stalled = error.kind() == io::ErrorKind::TimedOut;
                self.end(key, if stalled { "stalled" } else { "client" });
                false
            }
        }
    }

    /// Writes all that the connection may have and its socket takes: the rest of a block, what it is owed, what follows its
    /// cursor. Asks for what is not here.
    fn pull(&mut self, key: Key) {
        let now = self.now;
        loop {
            let Some(connection) = self.connections.get_mut(key.index as usize) else { return };
            if connection.generation != key.generation {
                return;
            }
            if !connection.rest.is_empty() {
                match connection.flush(now) {
                    Ok(Written::All) => _ = self.metrics.readers_behind.dec(),
                    Ok(Written::Short) => return,
                    Err(_) => return self.end(key, "client"),
                }
                continue;
            }
            let Some(entry) = self.hub.get(connection.user) else { return };
            let place = entry.sequencer.place();
            let mut delivered = None;
            let block = if let Some(why) = connection.parting {
                if connection.said_goodbye {
                    return connection.finish_writing();
                }
                connection.said_goodbye = true;
                frame::goodbye(why, rand::rng().random_range(why.retry())).into()
            } else if !connection.is_placed() {
                return;
            } else if let Some(resumed) = connection.owes_ready.take() {
                let cursor = Cursor { epoch: connection.head.epoch, seq: connection.head.seq };
                let with_id = connection.lost.is_none();
                let heartbeat = self.settings.heartbeat.as_secs();
                let cursor = match (with_id, place) {
                    (false, Some(head)) => Cursor { epoch: head.epoch, seq: head.seq },
                    _ => cursor,
                };
                frame::ready(cursor, resumed && with_id, with_id, heartbeat, SystemTime::now()).into()
            } else if let (Some(why), Some(head)) = (connection.lost, place) {
                connection.lost = None;
                connection.head = head;
                connection.asked = None;
                self.backlog -= bytes_of(&connection.page);
                connection.page = VecDeque::new();
                self.metrics.resyncs.get_or_create(&Reason { reason: why.as_str() }).inc();
                tracing::info!(user.id = %entry.user, event.seq = head.seq, reason = why.as_str(), "a stream must resync");
                frame::resync(Cursor { epoch: head.epoch, seq: head.seq }, why).into()
            } else if let Some(event) = connection.page.pop_front() {
                self.backlog -= event.frame.len();
                if connection.page.is_empty() {
                    connection.page = VecDeque::new();
                }
                if event.head.epoch != connection.head.epoch || event.head.seq != connection.head.seq + 1 {
                    continue; // Passed already, by a live event.
                }
                connection.head = event.head;
                delivered = Some((event.created_at, Way::Replay));
                event.frame
            } else if let Some(event) = entry.ring.after(connection.head) {
                connection.head = event.head;
                delivered = Some((event.created_at, Way::Redis));
                event.frame.clone()
            } else {
                let head = connection.head;
                let behind = place.is_some_and(|place| place.epoch == head.epoch && place.seq > head.seq);
                if behind && connection.asked.is_none() {
                    self.ask_range(key, head.seq);
                } else if !behind && !entry.ring.is_empty() {
                    let user = connection.user;
                    self.trim(user);
                }
                return;
            };
            let written = connection.write(block, now);
            if let Some((created_at, way)) = delivered {
                self.note_delivery(created_at, way);
            }
            if !self.note_write(key, written) {
                return;
            }
        }
    }

    fn note_delivery(&self, created_at: i64, way: Way) {
        let delivery = &self.deliveries[way as usize];
        delivery.counter.inc();
        delivery.lag.observe((self.wall - created_at).max(0) as f64 / 1_000.0);
    }

    // ---- Events

    fn hear(&mut self, news: News) {
        match news {
            News::Event(user, event) => self.on_event(user, event),
            News::Revoked(user, session) => self.end_session(user, session),
            News::Confirmed(users) => users.into_iter().for_each(|user| self.on_confirmed(user)),
            News::Lost => self.hub.iter_mut().for_each(|entry| entry.confirmed = false),
            News::Trusted(trusted) if trusted == self.trusted => {}
            News::Trusted(trusted) => {
                self.trusted = trusted;
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
                    self.take(at, vec![], Way::Repair);
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
                Stage::Joining(Resume::After(_)) => {
                    Self::place_at_cursor(connection);
                    self.pull(key);
                }
                Stage::Joining(_) => continue,
                Stage::Placed => {}
            }
            self.write_next(key, &event, Way::Redis);
        }
        let Some(entry) = self.hub.get_mut(user) else { return };
        let mut steps = Vec::new();
        entry.sequencer.live(at, event, self.now, &mut steps);
        self.take(user, steps, Way::Redis);
    }

    /// Writes an event to a connection that has the one before it, if its socket is free.
    fn write_next(&mut self, key: Key, event: &Event, way: Way) {
        let now = self.now;
        let Some(connection) = self.connection(key) else { return };
        if connection.is_clear() {
            connection.head = event.head;
            let written = connection.write(event.frame.clone(), now);
            self.note_delivery(event.created_at, way);
            self.note_write(key, written);
        }
    }

    /// Does what a sequencer says.
    fn take(&mut self, user: u32, steps: Vec<Step<Event>>, way: Way) {
        let Some(entry) = self.hub.get(user) else { return };
        let id = entry.user;
        for step in steps {
            match step {
                Step::Deliver(_, event) => self.deliver(user, event, way),
                Step::Ask { after: Some(after) } => {
                    let asked_at = self.hub.get(user).and_then(|entry| entry.sequencer.place());
                    self.backfill.ask_range(RangeQuestion { user: id, after, asker: Asker::User, asked_at });
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
    fn deliver(&mut self, user: u32, event: Event, way: Way) {
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
    fn trim(&mut self, user: u32) {
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

    fn connections_of(&self, user: u32) -> Vec<Key> {
        self.hub.get(user).map_or_else(Vec::new, |entry| entry.connections.clone())
    }

    fn end_session(&mut self, user: UserId, session: SessionId) {
        let Some(user) = self.hub.find(user) else { return };
        for key in self.connections_of(user) {
            if self.connection(key).is_some_and(|connection| connection.session == session) {
                self.part(key, Goodbye::Revoked);
            }
        }
    }

    // ---- Questions and answers

    fn ask_range(&mut self, key: Key, after: u64) {
        self.question = self.question.wrapping_add(1);
        let question = self.question;
        let Some(connection) = self.connection(key) else { return };
        connection.asked = Some(question);
        let user = connection.user;
        let Some(entry) = self.hub.get(user) else { return };
        self.backfill.ask_range(RangeQuestion {
            user: entry.user,
            after,
            asker: Asker::Connection(key, question),
            asked_at: entry.sequencer.place(),
        });
    }

    fn on_range(&mut self, question: RangeQuestion<Asker>, answer: RangeAnswer) {
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
                self.take(user, steps, Way::Repair);
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
                self.take(user, steps, Way::Repair);
                self.on_page(key, number, question.after, answer);
            }
        }
        self.go_on_from(before, user);
    }

    /// The answer to a connection's own question.
    fn on_page(&mut self, key: Key, number: u32, after: u64, answer: RangeAnswer) {
        let room = self.settings.backlog_bytes.saturating_sub(self.backlog);
        let Some(connection) = self.connection(key) else { return };
        if connection.asked != Some(number) {
            return; // Its place was lost since.
        }
        connection.asked = None;
        let cursor = Head { epoch: connection.head.epoch, seq: after };
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

    fn on_heads(&mut self, answered: HeadsAnswered) {
        let HeadsAnswered { questions, heads, ended } = answered;
        for question in questions {
            if question.why == WhyHead::Reconcile {
                self.reconciling = self.reconciling.saturating_sub(1);
            }
            if let Some(session) = question.session.filter(|session| ended.contains(session)) {
                self.end_session(question.user, session);
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
                    self.metrics.reconcile_found.inc_by(u64::from(beyond));
                    entry.sequencer.observe(answer(head), self.now, &mut steps);
                }
                (None, WhyHead::Place) => {
                    tracing::error!(user.id = %question.user, "api left out a head that was asked for");
                    entry.sequencer.answer(answer(None), self.now, &mut steps);
                }
                (None, _) => {}
            }
            self.take(user, steps, Way::Repair);
            self.go_on_from(place, user);
        }
        if self.reconciling == 0 && self.reconcile_again {
            self.reconcile_again = false;
            self.reconcile_soon();
        }
    }

    /// After an answer: if it told the user's place for the first time, those who waited for it go on.
    fn go_on_from(&mut self, before: Option<Head>, user: u32) {
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
    fn on_confirmed(&mut self, user: UserId) {
        let Some(at) = self.hub.find(user) else { return };
        let Some(entry) = self.hub.get_mut(at) else { return };
        entry.confirmed = true;
        if let Some(place) = entry.sequencer.place() {
            let question = HeadQuestion { user, asked_at: Some(place), why: WhyHead::Join, session: None };
            self.backfill.ask_head(question);
        } else if entry.connections.iter().any(|key| self.connections[key.index as usize].inquired) {
            // The answer that is on its way was asked for too early: look again after it.
            entry.sequencer.suspect(self.now);
            self.take(at, vec![], Way::Repair);
        }
        for key in self.connections_of(at) {
            self.join(key);
        }
    }

    /// Whose head is beyond what is here? One round at a time.
    fn reconcile(&mut self) {
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
            let mut sessions: Vec<_> = sessions.map(|connection| connection.session).collect();
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
    fn reconcile_soon(&mut self) {
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
                                connections.get(key.index as usize).is_some_and(|c| c.session == session)
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

    // ---- The end

    fn begin_drain(&mut self, window: Duration, done: oneshot::Sender<()>) {
        tracing::info!(streams = self.connections.len(), ?window, "parting from all streams");
        self.drain = Some(Drain::new(self.now, window.as_millis() as Millis));
        self.draining = Some(done);
    }

    fn go_on_draining(&mut self) {
        let Some(drain) = self.drain.as_mut().filter(|drain| drain.next() <= self.now) else { return };
        let staying = self.connections.iter().filter(|(_, connection)| connection.parting.is_none());
        let staying: Vec<_> = staying
            .map(|(index, connection)| Key { index: index as u32, generation: connection.generation })
            .collect();
        let share = drain.step(staying.len(), self.now);
        for key in staying.into_iter().take(share) {
            self.part(key, Goodbye::Drain);
        }
    }

    /// Whether all streams are gone and none is on its way, or the time for it is over.
    fn drained(&mut self, none_to_come: bool) -> bool {
        let over = self.drain.as_ref().is_some_and(|drain| {
            self.connections.is_empty() && none_to_come || self.now >= drain.end() + 2 * GOODBYE_WITHIN
        });
        if over {
            tracing::info!(cut = self.connections.len(), "parted from all streams");
            if let Some(done) = self.draining.take() {
                let _ = done.send(());
            }
        }
        over
    }
}

fn bytes_of(page: &VecDeque<Event>) -> usize {
    page.iter().map(|event| event.frame.len()).sum()
}

/// ± 20 %, so that what began together does not stay together.
fn jittered(every: Duration) -> Millis {
    every.mul_f64(rand::rng().random_range(0.8..1.2)).as_millis() as Millis
}
