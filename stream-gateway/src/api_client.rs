//! The HTTP client of `api`'s internal listener.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use protocol::feed;
use serde::{Serialize, de::DeserializeOwned};
use service_kit::{
    outbound::{Outbound, OutboundLimits},
    secrets::Secrets,
};
use tokio::time::{Instant, timeout};

use crate::metrics::Metrics;

/// As many as there are backfill requests in flight.
const IDLE_CONNECTIONS: usize = 6;
const TIMEOUT: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Requests of all kinds in flight, those for keys and identities included.
const IN_FLIGHT: usize = 64;
/// Bytes: an answer has about 4,000 events of at most about 4 KiB.
const MAX_ANSWER: usize = 32 << 20;
/// During a rotation every request may be rejected first.
const REJECTIONS_LOGGED_EVERY: Duration = Duration::from_mins(1);

#[derive(Clone)]
pub struct ApiClient {
    outbound: Outbound,
    base: String,
    secrets: Secrets,
    rejections: Arc<Mutex<Rejections>>,
    metrics: Arc<Metrics>,
}

fn outbound(idle: usize) -> Outbound {
    Outbound::plaintext(OutboundLimits {
        time: TIMEOUT,
        connect: CONNECT_TIMEOUT,
        body: MAX_ANSWER,
        in_flight: IN_FLIGHT,
        idle,
    })
}

/// Whether `api` rejects every secret, and when that was logged.
#[derive(Default)]
struct Rejections {
    now: bool,
    logged: Option<Instant>,
}

impl ApiClient {
    pub fn new(base: &str, secrets: Secrets, metrics: Arc<Metrics>) -> Self {
        let outbound = outbound(IDLE_CONNECTIONS);
        Self { outbound, base: base.into(), secrets, rejections: Arc::default(), metrics }
    }

    /// The same with a new connection for each request, so that any replica may answer.
    pub fn on_any_replica(&self) -> Self {
        Self { outbound: outbound(0), ..self.clone() }
    }

    pub async fn get<A: DeserializeOwned>(&self, path: &str) -> anyhow::Result<A> {
        self.send(Method::GET, path, Bytes::new()).await
    }

    pub async fn post<A: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<A> {
        self.send(Method::POST, path, serde_json::to_vec(body)?.into()).await
    }

    async fn send<A: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<A> {
        let authorized = self.authorized(method, path, body);
        let response = timeout(TIMEOUT, authorized).await.context("api did not answer in time")??;
        let status = response.status();
        anyhow::ensure!(status == StatusCode::OK, "api answered {status} for {path}");
        serde_json::from_slice(response.body()).context("api's answer cannot be parsed")
    }

    /// Tries each secret: during a rotation `api` may not accept the first one yet, or any more.
    async fn authorized(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<Response<Bytes>> {
        for secret in self.secrets.iter() {
            let request = Request::builder()
                .method(&method)
                .uri(format!("{}{path}", self.base))
                .header(header::AUTHORIZATION, feed::authorization(secret))
                .header(header::CONTENT_TYPE, "application/json")
                .body(body.clone())?;
            let response = self.outbound.send(request).await.context("api is unreachable")?;
            if response.status() != StatusCode::UNAUTHORIZED {
                self.note_rejected(false);
                return Ok(response);
            }
            self.metrics.api_unauthorized.inc();
            self.note_rejected(true);
        }
        anyhow::bail!("api rejects every secret in INTERNAL_SECRET (401 for {path})")
    }

    fn note_rejected(&self, rejected: bool) {
        let mut state = self.rejections.lock().unwrap_or_else(PoisonError::into_inner);
        state.now = rejected;
        if rejected && state.logged.is_none_or(|logged| logged.elapsed() > REJECTIONS_LOGGED_EVERY) {
            state.logged = Some(Instant::now());
            tracing::error!(
                secrets = self.secrets.iter().count(),
                "api rejected a secret in INTERNAL_SECRET; the next one is tried; compare the setting of both services"
            );
        }
    }

    /// Whether `api` rejected all secrets in the last request.
    pub fn rejects_secrets(&self) -> bool {
        self.rejections.lock().unwrap_or_else(PoisonError::into_inner).now
    }
}
