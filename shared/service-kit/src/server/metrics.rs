//! What a listener counts.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// Of all listeners of one service.
#[derive(Clone, Default)]
pub struct Metrics {
    connections: Family<Name, Gauge>,
    cut: Family<Reason, Counter>,
    malformed: Family<Reason, Counter>,
    panics: Family<Name, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Name {
    listener: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    listener: &'static str,
    reason: &'static str,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "http_connections",
            "Connections inside HTTP, streams not included",
            metrics.connections.clone(),
        );
        registry.register(
            "http_connections_cut",
            "Connections that this side ended, by reason",
            metrics.cut.clone(),
        );
        registry.register(
            "http_requests_malformed",
            "Requests answered with 400 before any route, by what is wrong",
            metrics.malformed.clone(),
        );
        registry.register(
            "http_handler_panics",
            "Requests answered with 500 because their handler panicked",
            metrics.panics.clone(),
        );
        metrics
    }

    /// For the listener of this name.
    pub fn listener(&self, name: &'static str) -> ListenerMetrics {
        // So that a first panic is an increase.
        self.panics.get_or_create(&Name { listener: name }).inc_by(0);
        ListenerMetrics { metrics: self.clone(), name }
    }
}

#[derive(Clone)]
pub struct ListenerMetrics {
    metrics: Metrics,
    pub(super) name: &'static str,
}

impl ListenerMetrics {
    pub(super) fn connections(&self) -> Gauge {
        self.metrics.connections.get_or_create(&Name { listener: self.name }).clone()
    }

    pub(super) fn cut(&self, reason: &'static str) {
        self.metrics.cut.get_or_create(&Reason { listener: self.name, reason }).inc();
    }

    pub(super) fn malformed(&self, reason: &'static str) {
        self.metrics.malformed.get_or_create(&Reason { listener: self.name, reason }).inc();
    }

    pub(super) fn panicked(&self) {
        self.metrics.panics.get_or_create(&Name { listener: self.name }).inc();
    }
}
