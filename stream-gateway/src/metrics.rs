//! Every metric of the gateway, named and explained here, counted where things happen.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};
use service_kit::{limiter, process_metrics, server, traces};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Reason {
    pub reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Path {
    pub path: &'static str,
}

/// By which way an event came here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Redis,
    /// From the feed, because Redis did not bring it.
    Repair,
    /// From the feed, for a stream that has missed it.
    Replay,
}

impl Way {
    /// In the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Redis, Self::Repair, Self::Replay];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Repair => "repair",
            Self::Replay => "replay",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Question {
    pub question: &'static str,
}

pub struct Metrics {
    pub streams: Gauge,
    pub most_streams: Gauge,
    pub streams_opened: Counter,
    pub streams_refused: Family<Reason, Counter>,
    pub streams_ended: Family<Reason, Counter>,
    pub requests_rejected: Family<Reason, Counter>,
    pub events_delivered: Family<Path, Counter>,
    pub delivery_lag_seconds: Family<Path, Histogram>,
    pub readers_behind: Gauge,
    pub readers_fell_behind: Counter,
    pub backlog_bytes: Gauge,
    pub most_backlog_bytes: Gauge,
    pub resyncs: Family<Reason, Counter>,
    pub users: Gauge,
    pub questions: Family<Question, Counter>,
    pub questions_failed: Family<Question, Counter>,
    pub api_unauthorized: Counter,
    pub gaps: Counter,
    pub reconcile_found: Counter,
    pub redis_up: Gauge,
    pub redis_suspect: Gauge,
    pub redis_connects: Counter,
    pub redis_probe_connects: Counter,
    pub redis_overflows: Counter,
    pub redis_bad_messages: Counter,
    pub subscriptions_wanted: Gauge,
    pub subscriptions: Gauge,
    pub keys: Gauge,
    pub http: server::Metrics,
    pub limits: limiter::Metrics,
    pub traces: traces::Metrics,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        process_metrics::register(registry, "stream-gateway", env!("CARGO_PKG_VERSION"));
        let registry = registry.sub_registry_with_prefix("gateway");
        let lag = || Histogram::new(exponential_buckets(0.0005, 2.0, 18));
        let metrics = Self {
            streams: Gauge::default(),
            most_streams: Gauge::default(),
            streams_opened: Counter::default(),
            streams_refused: Family::default(),
            streams_ended: Family::default(),
            requests_rejected: Family::default(),
            events_delivered: Family::default(),
            delivery_lag_seconds: Family::new_with_constructor(lag),
            readers_behind: Gauge::default(),
            readers_fell_behind: Counter::default(),
            backlog_bytes: Gauge::default(),
            most_backlog_bytes: Gauge::default(),
            resyncs: Family::default(),
            users: Gauge::default(),
            questions: Family::default(),
            questions_failed: Family::default(),
            api_unauthorized: Counter::default(),
            gaps: Counter::default(),
            reconcile_found: Counter::default(),
            redis_up: Gauge::default(),
            redis_suspect: Gauge::default(),
            redis_connects: Counter::default(),
            redis_probe_connects: Counter::default(),
            redis_overflows: Counter::default(),
            redis_bad_messages: Counter::default(),
            subscriptions_wanted: Gauge::default(),
            subscriptions: Gauge::default(),
            keys: Gauge::default(),
            http: server::Metrics::register(registry),
            limits: limiter::Metrics::register(registry),
            traces: traces::Metrics::register(registry),
        };
        metrics.redis_suspect.set(1); // Until the engine hears otherwise.
        let m = &metrics;
        registry.register("streams", "Streams that are open", m.streams.clone());
        registry.register("most_streams", "Streams that are allowed (MAX_STREAMS)", m.most_streams.clone());
        registry.register("streams_opened", "Streams that were opened", m.streams_opened.clone());
        registry.register(
            "streams_refused",
            "Streams told to come back later, by limit",
            m.streams_refused.clone(),
        );
        registry.register("streams_ended", "Streams that ended, by reason", m.streams_ended.clone());
        registry.register(
            "requests_rejected",
            "Stream requests answered with an error, by code",
            m.requests_rejected.clone(),
        );
        registry.register(
            "events_delivered",
            "Events written to a socket, by the way they came",
            m.events_delivered.clone(),
        );
        registry.register_with_unit(
            "delivery_lag",
            "From the event's making to its write to a socket",
            Unit::Seconds,
            m.delivery_lag_seconds.clone(),
        );
        registry.register(
            "readers_behind",
            "Streams whose socket takes no more at present",
            m.readers_behind.clone(),
        );
        registry.register(
            "readers_fell_behind",
            "Times a socket took no more",
            m.readers_fell_behind.clone(),
        );
        registry.register_with_unit(
            "backlog",
            "Events kept for readers that are behind",
            Unit::Bytes,
            m.backlog_bytes.clone(),
        );
        registry.register_with_unit(
            "most_backlog",
            "Of these, as many as are allowed (BACKLOG_BYTES)",
            Unit::Bytes,
            m.most_backlog_bytes.clone(),
        );
        registry.register("resyncs", "Streams told to reload, by reason", m.resyncs.clone());
        registry.register("users", "Users with a stream, or just without one", m.users.clone());
        registry.register("questions", "Users asked about at api, by question", m.questions.clone());
        registry.register(
            "questions_failed",
            "Questions that api did not answer, by question",
            m.questions_failed.clone(),
        );
        registry.register(
            "api_unauthorized",
            "Requests that api answered by 401: it does not accept that secret of INTERNAL_SECRET",
            m.api_unauthorized.clone(),
        );
        registry.register(
            "gaps",
            "Holes and other doubts in a feed's order that had to be asked about",
            m.gaps.clone(),
        );
        registry.register(
            "reconcile_found",
            "Feeds that a reconcile found beyond what Redis had brought",
            m.reconcile_found.clone(),
        );
        registry.register("redis_up", "1 while connected to Redis", m.redis_up.clone());
        registry.register(
            "redis_suspect",
            "1 while Redis is not trusted to bring events",
            m.redis_suspect.clone(),
        );
        registry.register("redis_connects", "Connections made to Redis", m.redis_connects.clone());
        registry.register(
            "redis_probe_connects",
            "Connections made to Redis to publish health probes",
            m.redis_probe_connects.clone(),
        );
        registry.register(
            "redis_overflows",
            "Messages from Redis that found the queue full; a reconcile brings the events",
            m.redis_overflows.clone(),
        );
        registry.register(
            "redis_bad_messages",
            "Messages from Redis of no known form",
            m.redis_bad_messages.clone(),
        );
        registry.register(
            "subscriptions_wanted",
            "Channels that should be subscribed to",
            m.subscriptions_wanted.clone(),
        );
        registry.register("subscriptions", "Channels confirmed by Redis", m.subscriptions.clone());
        registry.register("keys", "Public keys that tokens are checked with", m.keys.clone());
        metrics
    }

    pub fn ended(&self, reason: &'static str) {
        self.streams_ended.get_or_create(&Reason { reason }).inc();
    }
}
