//! Delivery: one thread that owns every stream of the process.
//!
//! It connects Redis ([`crate::subscriber`]), Postgres ([`crate::backfill`]) and the sockets: an event goes from the sequencer
//! directly to each socket of its user, with no queue and no task in between. One epoll watches all sockets, and tokio watches
//! the epoll; one timing wheel serves all heartbeats and deadlines. An idle connection costs its slot and its heartbeats.
//!
//! After `ready`, each connection receives every event after its cursor, once and in order, or a resync. No connection delays
//! another: a lagging one is skipped until its socket takes bytes, and then reads from the replay buffer or the feed.
//!
//! This file has the loop and the timers; `lifecycle` opens and closes connections, `sockets` writes to them, `events` delivers
//! events, and `backfill` handles requests to Postgres.

mod backfill;
mod connection;
mod events;
mod explain;
mod explanation;
mod lifecycle;
mod sockets;
mod wheel;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    io,
    num::NonZeroU32,
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use bytes::Bytes;
use mio::{Events, Poll};
use prometheus_client::metrics::{counter::Counter, histogram::Histogram};
use protocol::{
    claims::KeyName,
    ids::{SessionId, UserId},
    position::Seq,
};
use rand::RngExt;
use service_kit::{ended_sessions::EndedSessions, tasks::Tasks, traces::Tracer};
use slab::Slab;
use tokio::{
    io::{Interest as Readiness, unix::AsyncFd},
    runtime::Handle,
    sync::{mpsc, oneshot},
    time::sleep_until,
};
use tokio_util::sync::CancellationToken;

use self::{connection::Connection, explanation::ClosedStreams, wheel::Wheel};
pub use self::{connection::Resume, explanation::Explanation};
use crate::{
    api_client::ApiClient,
    backfill::{Answers, Backfill},
    config::{Delivery, HEARTBEAT_JITTER},
    drain::DrainSchedule,
    event::EncodedEvent,
    frame::{Framing, Goodbye, Heartbeat},
    hub::{ConnectionKey, Hub},
    keys::Keys,
    limits::Permit,
    metrics::{DeliveryPath, Metrics, Path},
    sequencer::Millis,
    subscriber::{DesiredSubscriptions, RedisUpdate},
    trace::Flush,
};

/// Accepted streams that wait for the engine; a storm of reconnects fits in.
pub const NEW_STREAMS: usize = 16_384;
/// Streams admitted before other inputs get their turn.
const ADMITTED_PER_TURN: usize = 64;
/// An entry without connections stays this long.
const LINGER: Millis = 1_000;
/// A closing stream is cut after this long.
const GOODBYE_WITHIN: Millis = 3_000;
/// The same when the token or the session has ended: a lagging client must not gain time.
const EXPIRED_WITHIN: Millis = 500;
const REVOKED_WITHIN: Millis = 1_000;
/// Redis updates taken before sockets and timers get their turn.
const UPDATES_PER_TURN: usize = 512;
/// The kernel doubles it. Enough for a page of the feed; the rest stays in the replay buffer or in Postgres.
const SEND_BUFFER: usize = 64 * 1024;

/// A stream that the HTTP side has decided to open.
pub struct NewStream {
    pub socket: std::net::TcpStream,
    pub user: UserId,
    pub session: Option<SessionId>,
    /// The key that signed the token.
    pub key: KeyName,
    pub resume: Resume,
    pub heartbeat: Heartbeat,
    pub framing: Framing,
    /// The head of the HTTP response and the first `retry`.
    pub head: Bytes,
    /// When the stream ends at the latest, and why.
    pub ends: Instant,
    pub ends_why: Goodbye,
    pub permit: Permit,
}

pub enum EngineCommand {
    /// Close all streams at a steady rate over `window`, then signal `done`.
    Drain {
        window: Duration,
        done: oneshot::Sender<()>,
    },
    Explain {
        user: UserId,
        seq: Seq,
        answer: oneshot::Sender<Explanation>,
    },
}

/// What a stream's right to be open depends on.
pub struct Rights {
    pub keys: Arc<Keys>,
    pub ended_sessions: EndedSessions,
}

