//! Every metric of this service.

use std::{sync::Arc, time::Duration};

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

#[derive(Clone)]
pub struct Metrics {
    requests: Family<Request, Counter>,
    latency: Family<Route, Histogram, fn() -> Histogram>,
    pub published: Counter,
    pub publish_dropped: Family<Dropped, Counter>,
    pub redis_connected: Gauge,
    pub publish_queue: Gauge,
    pub pool_in_use: Gauge,
    pub pool_idle: Gauge,
    pub pool_most: Gauge,
    pub database_conflicts: Counter,
    pub feed_pruned: Counter,
    pub sessions_pruned: Counter,
    pub http: server::Metrics,
    pub limits: limiter::Metrics,
    pub traces: traces::Metrics,
    sign_ins: Family<SignIn, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    route: &'static str,
    method: &'static str,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Route {
    route: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Dropped {
    pub reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SignIn {
    provider: &'static str,
    outcome: &'static str,
}

impl Metrics {
    pub fn new() -> (Self, Arc<Registry>) {
        let latency: fn() -> Histogram = || Histogram::new(exponential_buckets(0.0005, 2.0, 15));
        let mut root = Registry::default();
        process_metrics::register(&mut root, "api", env!("CARGO_PKG_VERSION"));
        let registry = root.sub_registry_with_prefix("api");
        let metrics = Self {
            requests: Family::default(),
            latency: Family::new_with_constructor(latency),
            published: Counter::default(),
            publish_dropped: Family::default(),
            redis_connected: Gauge::default(),
            publish_queue: Gauge::default(),
            pool_in_use: Gauge::default(),
            pool_idle: Gauge::default(),
            pool_most: Gauge::default(),
            database_conflicts: Counter::default(),
            feed_pruned: Counter::default(),
            sessions_pruned: Counter::default(),
            http: server::Metrics::register(registry),
            limits: limiter::Metrics::register(registry),
            traces: traces::Metrics::register(registry),
            sign_ins: Family::default(),
        };
        registry.register("http_requests", "Answered requests", metrics.requests.clone());
        registry.register_with_unit(
            "http_request_duration",
            "From the whole request head to the answer",
            Unit::Seconds,
            metrics.latency.clone(),
        );
        registry.register("published_events", "Events that Redis took", metrics.published.clone());
        registry.register(
            "publish_dropped_events",
            "Events that were not published; gateways find them by reconciling",
            metrics.publish_dropped.clone(),
        );
        registry.register(
            "publish_queued_events",
            "Events that wait for Redis",
            metrics.publish_queue.clone(),
        );
        registry.register(
            "redis_connected",
            "1 while the publisher has a connection",
            metrics.redis_connected.clone(),
        );
        registry.register(
            "pool_used_connections",
            "Connections to Postgres in use",
            metrics.pool_in_use.clone(),
        );
        registry.register(
            "pool_idle_connections",
            "Connections to Postgres at rest",
            metrics.pool_idle.clone(),
        );
        registry.register(
            "pool_most_connections",
            "Connections to Postgres that are allowed (DATABASE_POOL_SIZE)",
            metrics.pool_most.clone(),
        );
        registry.register(
            "database_conflicts",
            "Statements that Postgres ended for a conflict with another transaction (40001, 40P01); each is repeated once",
            metrics.database_conflicts.clone(),
        );
        registry.register(
            "feed_pruned_events",
            "Events deleted at the old end of feeds",
            metrics.feed_pruned.clone(),
        );
        registry.register(
            "sessions_pruned",
            "Sessions deleted some days after they ended",
            metrics.sessions_pruned.clone(),
        );
        registry.register(
            "sign_ins",
            "Logins at a provider: begun, signed_in, or why not",
            metrics.sign_ins.clone(),
        );
        (metrics, Arc::new(root))
    }

    pub fn sign_in(&self, provider: &'static str, outcome: &'static str) {
        self.sign_ins.get_or_create(&SignIn { provider, outcome }).inc();
    }

    pub fn answered(&self, route: &'static str, method: &http::Method, status: u16, took: Duration) {
        self.requests.get_or_create(&Request { route, method: known(method), status }).inc();
        self.latency.get_or_create(&Route { route }).observe(took.as_secs_f64());
    }
}

/// Anybody can make up a method; a label has few values.
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
