//! Around the routes of a listener: the client's address, the request's log span and trace, its log line and its metrics.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use http::{HeaderMap, Request};
use service_kit::{
    client_address::{ClientAddress, TrustedProxies},
    http::request_id,
    server::PeerAddr,
    traces::{SpanKind, TraceContext, Tracer},
};
use tower_service::Service;
use tracing::{Instrument, field::Empty};
use warp::reply::Response;

use super::{Label, error::RequestFailure};
use crate::{
    metrics::{self, Metrics},
    request_context::RequestContext,
};

#[derive(Clone)]
pub struct ApiEdge<S> {
    routes: S,
    proxies: Arc<Proxies>,
    tracer: Tracer,
    metrics: Metrics,
}

/// Between two warnings about untrusted proxies.
const WARN_EVERY: Duration = Duration::from_hours(1);

struct Proxies {
    trusted: TrustedProxies,
    last_warning: Mutex<Option<Instant>>,
}

impl<S> ApiEdge<S> {
    pub fn new(routes: S, trusted: TrustedProxies, tracer: Tracer, metrics: Metrics) -> Self {
        let proxies = Arc::new(Proxies { trusted, last_warning: Mutex::default() });
        Self { routes, proxies, tracer, metrics }
    }
}

impl Proxies {
    fn client(&self, peer: SocketAddr, headers: &HeaderMap) -> IpAddr {
        if self.trusted.is_from_untrusted_proxy(peer.ip(), headers) && self.must_warn(Instant::now()) {
            tracing::warn!(
                peer = %peer.ip(),
                "untrusted peer sends X-Forwarded-For; if it is the ingress, add it to TRUSTED_PROXIES: until then all its \
                 clients count as one"
            );
        }
        self.trusted.client(peer.ip(), headers)
    }

    fn must_warn(&self, now: Instant) -> bool {
        let mut last = self.last_warning.lock().unwrap_or_else(PoisonError::into_inner);
        let must = last.is_none_or(|last| now.duration_since(last) >= WARN_EVERY);
        if must {
            *last = Some(now);
        }
        must
    }
}

impl<S, B> Service<Request<B>> for ApiEdge<S>
where
    S: Service<Request<B>, Response = Response, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.routes.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let began = Instant::now();
        let request_id = request_id(request.headers());
        let given = traceparent(request.headers());
        let mut traced = self.tracer.begin(given, "request", SpanKind::Server);
        let trace = traced.context().or_else(|| self.tracer.pass_on(given));
        let context = RequestContext::new(request_id.clone(), trace);
        let method = request.method().clone();
        let PeerAddr(peer) = *request.extensions().get().expect("the accept loop sets the peer's address");
        let client = self.proxies.client(peer, request.headers());
        // Without the query, which may hold a token.
        let path = request.uri().path();
        let span = tracing::info_span!(
            "request", request.id = %request_id, %client, %method, path, user.id = Empty, service = Empty, trace.id = Empty
        );
        if let Some(trace) = traced.context() {
            span.record("trace.id", trace.trace_id());
        }
        request.extensions_mut().insert(context.clone());
        request.extensions_mut().insert(ClientAddress(client));
        let answer = span.in_scope(|| self.routes.call(request));
        let metrics = self.metrics.clone();
        let work = async move {
            let Ok(mut response) = answer.await;
            let route = response.extensions().get::<Label>().map_or("none", |label| label.0);
            let (status, took) = (response.status().as_u16(), began.elapsed());
            metrics.answered(route, &method, status, took);
            let known = metrics::known(&method);
            traced.rename(format_args!("{known} {route}"));
            traced.text("http.request.method", known);
            traced.text("http.route", route);
            traced.number("http.response.status_code", status.into());
            traced.text("request.id", &request_id);
            if let Some(user) = context.caller() {
                traced.text("user.id", user);
            }
            if status >= 500 {
                traced.fail(status);
            }
            if let Some(fault) = response.extensions_mut().remove::<RequestFailure>() {
                fault.log();
            }
            tracing::debug!(route, status, took_ms = took.as_secs_f64() * 1e3, "request answered");
            Ok(response)
        };
        Box::pin(work.instrument(span))
    }
}

fn traceparent(headers: &HeaderMap) -> Option<TraceContext> {
    headers.get("traceparent")?.to_str().ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_untrusted_proxy_is_warned_of_hourly_at_most() {
        let proxies = Proxies { trusted: TrustedProxies::default(), last_warning: Mutex::default() };
        let began = Instant::now();
        let warned = [0, 1, 59, 60, 61, 119, 120]
            .map(|minutes| proxies.must_warn(began + Duration::from_mins(minutes)));
        assert_eq!(warned, [true, false, false, true, false, false, true]);
    }
}