pub struct Inputs {
    pub new_streams: mpsc::Receiver<NewStream>,
    pub updates: mpsc::Receiver<RedisUpdate>,
    pub commands: mpsc::Receiver<EngineCommand>,
    /// Watch the thread, which may end once `stop` is cancelled.
    pub tasks: Tasks,
    pub stop: CancellationToken,
}

/// Starts the delivery thread. It ends after a drain or when its inputs are closed; before `stop`, that is a failure.
#[expect(clippy::disallowed_methods, reason = "the thread is watched")]
pub fn start(
    settings: Delivery,
    api: ApiClient,
    rights: Rights,
    desired: DesiredSubscriptions,
    tracer: Tracer,
    metrics: Arc<Metrics>,
    inputs: Inputs,
) -> anyhow::Result<()> {
    let workers = Handle::current();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let poll = Poll::new()?;
    let (tasks, stop) = (inputs.tasks.clone(), inputs.stop.clone());
    let run = async move {
        let backfill = Backfill::new(api, workers, tracer, metrics.clone());
        let engine = |sockets| Engine::new(settings, sockets, backfill, rights, desired, metrics);
        let ended = match watch(poll) {
            Ok(sockets) => engine(sockets).run(inputs).await,
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            tracing::error!(%error, "delivery thread failed to poll its sockets; the process stops");
        }
    };
    let run = tasks.watch("delivery thread", &stop, run);
    let thread = thread::Builder::new().name("delivery".into());
    thread.spawn(move || runtime.block_on(run)).context("cannot start the delivery thread")?;
    Ok(())
}

#[expect(unsafe_code, reason = "tokio requires a descriptor that stays valid")]
fn watch(poll: Poll) -> io::Result<AsyncFd<Poll>> {
    // SAFETY: `Poll` owns its descriptor, keeps it open until it is dropped and always names the same one.
    unsafe { AsyncFd::register_with_interest(poll, Readiness::READABLE) }
        .map_err(|error| error.into_parts().1)
}

#[derive(Debug, Clone, Copy)]
enum Requester {
    User,
    Connection(ConnectionKey, NonZeroU32),
}

struct PathMetrics {
    counter: Counter,
    lag: Histogram,
}

struct Engine {
    settings: Delivery,
    metrics: Arc<Metrics>,
    path_metrics: [PathMetrics; 3],
    sockets: AsyncFd<Poll>,
    backfill: Backfill<Requester>,
    keys: Arc<Keys>,
    desired: DesiredSubscriptions,
    ended: EndedSessions,
    hub: Hub,
    connections: Slab<Connection>,
    wheel: Wheel,
    /// When the uncertain sequencers are next ticked.
    ticks: BTreeSet<(Millis, u32)>,
    /// Users without connections, by when they may be removed.
    lingering: VecDeque<(Millis, UserId)>,
    /// Recorded flushes in progress; not in `Connection`, because few connections have one.
    flushes: HashMap<ConnectionKey, Flush>,
    /// Connections to remove at the end of the turn.
    to_close: Vec<(ConnectionKey, &'static str)>,
    closed_streams: ClosedStreams,
    redis_degraded: bool,
    reconcile_at: Millis,
    /// Unanswered requests of the current reconcile round.
    reconciling: usize,
    /// Events may be missing since the current round began.
    reconcile_again: bool,
    drain: Option<DrainSchedule>,
    draining: Option<oneshot::Sender<()>>,
    generation: u32,
    last_request: NonZeroU32,
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
        backfill: Backfill<Requester>,
        Rights { keys, ended_sessions }: Rights,
        desired: DesiredSubscriptions,
        metrics: Arc<Metrics>,
    ) -> Self {
        let path_metrics = DeliveryPath::ALL.map(|path| {
            let path = path.as_str();
            PathMetrics {
                counter: metrics.events_delivered.get_or_create_owned(&Path { path }),
                lag: metrics.delivery_lag_seconds.get_or_create_owned(&Path { path }),
            }
        });
        Self {
            settings,
            metrics,
            path_metrics,
            sockets,
            backfill,
            keys,
            desired,
            ended: ended_sessions,
            hub: Hub::default(),
            connections: Slab::new(),
            wheel: Wheel::new(0),
            ticks: BTreeSet::new(),
            lingering: VecDeque::new(),
            flushes: HashMap::new(),
            to_close: Vec::new(),
            closed_streams: ClosedStreams::default(),
            redis_degraded: true,
            reconcile_at: 0,
            reconciling: 0,
            reconcile_again: false,
            drain: None,
            draining: None,
            generation: 0,
            last_request: NonZeroU32::MIN,
            backlog: 0,
            started: Instant::now(),
            now: 0,
            wall: 0,
        }
    }

