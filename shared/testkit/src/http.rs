//! A plain HTTP client: status, headers and body as received.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Request, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::Serialize;
use serde_json::Value;
use service_kit::server::{self, Limits, ServerMetrics};
use tokio_util::sync::{CancellationToken, DropGuard};
use warp::filters::BoxedFilter;

const BODY_LIMIT: usize = 32 << 20;
const TIME_LIMIT: Duration = Duration::from_secs(30);

/// Keeps connections open between requests, as real clients do.
#[derive(Clone)]
pub struct Client {
    inner: legacy::Client<HttpConnector, Full<Bytes>>,
    witness: Option<Witness>,
}

pub type Witness = Arc<dyn Fn(&str, &Uri, &Answer) + Send + Sync>;

pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// There was no complete answer.
#[derive(Debug)]
pub struct HttpFailure(pub String);

/// Serves these routes at a free port of loopback until the guard is dropped.
pub fn serve<R: warp::Reply + 'static>(routes: BoxedFilter<(R,)>) -> (SocketAddr, DropGuard) {
    let listener = server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port of loopback");
    let address = listener.local_addr().expect("it is bound");
    let stop = CancellationToken::new();
    let limits = Limits { stop: Duration::ZERO, ..Limits::default() };
    let metrics = ServerMetrics::default().listener("test");
    tokio::spawn(server::serve(listener, warp::service(routes), limits, metrics, stop.clone()));
    (address, stop.drop_guard())
}

impl Default for Client {
    fn default() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Self { inner: legacy::Client::builder(TokioExecutor::new()).build(connector), witness: None }
    }
}

impl Client {
    pub fn witnessed(self, witness: Witness) -> Self {
        Self { witness: Some(witness), ..self }
    }

    pub fn get(&self, url: impl AsRef<str>) -> Call {
        self.call("GET", url)
    }

    pub fn post(&self, url: impl AsRef<str>) -> Call {
        self.call("POST", url)
    }

    pub fn call(&self, method: &str, url: impl AsRef<str>) -> Call {
        let request = Request::builder().method(method).uri(url.as_ref());
        Call { client: self.clone(), request, body: Bytes::new() }
    }
}

pub struct Call {
    client: Client,
    request: http::request::Builder,
    body: Bytes,
}

impl Call {
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.request = self.request.header(name, value);
        self
    }

    pub fn bearer(self, token: &str) -> Self {
        self.header("authorization", &format!("Bearer {token}"))
    }

    pub fn json(mut self, body: &impl Serialize) -> Self {
        self.body = serde_json::to_vec(body).expect("the test's own value is JSON").into();
        self.header("content-type", "application/json")
    }

    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    pub async fn send(self) -> Result<Answer, HttpFailure> {
        let request = self.request.body(Full::new(self.body)).expect("the test's own request is well-formed");
        let (method, address) = (request.method().to_string(), request.uri().clone());
        let answer = async {
            let response =
                self.client.inner.request(request).await.map_err(|e| HttpFailure(format!("{e:?}")))?;
            let (head, body) = response.into_parts();
            let body =
                Limited::new(body, BODY_LIMIT).collect().await.map_err(|e| HttpFailure(e.to_string()))?;
            Ok(Answer { status: head.status.as_u16(), headers: head.headers, body: body.to_bytes() })
        };
        let answer = tokio::time::timeout(TIME_LIMIT, answer)
            .await
            .unwrap_or_else(|_| Err(HttpFailure("no answer in time".into())))?;
        if let Some(witness) = &self.client.witness {
            witness(&method, &address, &answer);
        }
        Ok(answer)
    }

    pub async fn expect(self, status: u16) -> Answer {
        let answer = self.send().await.expect("an answer");
        assert_eq!(answer.status, status, "{}", answer.text());
        answer
    }
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {}", self.text()))
    }

    /// The sum over the series with this name and these labels on a page of metrics: `streams_total{path="redis"}`. `None`: there
    /// is no such series, as before the first event of its kind.
    pub fn metric(&self, series: &str) -> Option<f64> {
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let labels: Vec<_> = labels.trim_end_matches('}').split(',').collect();
        let is_one = |line: &&str| {
            let rest = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' ']));
            rest.is_some_and(|rest| labels.iter().all(|label| rest.contains(label)))
        };
        let text = self.text();
        let values = text.lines().filter(is_one).filter_map(|line| line.rsplit(' ').next()?.parse().ok());
        values.reduce(|sum: f64, value| sum + value)
    }

    /// `name=value` of the first cookie that the answer sets.
    pub fn cookie(&self) -> String {
        let set = self.header(header::SET_COOKIE.as_str()).expect("the answer sets a cookie");
        set.split(';').next().expect("split yields at least one part").to_owned()
    }
}
