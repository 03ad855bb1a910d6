//! The metrics of listeners, by the listener's name.

use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge};

use crate::{labels, metrics};

labels!(ListenerLabels { listener });
labels!(ClosedLabels { listener, reason });

metrics! {
    pub struct ServerMetrics {
        http_connections: Family<ListenerLabels, Gauge> = "HTTP connections open, without streams";
        http_connections_closed: Family<ClosedLabels, Counter> = "HTTP connections that the server closed, by reason";
        http_malformed_requests: Family<ClosedLabels, Counter> =
            "Requests answered with 400 before routing, by the part that is invalid";
        http_handler_panics: Family<ListenerLabels, Counter> = "Requests answered with 500 because their handler panicked";
    }
}

impl ServerMetrics {
    pub fn listener(&self, name: &'static str) -> ListenerMetrics {
        // So that a first panic is an increase.
        self.http_handler_panics.get_or_create(&ListenerLabels { listener: name }).inc_by(0);
        ListenerMetrics { metrics: self.clone(), name }
    }
}

#[derive(Clone)]
pub struct ListenerMetrics {
    metrics: ServerMetrics,
    pub(super) name: &'static str,
}

impl ListenerMetrics {
    pub(super) fn connections(&self) -> Gauge {
        self.metrics.http_connections.get_or_create_owned(&ListenerLabels { listener: self.name })
    }

    pub(super) fn closed(&self, reason: &'static str) {
        self.metrics
            .http_connections_closed
            .get_or_create(&ClosedLabels { listener: self.name, reason })
            .inc();
    }

    pub(super) fn malformed(&self, reason: &'static str) {
        self.metrics
            .http_malformed_requests
            .get_or_create(&ClosedLabels { listener: self.name, reason })
            .inc();
    }

    pub(super) fn panicked(&self) {
        self.metrics.http_handler_panics.get_or_create(&ListenerLabels { listener: self.name }).inc();
    }
}
