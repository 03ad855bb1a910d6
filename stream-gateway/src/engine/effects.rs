//! Carries out the core's effects, and counts and logs them.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::Arc,
};

use bytes::Bytes;
use prometheus_client::metrics::{counter::Counter, histogram::Histogram};
use protocol::ids::UserId;

use super::Engine;
use crate::{
    core::{ClosedStream, ClosedStreams, ConnectionKey, Effect, HeadReason, Hub, Observation, WrittenEvent},
    metrics::{DeliveryPath, Metrics, Path, Reason},
    trace::Flush,
};

/// Emptied lists of effects keep memory for as many.
const KEPT_EFFECTS: usize = 1_024;

impl Engine {
    pub(super) fn carry_out_effects(&mut self) {
        let mut batch = std::mem::take(&mut self.batch);
        while self.hub.swap_effects(&mut batch) {
            batch.drain(..).for_each(|effect| self.carry_out(effect));
            batch.shrink_to(KEPT_EFFECTS);
        }
        self.batch = batch;
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Write { to, bytes, event } => self.write(to, bytes, event),
            Effect::FinishWriting(key) => self.sockets.finish_writing(key),
            Effect::Close(key, stream) => {
                self.sockets.remove(key);
                self.telemetry.closed(key, *stream);
            }
            Effect::RequestRange(request) => self.backfill.request_range(request),
            Effect::RequestHead(request) => self.backfill.request_head(request),
            Effect::Subscribe(user) => self.desired.add(user),
            Effect::Unsubscribe(user) => self.desired.remove(user),
            Effect::Presence(user, is_present) => self.presence.note(user, is_present),
            Effect::SessionEnded(user, session) => self.rights.ended_sessions.note(user, session),
            Effect::Observed(observation) => self.telemetry.observe(observation),
        }
    }

    /// While `api` does not answer, requests of closed streams must not pile up.
    pub(super) fn drop_stale_requests(&mut self) {
        let (hub, mut subscribed) = (&mut self.hub, HashSet::new());
        self.backfill.retain_ranges(|request| hub.wants_range(request));
        self.backfill.retain_heads(|request| {
            // One is enough.
            let repeated = request.why == HeadReason::Subscribed && !subscribed.insert(request.user);
            hub.wants_head(request) && !repeated
        });
    }

    fn write(&mut self, to: ConnectionKey, mut bytes: Bytes, event: Option<WrittenEvent>) {
        if let Some(event) = event {
            self.telemetry.begin_event(to, event);
        }
        match self.sockets.write(to, &mut bytes) {
            Ok(()) => {
                if bytes.is_empty() && !self.telemetry.flushes.is_empty() {
                    self.telemetry.flushes.remove(&to);
                }
                self.hub.wrote(to, bytes);
            }
            Err(error) => self.hub.remove(to, why_broken(&error)),
        }
    }
}

/// `TimedOut`: the client acknowledged nothing for the write deadline (`TCP_USER_TIMEOUT`).
pub fn why_broken(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::TimedOut { "slow_consumer" } else { "client" }
}

pub struct Telemetry {
    pub metrics: Arc<Metrics>,
    /// Milliseconds since 1970 at the current input.
    pub wall: i64,
    paths: [PathMetrics; 3],
    /// Recorded flushes in progress. Each ends when the socket has taken everything.
    flushes: HashMap<ConnectionKey, Flush>,
    pub closed_streams: ClosedStreams,
}

struct PathMetrics {
    counter: Counter,
    lag: Histogram,
}

impl Telemetry {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        let paths = DeliveryPath::ALL.map(|path| {
            let path = path.as_str();
            PathMetrics {
                counter: metrics.events_delivered.get_or_create_owned(&Path { path }),
                lag: metrics.delivery_lag_seconds.get_or_create_owned(&Path { path }),
            }
        });
        Self { metrics, wall: 0, paths, flushes: HashMap::new(), closed_streams: ClosedStreams::default() }
    }

    pub fn opened(&self, user: UserId, connection: ConnectionKey, resumes: bool) {
        self.metrics.streams.inc();
        self.metrics.streams_opened.inc();
        tracing::debug!(user.id = %user, connection = connection.generation, resumes, "stream opened");
    }

    fn closed(&mut self, key: ConnectionKey, stream: ClosedStream) {
        let reason = stream.reason;
        if let Some(flush) = self.flushes.remove(&key) {
            flush.fail(reason);
        }
        self.metrics.streams.dec();
        self.metrics.closed(reason);
        tracing::debug!(user.id = %stream.user, connection = key.generation, reason, "stream closed");
        self.closed_streams.note(stream);
    }

    fn begin_event(&mut self, to: ConnectionKey, event: WrittenEvent) {
        let metrics = &self.paths[event.path as usize];
        metrics.counter.inc();
        metrics.lag.observe((self.wall - event.created_at).max(0) as f64 / 1_000.0);
        if let Some((trace, streams)) = event.trace
            && let Some(flush) = trace.flush(streams, to.generation)
        {
            self.flushes.insert(to, flush);
        }
    }

    pub fn measure(&self, hub: &Hub) {
        self.metrics.users.set(hub.users() as i64);
        self.metrics.replay_buffer_bytes.set(hub.backlog() as i64);
    }

    fn observe(&self, observation: Observation) {
        let metrics = &self.metrics;
        match observation {
            Observation::Blocked => {
                metrics.slow_consumers.inc();
                metrics.slow_consumer_episodes.inc();
            }
            Observation::Unblocked => _ = metrics.slow_consumers.dec(),
            Observation::PendingGap => _ = metrics.pending_gaps.inc(),
            Observation::RecoveredFeed => _ = metrics.reconcile_recovered_feeds.inc(),
            Observation::InvalidPosition { user, head, why } => {
                tracing::warn!(user.id = %user, event.seq = head.seq, reason = why.as_str(), "feed position is invalid; its streams must resync");
            }
            Observation::Ephemeral { delivered, dropped } => {
                metrics.ephemeral_events_delivered.inc_by(delivered.into());
                metrics.ephemeral_dropped("not_live").inc_by(dropped.into());
            }
            Observation::Resync { user, head, why } => {
                metrics.resyncs.get_or_create(&Reason { reason: why.as_str() }).inc();
                tracing::info!(user.id = %user, event.seq = head.seq, reason = why.as_str(), "stream must resync; its client reloads");
            }
        }
    }
}
