//! Questions to servers that are not ours: over TLS, within a time, up to a size, and so many at once. A redirect is an answer
//! like any other and is not followed, so a question goes where a setting says and nowhere else.

use std::{error::Error, io, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use thiserror::Error;
use tokio::{sync::Semaphore, time::timeout};

/// To get a connection, at most.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Of an answer's body.
const BODY_LIMIT: usize = 1024 * 1024;
/// Questions under way at once. More of them wait, as a part of their time.
const UNDER_WAY: usize = 64;
/// Connections kept open to one server, and for how long.
const KEPT: usize = 4;
const KEPT_FOR: Duration = Duration::from_secs(30);

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum NoAnswer {
    #[error("no answer in time")]
    TooSlow,
    #[error("the answer is longer than {BODY_LIMIT} bytes")]
    TooLarge,
    #[error("cannot be reached: {0}")]
    Unreachable(String),
}

#[derive(Clone)]
pub struct Outbound {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    time_limit: Duration,
    places: Arc<Semaphore>,
}

impl Outbound {
    /// Trusts whom the machine trusts; `SSL_CERT_FILE` and `SSL_CERT_DIR` name others. `time_limit` is for a whole question,
    /// from waiting for a place to the last byte of the answer.
    pub fn new(time_limit: Duration) -> io::Result<Self> {
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_connect_timeout(Some(CONNECT_TIMEOUT.min(time_limit)));
        let https = hyper_rustls::HttpsConnectorBuilder::new()
            .with_provider_and_native_roots(rustls::crypto::ring::default_provider())?
            .https_or_http()
            .enable_http1()
            .wrap_connector(http);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(KEPT_FOR)
            .pool_max_idle_per_host(KEPT)
            .build(https);
        Ok(Self { client, time_limit, places: Arc::new(Semaphore::new(UNDER_WAY)) })
    }

    pub async fn ask(&self, request: Request<Vec<u8>>) -> Result<Response<Vec<u8>>, NoAnswer> {
        let answer = async {
            let _place = self.places.acquire().await.expect("the semaphore is never closed");
            let request = request.map(|body| Full::new(Bytes::from(body)));
            let response = self.client.request(request).await.map_err(|error| unreachable(&error))?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, BODY_LIMIT).collect().await.map_err(|error| {
                if error.is::<LengthLimitError>() { NoAnswer::TooLarge } else { unreachable(&*error) }
            })?;
            Ok(Response::from_parts(head, body.to_bytes().into()))
        };
        timeout(self.time_limit, answer).await.unwrap_or(Err(NoAnswer::TooSlow))
    }
}

/// With its causes: the outer error alone says "client error". None of them repeats what was asked.
fn unreachable(error: &(dyn Error + 'static)) -> NoAnswer {
    let mut causes = vec![error.to_string()];
    let mut inner = error.source();
    while let Some(error) = inner {
        causes.push(error.to_string());
        inner = error.source();
    }
    NoAnswer::Unreachable(causes.join(": "))
}
