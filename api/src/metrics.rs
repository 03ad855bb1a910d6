//! Every metric of api.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};
use service_kit::{labels, limiter, metrics, server, traces};

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: &'static str,
    method: &'static str,
    status: u16,
}

labels!(RouteLabels { route });
labels!(pub Dropped { reason });
labels!(pub Change { change });
labels!(LoginLabels { provider, outcome });

metrics! {
    pub struct Metrics {
        http_requests: Family<RequestLabels, Counter> = "HTTP requests answered";
        http_request_duration_seconds: Family<RouteLabels, Histogram> =
            "Time from the end of the request head until the response is ready",
            Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.0005, 2.0, 15)));
        provider_logins: Family<LoginLabels, Counter> =
            "Logins with an OAuth or OpenID Connect provider: started, succeeded, or the code of the failure";
        pub published_events: Counter = "Events that Redis accepted";
        pub publish_dropped_events: Family<Dropped, Counter> =
            "Events that were not published; gateways recover them by reconciling, by reason";
        pub published_ephemeral_events: Counter = "Ephemeral events, which are in no feed, that Redis accepted";
        pub publish_dropped_ephemeral_events: Family<Dropped, Counter> =
            "Ephemeral events that were not published and are lost, by reason";
        pub presence_changes: Family<Change, Counter> = "Users whose partners were told that they are online or offline";
        pub publish_queued_events: Gauge = "Events waiting for Redis";
        pub relay_active: Gauge = "1 while this replica relays what other back ends publish; one of all replicas does";
        pub relay_behind: Gauge = "1 while more staged events wait than one turn of the relay takes";
        pub relay_failures: Counter = "Turns of the relay that failed; each is repeated";
        pub relayed_events: Counter = "Events of other back ends appended to feeds, per receiver";
        pub redis_connected: Gauge = "1 while the publisher is connected to Redis";
        pub database_connections_used: Gauge = "Connections to Postgres in use";
        pub database_connections_idle: Gauge = "Connections to Postgres that are idle";
        pub database_connections_limit: Gauge = "Connections to Postgres that the pool may open (DATABASE_POOL_SIZE)";
        pub database_conflicts: Counter =
            "Transactions that Postgres aborted because of a conflict (40001, 40P01, P0002); each is retried once";
        pub pruned_events: Counter = "Events deleted because FEED_KEEP_DAYS or FEED_KEEP_EVENTS no longer covers them";
        pub expired_messages: Counter = "Messages whose text was removed because MESSAGE_KEEP_DAYS no longer covers them";
        pub emptied_group_messages: Counter = "Messages whose text was removed because their group has no members left";
        pub pruned_messages: Counter =
            "Rows of messages without text that were deleted because no feed refers to them any more";
        pub erased_users: Counter = "Users who were erased, with their messages";
        pub erased_messages: Counter = "Messages that were deleted because their sender was erased";
        pub pruned_sessions: Counter = "Sessions deleted some days after they ended";
        pub http: server::ServerMetrics;
        pub limits: limiter::LimiterMetrics;
        pub traces: traces::TraceMetrics;
    }
}

impl Metrics {
    pub fn of_service() -> (Self, Registry) {
        metrics::of_service("api", env!("CARGO_PKG_VERSION"), "messenger_api", Self::register)
    }

    pub fn login(&self, provider: &'static str, outcome: &'static str) {
        self.provider_logins.get_or_create(&LoginLabels { provider, outcome }).inc();
    }

    pub fn answered(&self, route: &'static str, method: &http::Method, status: u16, took: Duration) {
        self.http_requests.get_or_create(&RequestLabels { route, method: known(method), status }).inc();
        self.http_request_duration_seconds.get_or_create(&RouteLabels { route }).observe(took.as_secs_f64());
    }
}

/// Clients can send any method; a label must have few values.
pub fn known(method: &http::Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        "PATCH" => "PATCH",
        _ => "other",
    }
}
