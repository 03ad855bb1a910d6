//! Delivery: one thread that owns every stream of the process and carries out what the [`core`](crate::core) decides.
//!
//! The thread reads Redis, too, so an event goes from there through the core to each socket of its user without another thread
//! or task per connection in between. One epoll watches all sockets, and tokio watches the epoll. An idle connection costs its slots and its heartbeats.
//!
//! This file has the loop and the inputs, `effects` carries out the core's effects, and `sockets` has the sockets.

mod effects;
mod sockets;

use std::{
    io,
    pin::pin,
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use bytes::Bytes;
use mio::Poll;
use protocol::{
    claims::KeyName,
    ids::{SessionId, UserId},
    position::Seq,
};
use rand::{SeedableRng, rngs::SmallRng};
use service_kit::{ended_sessions::EndedSessions, tasks::Tasks, traces::Tracer};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
    time::sleep_until,
};
use tokio_util::sync::CancellationToken;

pub use self::sockets::set_options;
use self::{
    effects::Telemetry,
    sockets::{SocketEvent, Sockets},
};
pub use crate::core::{Explanation, Resume};
use crate::{
    api_client::ApiClient,
    backfill::{Answers, Backfill, BatchFailed, HeadsAnswered},
    config::Delivery,
    core::{Effect, Hub, Millis, NewConnection},
    frame::{Framing, Goodbye, Heartbeat},
    keys::{Keys, TrustedKeys},
    limits::Permit,
    metrics::{Metrics, Reason},
    presence::PresenceChanges,
    subscriber::{DesiredSubscriptions, RedisUpdate},
};

/// Accepted streams that wait for the engine; a storm of reconnects fits in.
pub const NEW_STREAMS: usize = 16_384;
/// Streams admitted before other inputs get their turn.
const ADMITTED_PER_TURN: usize = 64;
/// Redis updates taken before sockets and timers get their turn.
const UPDATES_PER_TURN: usize = 512;

/// Turns of the engine and of the connections to Redis before the sockets are polled again.
const TASKS_PER_POLL: u32 = 4;

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
    /// The head of the HTTP response and the first `retry`; empty if they are written already.
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
    /// An output: who came and who left.
    pub presence: PresenceChanges,
    /// Watch the thread, which may end once `stop` is cancelled.
    pub tasks: Tasks,
    pub stop: CancellationToken,
}

