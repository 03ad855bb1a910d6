//! The HTTP client of `api`'s internal listener.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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
/// Bytes: an answer has about 4 MiB, but a thousand ranges in one request may each have an event of 48 KiB.
const MAX_ANSWER: usize = 64 << 20;
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

#[derive(Default)]
struct Rejections {
    /// `api` rejected every secret of the last request.
    all: bool,
    /// When the rejection of one of several was logged last.
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
        let mut secrets = self.secrets.iter().peekable();
        while let Some(secret) = secrets.next() {
            let request = Request::builder()
                .method(&method)
                .uri(format!("{}{path}", self.base))
                .header(header::AUTHORIZATION, feed::authorization(secret))
                .header(header::CONTENT_TYPE, "application/json")
                .body(body.clone())?;
            let response = self.outbound.send(request).await.context("api is unreachable")?;
            if response.status() != StatusCode::UNAUTHORIZED {
                self.rejections().all = false;
                return Ok(response);
            }
            self.metrics.api_unauthorized.inc();
            if secrets.peek().is_some() {
                self.log_rejection();
            }
        }
        self.rejections().all = true;
        anyhow::bail!("api rejects every secret in INTERNAL_SECRET (401 for {path})")
    }

    fn log_rejection(&self) {
        let mut state = self.rejections();
        if state.logged.is_none_or(|logged| logged.elapsed() > REJECTIONS_LOGGED_EVERY) {
            state.logged = Some(Instant::now());
            tracing::error!(
                secrets = self.secrets.iter().count(),
                "api rejected a secret in INTERNAL_SECRET; trying the next one"
            );
        }
    }

    fn rejections(&self) -> MutexGuard<'_, Rejections> {
        self.rejections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `api` rejected all secrets in the last request.
    pub fn rejects_secrets(&self) -> bool {
        self.rejections().all
    }
}

#[cfg(test)]
pub mod tests {
    use serde_json::Value;
    use tokio::{
        io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    /// A server in place of `api`, and its client with two secrets.
    pub async fn listen() -> (TcpListener, ApiClient) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let secrets = Secrets::parse(&["1".repeat(32), "2".repeat(32)].join(",")).unwrap();
        (listener, ApiClient::new(&base, secrets, Arc::new(Metrics::of_service().0)))
    }

    async fn request(listener: &TcpListener) -> TcpStream {
        let mut socket = BufReader::new(listener.accept().await.unwrap().0);
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            assert!(socket.read_line(&mut line).await.unwrap() > 0);
        }
        socket.into_inner()
    }

    async fn answer(mut socket: TcpStream, status: &str, body: &str) {
        let head =
            format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        socket.write_all(&[head, body.to_owned()].concat().into_bytes()).await.unwrap();
    }

    #[tokio::test]
    async fn secrets_are_rejected_once_api_has_rejected_every_one() {
        let (listener, api) = listen().await;
        let reject = async || answer(request(&listener).await, "401 Unauthorized", "").await;
        let rotating = async {
            reject().await;
            let second = request(&listener).await;
            assert!(!api.rejects_secrets(), "the second one is not tried yet");
            answer(second, "200 OK", "{}").await;
        };
        let (answered, ()) = tokio::join!(api.get::<Value>("/keys"), rotating);
        answered.unwrap();
        assert!(!api.rejects_secrets());
        let different = async {
            reject().await;
            reject().await;
        };
        let (answered, ()) = tokio::join!(api.get::<Value>("/keys"), different);
        assert!(answered.unwrap_err().to_string().contains("every secret"));
        assert!(api.rejects_secrets());
    }
}
