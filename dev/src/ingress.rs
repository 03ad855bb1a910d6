//! The one address in front of everything, as an ingress gives it: exactly `/api/messages` to the gateways in turn,
//! all else to api. Bodies pass through as they come, and when one side closes, the other is closed immediately.
//!
//! Limits on what clients may send are the services' business, and are seen through it unchanged.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::header::{
    CONNECTION, CONTENT_TYPE, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, TRAILER, UPGRADE,
};
use hyper::header::{TE, TRANSFER_ENCODING};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, Uri, client, server};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::{secrets, terminal};

const STREAM_PATH: &str = "/api/messages";
/// Each may hold two sockets.
const MOST_CONNECTIONS: usize = 8_000;
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
const PORTS_TRIED: u16 = 100;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Headers of one connection (RFC 9110, section 7.6.1).
const HOP_BY_HOP: [HeaderName; 8] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
    // Answered here, when the upstream reads the body.
    EXPECT,
];

pub(crate) struct Routes {
    pub(crate) api: SocketAddr,
    pub(crate) gateways: Vec<SocketAddr>,
    turn: AtomicUsize,
}

impl Routes {
    pub(crate) fn new(api: SocketAddr, gateways: Vec<SocketAddr>) -> Self {
        Self { api, gateways, turn: AtomicUsize::new(0) }
    }

    /// The upstreams for a path in the order to try; each call for the stream starts with the next gateway.
    fn candidates(&self, path: &str) -> Vec<SocketAddr> {
        if path != STREAM_PATH {
            return vec![self.api];
        }
        let mut candidates = self.gateways.clone();
        if !candidates.is_empty() {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed) % candidates.len();
            candidates.rotate_left(turn);
        }
        candidates
    }
}

pub(crate) async fn listen(wanted: u16) -> Result<TcpListener> {
    let mut outcome = Err(io::Error::other("no port was tried"));
    for port in wanted..=wanted.saturating_add(PORTS_TRIED) {
        outcome = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await;
        match &outcome {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            _ => break,
        }
    }
    let listener =
        outcome.map_err(|error| anyhow::anyhow!("cannot listen on 127.0.0.1:{wanted} or above: {error}"))?;
    let got = listener.local_addr()?.port();
    if wanted != 0 && got != wanted {
        terminal::warn(format_args!("port {wanted} is taken; using {got}"));
    }
    Ok(listener)
}

pub(crate) async fn serve(listener: TcpListener, routes: Arc<Routes>) {
    let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let Ok((socket, peer)) = listener.accept().await else {
            // Probably out of file descriptors: wait for connections to end.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let routes = Arc::clone(&routes);
        tokio::spawn(async move {
            let _ = socket.set_nodelay(true);
            let service = service_fn(move |request| {
                let routes = Arc::clone(&routes);
                async move { Ok::<_, Infallible>(forward(&routes, peer, request).await) }
            });
            let mut http = server::conn::http1::Builder::new();
            http.timer(TokioTimer::new());
            // An error is a client that went away or does not speak HTTP.
            let _ = http.serve_connection(TokioIo::new(socket), service).await;
            drop(permit);
        });
    }
}

type IngressResponse = Response<Either<Incoming, Full<Bytes>>>;

async fn forward(routes: &Routes, peer: SocketAddr, mut request: Request<Incoming>) -> IngressResponse {
    let request_id = request.headers().get(REQUEST_ID).cloned();
    rewrite(&mut request, peer);
    // One connection per request: none can be stale, so nothing is sent twice.
    let response = match connect(&routes.candidates(request.uri().path())).await {
        Some(socket) => exchange(socket, request).await.ok(),
        None => None,
    };
    response.map_or_else(|| unavailable(request_id), |response| response.map(Either::Left))
}

async fn connect(candidates: &[SocketAddr]) -> Option<TcpStream> {
    for address in candidates {
        if let Ok(Ok(socket)) = tokio::time::timeout(CONNECT_DEADLINE, TcpStream::connect(address)).await {
            return Some(socket);
        }
    }
    None
}

async fn exchange(socket: TcpStream, request: Request<Incoming>) -> Result<Response<Incoming>> {
    socket.set_nodelay(true)?;
    let (mut sender, connection) = client::conn::http1::handshake(TokioIo::new(socket)).await?;
    // Ends with the response body: read to its end, or dropped with the client.
    tokio::spawn(connection);
    let mut response = sender.send_request(request).await?;
    remove_hop_by_hop(response.headers_mut());
    Ok(response)
}

fn rewrite(request: &mut Request<Incoming>, peer: SocketAddr) {
    // A request to a proxy names the host in its target; the services expect a path.
    if let Some(authority) = request.uri().authority().cloned() {
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
        if let Ok(uri) = path.parse::<Uri>() {
            *request.uri_mut() = uri;
        }
        if let Ok(host) = HeaderValue::from_str(authority.as_str()) {
            request.headers_mut().insert(HOST, host);
        }
    }
    *request.version_mut() = hyper::Version::HTTP_11;
    let headers = request.headers_mut();
    remove_hop_by_hop(headers);
    let forwarded_for = forwarded_for(headers, peer);
    headers.insert(FORWARDED_FOR, forwarded_for);
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
}

fn forwarded_for(headers: &HeaderMap, peer: SocketAddr) -> HeaderValue {
    let mut hops: Vec<&str> =
        headers.get_all(FORWARDED_FOR).iter().filter_map(|hop| hop.to_str().ok()).collect();
    let peer = peer.ip().to_string();
    hops.push(&peer);
    HeaderValue::from_str(&hops.join(", ")).expect("header values and an address are visible ASCII")
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

fn unavailable(request_id: Option<HeaderValue>) -> IngressResponse {
    let random = || HeaderValue::try_from(secrets::random_password().ok()?).ok();
    let request_id = request_id.or_else(random).unwrap_or_else(|| HeaderValue::from_static("unknown"));
    // Only a request id without escapes is repeated in JSON.
    let shown = request_id.to_str().ok().filter(|id| !id.contains(['"', '\\'])).unwrap_or_default();
    let body = format!(
        r#"{{"type":"/problems/bad_gateway","title":"The service does not answer","status":502,"code":"bad_gateway","message":"The service behind this address does not answer","requestId":"{shown}"}}"#
    );
    Response::builder()
        .status(StatusCode::BAD_GATEWAY)
        .header(CONTENT_TYPE, "application/problem+json")
        .header(REQUEST_ID, request_id)
        .body(Either::Right(Full::from(body)))
        .expect("its parts are valid")
}

#[cfg(test)]
mod tests;