/// Starts the delivery thread, which also reads the connections to Redis: it runs the tasks that are spawned on the returned
/// handle. It ends after a drain or when its inputs are closed; before `stop`, that is a failure.
#[expect(clippy::disallowed_methods, reason = "the thread is watched")]
pub fn start(
    settings: Delivery,
    api: ApiClient,
    rights: Rights,
    desired: DesiredSubscriptions,
    tracer: Tracer,
    metrics: Arc<Metrics>,
    inputs: Inputs,
) -> anyhow::Result<Handle> {
    let workers = Handle::current();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .event_interval(TASKS_PER_POLL)
        .global_queue_interval(TASKS_PER_POLL)
        .build()?;
    let handle = runtime.handle().clone();
    let poll = Poll::new()?;
    let (tasks, stop) = (inputs.tasks.clone(), inputs.stop.clone());
    let run = async move {
        let backfill = Backfill::new(api, workers, tracer, metrics.clone());
        let ended = match Sockets::new(poll) {
            Ok(sockets) => {
                Engine::new(settings, sockets, backfill, rights, desired, inputs.presence.clone(), metrics)
                    .run(inputs)
                    .await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            tracing::error!(%error, "delivery thread failed to poll its sockets; the process stops");
        }
    };
    let run = tasks.watch("delivery thread", &stop, run);
    // A task, because waking what `block_on` itself runs costs a system call, on the same thread too.
    let running = runtime.spawn(run);
    let thread = thread::Builder::new().name("delivery".into());
    thread.spawn(move || runtime.block_on(running)).context("cannot start the delivery thread")?;
    Ok(handle)
}

struct Engine {
    hub: Hub,
    sockets: Sockets,
    backfill: Backfill,
    desired: DesiredSubscriptions,
    presence: PresenceChanges,
    rights: Rights,
    telemetry: Telemetry,
    started: Instant,
    /// Signalled when the drain is over.
    draining: Option<oneshot::Sender<()>>,
    /// Emptied effects.
    batch: Vec<Effect>,
}

impl Engine {
    fn new(
        settings: Delivery,
        sockets: Sockets,
        backfill: Backfill,
        rights: Rights,
        desired: DesiredSubscriptions,
        presence: PresenceChanges,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            hub: Hub::new(settings, SmallRng::from_rng(&mut rand::rng())),
            sockets,
            backfill,
            desired,
            presence,
            rights,
            telemetry: Telemetry::new(metrics),
            started: Instant::now(),
            draining: None,
            batch: Vec::new(),
        }
    }

    async fn run(mut self, mut inputs: Inputs) -> io::Result<()> {
        let mut updates = Vec::with_capacity(UPDATES_PER_TURN);
        let mut new_streams = Vec::with_capacity(ADMITTED_PER_TURN);
        let mut keys = self.rights.keys.subscribe();
        let mut timer = pin!(sleep_until(self.started.into()));
        loop {
            let due = (self.started + Duration::from_millis(self.hub.next_timer())).into();
            if timer.deadline() != due {
                timer.as_mut().reset(due);
            }
            tokio::select! {
                count = inputs.updates.recv_many(&mut updates, UPDATES_PER_TURN) => {
                    if count == 0 {
                        return Ok(());
                    }
                    self.update_clock();
                    updates.drain(..).for_each(|update| self.on_redis(update));
                }
                ready = self.sockets.ready() => {
                    self.update_clock();
                    ready?.for_each(|readiness| self.on_socket(readiness));
                }
                1.. = inputs.new_streams.recv_many(&mut new_streams, ADMITTED_PER_TURN) => {
                    self.update_clock();
                    new_streams.drain(..).for_each(|stream| self.admit(stream));
                }
                answers = self.backfill.next() => {
                    self.update_clock();
                    match answers {
                        Ok(answers) => self.on_answers(answers),
                        Err(BatchFailed) => self.drop_stale_requests(),
                    }
                }
                () = &mut timer => self.update_clock(),
                Ok(()) = keys.changed() => {
                    self.update_clock();
                    let trusted = keys.borrow_and_update().clone();
                    trusted.iter().for_each(|trusted| self.close_streams_of_removed_keys(trusted));
                }
                Some(command) = inputs.commands.recv() => {
                    self.update_clock();
                    self.on_command(command);
                }
            }
            self.hub.run_timers();
            self.carry_out_effects();
            self.telemetry.measure(&self.hub);
            if self.hub.is_drained(inputs.new_streams.is_empty()) {
                self.finish_drain();
                return Ok(());
            }
        }
    }

    fn update_clock(&mut self) {
        let wall = SystemTime::now();
        self.hub.set_time(self.started.elapsed().as_millis() as Millis, wall);
        self.telemetry.wall = wall.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as i64;
    }

    fn on_redis(&mut self, update: RedisUpdate) {
        match update {
            RedisUpdate::Event(user, event) => self.hub.event(user, event),
            RedisUpdate::Ephemeral(user, event) => self.hub.ephemeral(user, &event),
            RedisUpdate::SessionEnded(user, session) => self.hub.close_session(user, session),
            RedisUpdate::Subscribed(on, users) => self.hub.subscribed(on, users),
            RedisUpdate::Moved(from, users) => self.hub.unsubscribed(from, users),
            RedisUpdate::Disconnected(from) => self.hub.disconnected(from),
            RedisUpdate::Degraded(degraded) => {
                self.hub.set_redis_degraded(degraded);
                self.telemetry.metrics.redis_degraded.set(i64::from(degraded));
            }
            RedisUpdate::Uncertain(user) => self.hub.mark_uncertain(user),
            RedisUpdate::Dropped => self.hub.mark_all_uncertain(),
        }
        self.carry_out_effects();
    }

    fn on_socket(&mut self, SocketEvent { key, error, readable, writable }: SocketEvent) {
        if error {
            let reason = self.sockets.take_error(key);
            self.hub.remove(key, reason);
            return self.carry_out_effects();
        }
        if readable {
            match self.sockets.discard_input(key) {
                sockets::Input::Discarded => {}
                sockets::Input::TooMuch => self.hub.unexpected_input(key),
                sockets::Input::Closed => self.hub.gone(key),
            }
        }
        if writable {
            self.hub.writable(key);
        }
        self.carry_out_effects();
    }

    fn admit(&mut self, stream: NewStream) {
        let NewStream {
            socket,
            user,
            session,
            key,
            resume,
            heartbeat,
            framing,
            head,
            ends,
            ends_why,
            permit,
        } = stream;
        let connection = match self.sockets.insert(socket, permit) {
            Ok(connection) => connection,
            Err(error) => {
                tracing::warn!(%error, user.id = %user, "stream handoff failed; the connection is closed");
                // It was not counted as opened, so it is not counted as closed.
                self.telemetry.metrics.streams_rejected.get_or_create(&Reason { reason: "error" }).inc();
                return;
            }
        };
        // After the HTTP check the session may have ended, and the key may have been removed.
        let ended = session.is_some_and(|session| self.rights.ended_sessions.contains(user, session));
        let revoked = ended || !self.rights.keys.accepts(key);
        let ends_at = ends.saturating_duration_since(self.started).as_millis() as Millis;
        self.telemetry.opened(user, connection, resume != Resume::Head);
        let new = NewConnection {
            user,
            session,
            signed_by: key,
            resume,
            heartbeat,
            framing,
            head,
            ends_at,
            ends_why,
        };
        self.hub.open(connection, new, revoked.then_some(Goodbye::Revoked));
        self.carry_out_effects();
    }

    fn on_answers(&mut self, answers: Answers) {
        match answers {
            Answers::Ranges(answers) => {
                for (request, answer) in answers {
                    self.hub.range(request, answer);
                    self.carry_out_effects();
                }
            }
            Answers::Heads(HeadsAnswered { requests, heads, ended, keys }) => {
                self.rights.keys.notice_version(&keys);
                for request in requests {
                    let ended = request.login().is_some_and(|login| ended.contains(&login));
                    self.hub.head(request, heads.get(&request.user).copied(), ended);
                    self.carry_out_effects();
                }
            }
        }
    }

    /// Closes the streams whose token was signed by a key that is no longer trusted.
    fn close_streams_of_removed_keys(&mut self, trusted: &TrustedKeys) {
        let streams =
            self.hub.close_all(Goodbye::Revoked, |connection| !trusted.accepts(connection.signed_by));
        if streams > 0 {
            tracing::warn!(streams, "public key removed; closing the streams that it opened");
        }
    }

    fn on_command(&mut self, command: EngineCommand) {
        match command {
            EngineCommand::Drain { window, done } => {
                let streams = self.hub.connections();
                tracing::info!(streams, ?window, "drain: closing all streams at a steady rate");
                self.hub.begin_drain(window);
                self.draining = Some(done);
            }
            EngineCommand::Explain { user, seq, answer } => {
                let closed = &self.telemetry.closed_streams;
                let _ = answer.send(self.hub.explain(user, seq, closed, self.backfill.failing()));
            }
        }
    }

    fn finish_drain(&mut self) {
        tracing::info!(cut = self.hub.connections(), "drain: finished; remaining streams are cut");
        if let Some(done) = self.draining.take() {
            let _ = done.send(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, net::Ipv4Addr, os::fd::OwnedFd};

    use protocol::channels::Channels;
    use service_kit::{
        limiter::{self, Limit, Limiter, Subject},
        redis_topology::RedisTopology,
        secrets::Secrets,
    };

    use super::*;
    use crate::{
        config::{Admission, Opening},
        limits::StreamLimits,
    };

    #[tokio::test]
    async fn admission_that_fails_early_is_neither_opened_nor_ended() {
        let second = Duration::from_secs(1);
        let metrics = Arc::new(Metrics::default());
        let api = ApiClient::new("http://127.0.0.1:9", Secrets::random(), metrics.clone());
        let settings = Delivery {
            heartbeat: second,
            reconcile: second,
            degraded_reconcile: second,
            write_deadline: second,
            streams_per_user: 1,
            replay_buffer_bytes: 1,
        };
        let mut engine = Engine::new(
            settings,
            Sockets::new(Poll::new().unwrap()).unwrap(),
            Backfill::new(api.clone(), Handle::current(), Tracer::default(), metrics.clone()),
            Rights {
                keys: Arc::new(Keys::new("http://localhost", api, metrics.clone())),
                ended_sessions: EndedSessions::default(),
            },
            DesiredSubscriptions::new(Channels::default()),
            PresenceChanges::default(),
            metrics.clone(),
        );
        let topology = RedisTopology::single("redis://localhost").unwrap();
        let of_limiter = limiter::LimiterMetrics::default();
        let (limiter, _task) = Limiter::new(topology, Channels::default(), second, of_limiter);
        let admission = Admission { streams: 1, streams_per_address: 0, rate: 1, max_age: second };
        let opening = Opening { per_user: Limit::Off, per_address: Limit::Off, patience: second };
        let limits = StreamLimits::new(&admission, &opening, limiter);
        let permit = limits.admit(Subject::User(UserId(1)), Ipv4Addr::LOCALHOST.into()).await;

        engine.admit(NewStream {
            // A file that no epoll can watch.
            socket: OwnedFd::from(File::open("/dev/null").unwrap()).into(),
            user: UserId(1),
            session: None,
            key: KeyName([0; 8]),
            resume: Resume::Head,
            heartbeat: Heartbeat::default(),
            framing: Framing::Close,
            head: Bytes::new(),
            ends: Instant::now() + second,
            ends_why: Goodbye::Rotate,
            permit: permit.ok().unwrap(),
        });
        engine.carry_out_effects();
        let ended = metrics.streams_closed.get_or_create(&Reason { reason: "error" }).get();
        assert_eq!((metrics.streams_opened.get(), ended, metrics.streams.get()), (0, 0, 0));
        assert_eq!(metrics.streams_rejected.get_or_create(&Reason { reason: "error" }).get(), 1);
    }
}