    async fn run(mut self, mut inputs: Inputs) -> io::Result<()> {
        let mut events = Events::with_capacity(1_024);
        let mut updates = Vec::with_capacity(UPDATES_PER_TURN);
        let mut new_streams = Vec::with_capacity(ADMITTED_PER_TURN);
        let mut keys = self.keys.subscribe();
        loop {
            let wake = tokio::time::Instant::from_std(self.started + Duration::from_millis(self.next_wake()));
            tokio::select! {
                count = inputs.updates.recv_many(&mut updates, UPDATES_PER_TURN) => {
                    self.update_clock();
                    if count == 0 {
                        return Ok(());
                    }
                    updates.drain(..).for_each(|update| self.on_redis(update));
                }
                ready = self.sockets.readable_mut() => {
                    let mut ready = ready?;
                    match ready.get_inner_mut().poll(&mut events, Some(Duration::ZERO)) {
                        Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                        _ => {}
                    }
                    if events.iter().count() < events.capacity() {
                        ready.clear_ready();
                    }
                    self.update_clock();
                    for event in &events {
                        self.on_socket(event);
                    }
                }
                1.. = inputs.new_streams.recv_many(&mut new_streams, ADMITTED_PER_TURN) => {
                    self.update_clock();
                    new_streams.drain(..).for_each(|stream| self.admit(stream));
                }
                answers = self.backfill.next() => {
                    self.update_clock();
                    match answers {
                        Answers::Ranges(answers) => answers.into_iter().for_each(|(q, a)| self.on_range(q, a)),
                        Answers::Heads(answered) => self.on_heads(answered),
                    }
                }
                () = sleep_until(wake) => self.update_clock(),
                Ok(()) = keys.changed() => {
                    self.update_clock();
                    let trusted = keys.borrow_and_update().clone();
                    trusted.iter().for_each(|trusted| self.close_streams_of_removed_keys(trusted));
                }
                Some(command) = inputs.commands.recv() => {
                    self.update_clock();
                    match command {
                        EngineCommand::Drain { window, done } => self.begin_drain(window, done),
                        EngineCommand::Explain { user, seq, answer } => _ = answer.send(self.explain(user, seq)),
                    }
                }
            }
            self.run_timers();
            self.remove_closed();
            if self.drained(inputs.new_streams.is_empty()) {
                return Ok(());
            }
        }
    }

    fn update_clock(&mut self) {
        self.now = self.started.elapsed().as_millis() as Millis;
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.wall = since_1970.as_millis() as i64;
    }

    fn next_wake(&self) -> Millis {
        let wheel = if self.connections.is_empty() { Millis::MAX } else { self.wheel.next() };
        let tick = self.ticks.first().map_or(Millis::MAX, |(at, _)| *at);
        let linger = self.lingering.front().map_or(Millis::MAX, |(at, _)| *at);
        let drain = self.drain.as_ref().map_or(Millis::MAX, DrainSchedule::next);
        wheel.min(tick).min(linger).min(drain).min(self.reconcile_at)
    }

