//! Every metric of the gateway.

use prometheus_client::{
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};
use service_kit::{labels, limiter, metrics, server, traces};

/// Delivery path of an event to the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryPath {
    Redis,
    /// Read from the feed because Redis did not deliver it.
    Repair,
    /// Read from the feed for a stream that missed it.
    Replay,
}

impl DeliveryPath {
    /// In the order of their discriminants.
    pub const ALL: [Self; 3] = [Self::Redis, Self::Repair, Self::Replay];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Repair => "repair",
            Self::Replay => "replay",
        }
    }
}

labels!(pub Reason { reason });
labels!(pub Code { code });
labels!(pub Kind { kind });
labels!(pub Path { path });

metrics! {
    pub struct Metrics {
        pub streams: Gauge = "Open streams";
        pub streams_limit: Gauge = "Streams that this process accepts (MAX_STREAMS)";
        pub streams_opened: Counter = "Streams opened";
        pub streams_rejected: Family<Reason, Counter> =
            "Streams answered with goodbye because a limit is reached or something they need is missing, by reason";
        pub streams_closed: Family<Reason, Counter> = "Streams closed, by reason";
        pub stream_request_errors: Family<Code, Counter> = "Stream requests answered with an HTTP error, by code";
        pub events_delivered: Family<Path, Counter> = "Events written to sockets, by delivery path";
        pub ephemeral_events_delivered: Counter = "Ephemeral events, which are in no feed, written to sockets";
        pub ephemeral_events_dropped: Family<Reason, Counter> =
            "Ephemeral events dropped: for streams that were not live, because the delivery thread was behind, or invalid, by reason";
        pub delivery_lag_seconds: Family<Path, Histogram> =
            "Time from the commit of an event until it is written to a socket, by delivery path",
            Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.0005, 2.0, 18)));
        pub slow_consumers: Gauge = "Streams whose socket cannot take bytes now";
        pub slow_consumer_episodes: Counter = "Times that a socket stopped taking bytes";
        pub replay_buffer_bytes: Gauge = "Bytes of recent events kept for slow consumers";
        pub replay_buffer_limit_bytes: Gauge = "Bytes of recent events that may be kept (REPLAY_BUFFER_BYTES)";
        pub resyncs: Family<Reason, Counter> = "Resync events sent: the client reloads, by reason";
        pub users: Gauge = "Users with a stream now or a moment ago";
        pub backfill_requests: Family<Kind, Counter> =
            "Users whose feed or head was requested from api, by kind of request";
        pub backfill_requests_failed: Family<Kind, Counter> =
            "Users whose request to api failed and is retried, by kind of request";
        pub api_unauthorized: Counter = "Requests that api answered with 401: it rejects this INTERNAL_SECRET";
        pub pending_gaps: Counter = "Gaps and uncertain positions that had to be checked at api";
        pub reconcile_recovered_feeds: Counter = "Feeds for which a reconcile found events that Redis had not delivered";
        pub redis_connected: Gauge = "1 while the gateway is connected to Redis";
        pub redis_degraded: Gauge = "1 while Redis is not relied on and the gateway reconciles every second", degraded();
        pub redis_connections_opened: Counter = "Connections opened to Redis for subscriptions";
        pub redis_probe_connections_opened: Counter = "Connections opened to Redis for health probes";
        pub redis_dropped_messages: Counter =
            "Messages from Redis dropped because the delivery thread was a second behind; a reconcile recovers their events";
        pub redis_invalid_messages: Counter = "Messages from Redis that could not be parsed";
        pub desired_subscriptions: Gauge = "Channels that should be subscribed";
        pub actual_subscriptions: Gauge = "Channels whose subscription Redis has confirmed";
        pub presence_reports: Counter = "Reports of who came and who left that api has taken";
        pub presence_reports_failed: Counter = "Reports of who came and who left that failed and are repeated";
        pub public_keys: Gauge = "Public keys of api that tokens are verified with";
        pub http: server::ServerMetrics;
        pub limits: limiter::LimiterMetrics;
        pub traces: traces::TraceMetrics;
    }
}

/// Degraded until the first health probe has returned.
fn degraded() -> Gauge {
    let gauge = Gauge::default();
    gauge.set(1);
    gauge
}

impl Metrics {
    pub fn of_service() -> (Self, Registry) {
        metrics::of_service("stream-gateway", env!("CARGO_PKG_VERSION"), "messenger_gateway", Self::register)
    }

    pub fn ephemeral_dropped(&self, reason: &'static str) -> Counter {
        self.ephemeral_events_dropped.get_or_create_owned(&Reason { reason })
    }

    pub fn closed(&self, reason: &'static str) {
        self.streams_closed.get_or_create(&Reason { reason }).inc();
    }
}
