//! HTTP requests to other servers: bounded in time, size and number. A redirect is returned as an answer and never followed, so
//! a request goes where a setting says and nowhere else; proxies of the environment are not used.

use std::{error::Error, io, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use reqwest::{Body, Client, redirect::Policy};
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use thiserror::Error;
use tokio::{sync::Semaphore, time::timeout};

const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy)]
pub struct OutboundLimits {
    /// Limits a request, from waiting for a permit to the last byte of the answer.
    pub time: Duration,
    pub connect: Duration,
    /// Limits an answer's body, in bytes.
    pub body: usize,
    /// Requests in flight. Further requests wait; the wait counts as part of their time.
    pub in_flight: usize,
    /// Idle connections to one server. Without any, each request has a connection of its own.
    pub idle: usize,
}

impl OutboundLimits {
    /// For small answers of external servers.
    pub const fn external(time: Duration) -> Self {
        Self { time, connect: Duration::from_secs(5), body: 1024 * 1024, in_flight: 64, idle: 4 }
    }
}

/// The cause of a missing answer. It repeats nothing of the request.
#[derive(Debug, Error)]
pub enum OutboundError {
    #[error("no answer in time")]
    Timeout,
    #[error("the answer is longer than {0} bytes")]
    TooLarge(usize),
    #[error("connection failed: {0}")]
    Connection(String),
}

#[derive(Debug, Clone)]
pub struct Outbound {
    client: Client,
    limits: OutboundLimits,
    permits: Arc<Semaphore>,
}

impl Outbound {
    /// Trusts the certificates of the system, or those of `SSL_CERT_FILE` and `SSL_CERT_DIR`. Fails if there are none.
    pub fn new(limits: OutboundLimits) -> io::Result<Self> {
        let found = rustls_native_certs::load_native_certs();
        let mut roots = RootCertStore::empty();
        if roots.add_parsable_certificates(found.certs).0 == 0 {
            let reason = found.errors.first().map_or_else(|| "none found".to_owned(), ToString::to_string);
            return Err(io::Error::new(io::ErrorKind::NotFound, reason));
        }
        Ok(Self::build(limits, roots))
    }

    /// For plain HTTP to servers of ours: no TLS server is trusted.
    pub fn plaintext(limits: OutboundLimits) -> Self {
        Self::build(limits, RootCertStore::empty())
    }

    fn build(limits: OutboundLimits, roots: RootCertStore) -> Self {
        let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("ring supports the default TLS versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let client = Client::builder()
            .use_preconfigured_tls(tls)
            .http1_only()
            .redirect(Policy::none())
            .no_proxy()
            .tcp_nodelay(true)
            .connect_timeout(limits.connect.min(limits.time))
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(limits.idle)
            .build()
            .expect("only TLS settings can fail, and ours are of the right type");
        Self { client, limits, permits: Arc::new(Semaphore::new(limits.in_flight)) }
    }

    pub async fn send<B: Into<Body>>(&self, request: Request<B>) -> Result<Response<Bytes>, OutboundError> {
        let answer = async {
            let _permit = self.permits.acquire().await.expect("the semaphore is never closed");
            let request =
                request.try_into().map_err(|error: reqwest::Error| connection(&error.without_url()))?;
            let response =
                self.client.execute(request).await.map_err(|error| connection(&error.without_url()))?;
            let (head, body) = Response::<Body>::from(response).into_parts();
            let body = Limited::new(body, self.limits.body).collect().await.map_err(|error| {
                if error.is::<LengthLimitError>() {
                    return OutboundError::TooLarge(self.limits.body);
                }
                match error.downcast::<reqwest::Error>() {
                    Ok(error) => connection(&error.without_url()),
                    Err(error) => connection(&*error),
                }
            })?;
            Ok(Response::from_parts(head, body.to_bytes()))
        };
        timeout(self.limits.time, answer).await.unwrap_or(Err(OutboundError::Timeout))
    }
}

/// With its causes, because the outer error alone says "error sending request".
fn connection(error: &(dyn Error + 'static)) -> OutboundError {
    let mut causes = vec![error.to_string()];
    let mut inner = error.source();
    while let Some(error) = inner {
        causes.push(error.to_string());
        inner = error.source();
    }
    OutboundError::Connection(causes.join(": "))
}