    fn run_timers(&mut self) {
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
                self.apply(user, steps, DeliveryPath::Repair);
            }
        }
        while let Some((at, user)) = self.lingering.front().copied()
            && at <= self.now
        {
            self.lingering.pop_front();
            self.forget_user(user);
        }
        if self.reconcile_at <= self.now {
            self.reconcile();
        }
        self.continue_drain();
    }

    /// Closes the connection, or sends its heartbeat.
    fn on_due(&mut self, key: ConnectionKey) {
        let write_deadline = self.settings.write_deadline.as_millis() as Millis;
        let now = self.now;
        let heartbeat = self.settings.heartbeat;
        let Some(connection) = self.connection(key) else { return };
        if let Some(why) = connection.closing {
            return self.close(key, why.as_str());
        }
        if !connection.rest.is_empty() && now >= connection.blocked_since + write_deadline {
            return self.close(key, "slow_consumer");
        }
        if now >= connection.ends_at {
            let why = connection.ends_why;
            return self.start_closing(key, why);
        }
        if now >= connection.heartbeat_at {
            connection.heartbeat_at = now + jittered(connection.heartbeat.every(heartbeat));
            if connection.rest.is_empty() {
                let written = connection.write_block(&connection.heartbeat.chunk(), now);
                self.note_write(key, written);
            }
        }
        self.schedule(key);
    }

    fn schedule(&mut self, key: ConnectionKey) {
        let write_deadline = self.settings.write_deadline.as_millis() as Millis;
        let Some(connection) = self.connections.get_mut(key.index as usize) else { return };
        let mut due = connection.heartbeat_at.min(connection.ends_at);
        if !connection.rest.is_empty() {
            due = due.min(connection.blocked_since + write_deadline);
        }
        if due != connection.due {
            connection.due = due; // Otherwise the wheel has the entry already.
            self.wheel.insert(key, due);
        }
    }

    fn begin_drain(&mut self, window: Duration, done: oneshot::Sender<()>) {
        tracing::info!(
            streams = self.connections.len(),
            ?window,
            "drain: closing all streams at a steady rate"
        );
        self.drain = Some(DrainSchedule::new(self.now, window.as_millis() as Millis));
        self.draining = Some(done);
    }

    fn continue_drain(&mut self) {
        let Some(drain) = self.drain.as_mut().filter(|drain| drain.next() <= self.now) else { return };
        let staying = self.connections.iter().filter(|(_, connection)| connection.closing.is_none());
        let staying: Vec<_> = staying
            .map(|(index, connection)| ConnectionKey {
                index: index as u32,
                generation: connection.generation,
            })
            .collect();
        let share = drain.step(staying.len(), self.now);
        for key in staying.into_iter().take(share) {
            self.start_closing(key, Goodbye::Drain);
        }
    }

    /// Whether all streams are closed and none is waiting, or the time for the drain is over.
    fn drained(&mut self, none_to_come: bool) -> bool {
        let over = self.drain.as_ref().is_some_and(|drain| {
            self.connections.is_empty() && none_to_come || self.now >= drain.end() + 2 * GOODBYE_WITHIN
        });
        if over {
            tracing::info!(cut = self.connections.len(), "drain: finished; remaining streams are cut");
            if let Some(done) = self.draining.take() {
                let _ = done.send(());
            }
        }
        over
    }
}

fn bytes_of(page: &VecDeque<EncodedEvent>) -> usize {
    page.iter().map(|event| event.frame.len()).sum()
}

fn jittered(every: Duration) -> Millis {
    every.mul_f64(rand::rng().random_range(1.0 - HEARTBEAT_JITTER..1.0 + HEARTBEAT_JITTER)).as_millis()
        as Millis
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shortest_heartbeat_comes_within_the_shortest_read_timeout() {
        let latest =
            Duration::from_secs(4).mul_f64(1.0 + HEARTBEAT_JITTER) + Duration::from_millis(wheel::SLOT);
        assert!(latest < Duration::from_secs(5), "{latest:?}");
    }

    /// Every idle stream costs this and its user's entry.
    #[test]
    fn a_connection_stays_within_its_size() {
        let limit = if cfg!(debug_assertions) { 248 } else { 232 }; // A socket of mio's is bigger in debug builds.
        assert!(size_of::<Connection>() <= limit, "{}", size_of::<Connection>());
    }
}
