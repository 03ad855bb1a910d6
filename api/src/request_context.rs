//! The data that a request carries through the layers: its id, its trace and, once known, its caller.

use std::sync::{Arc, OnceLock};

use protocol::ids::UserId;
use service_kit::traces::TraceContext;

/// Clones share the caller.
#[derive(Debug, Clone)]
pub struct RequestContext {
    pub request_id: String,
    pub trace: Option<TraceContext>,
    caller: Arc<OnceLock<UserId>>,
}

impl RequestContext {
    pub fn new(request_id: String, trace: Option<TraceContext>) -> Self {
        Self { request_id, trace, caller: Arc::default() }
    }

    /// From now on the request's log lines and its span carry `user.id`.
    pub fn note_caller(&self, user: UserId) {
        if self.caller.set(user).is_ok() {
            tracing::Span::current().record("user.id", tracing::field::display(user));
        }
    }

    /// From now on the request's log lines carry the name of the service token.
    pub fn note_service(&self, name: &str) {
        tracing::Span::current().record("service", name);
    }

    pub fn caller(&self) -> Option<UserId> {
        self.caller.get().copied()
    }

    pub fn traceparent(&self) -> Option<String> {
        self.trace.map(|trace| trace.to_string())
    }
}
