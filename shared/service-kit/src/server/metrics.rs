use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge};

use crate::{labels, metrics};

labels!(Name { listener });
labels!(Reason { listener, reason });

metrics! {
    /// Of all listeners of a service.
    pub struct Metrics {
        http_connections: Family<Name, Gauge> = "HTTP connections open, without streams";
        http_connections_closed: Family<Reason, Counter> = "HTTP connections that the server closed, by reason";
        http_malformed_requests: Family<Reason, Counter> =
            "Requests answered with 400 before routing, by the part that is invalid";
        http_handler_panics: Family<Name, Counter> = "Requests answered with 500 because their handler panicked";
    }
}

impl Metrics {
    /// For the listener of this name.
    pub fn listener(&self, name: &'static str) -> ListenerMetrics {
        // So that a first panic is an increase.
        self.http_handler_panics.get_or_create(&Name { listener: name }).inc_by(0);
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
        self.metrics.http_connections.get_or_create_owned(&Name { listener: self.name })
    }

    pub(super) fn closed(&self, reason: &'static str) {
        self.metrics.http_connections_closed.get_or_create(&Reason { listener: self.name, reason }).inc();
    }

    pub(super) fn malformed(&self, reason: &'static str) {
        self.metrics.http_malformed_requests.get_or_create(&Reason { listener: self.name, reason }).inc();
    }

    pub(super) fn panicked(&self) {
        self.metrics.http_handler_panics.get_or_create(&Name { listener: self.name }).inc();
    }
}
