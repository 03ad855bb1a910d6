//! The accept loop of both services: hyper's HTTP/1.1 under a tower service such as `warp::service`, with what hyper does
//! not provide: bounds on connections, a deadline for a request head, an idle limit, a write deadline, the peer's address as
//! an extension, a graceful stop, and the handoff, by which a handler takes the socket out of hyper.
//!
//! It also handles what is common to every request: malformed heads are rejected before routing, a panicking handler is answered
//! with 500 and counted, and an answer announces when the connection closes.
//!
//! Each connection is one task that polls hyper. [`watch`], between hyper and the socket, records the connection's phase; after
//! every poll the task reads it to choose the deadline and to decide whether a handoff may happen.

mod body;
mod connections;
mod head;
mod metrics;
mod socket;
mod watch;

use std::{
    convert::Infallible,
    future::Future,
    io,
    net::{self, SocketAddr},
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::FutureExt as _;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::Body;
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::TcpListener,
    sync::Notify,
    task::yield_now,
    time::{Instant, Sleep, sleep, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower_service::Service;

use self::{
    body::AnswerBody,
    connections::Connections,
    head::Malformed,
    socket::{Acceptor, Socket},
    watch::{Phase, Watch, Watched},
};
pub use self::{
    body::RequestBody,
    metrics::{ListenerMetrics, ServerMetrics},
};
use crate::{
    client_address::TrustedProxies,
    http::{REQUEST_ID, request_id, set_common_headers},
};
use protocol::problem::Problem;

#[derive(Debug, Clone)]
pub struct Limits {
    /// Concurrent HTTP connections; more wait in the kernel's backlog. Handed-off sockets do not count.
    pub connections: usize,
    /// Connections per client address (IPv6: per /64), and at most half; more are closed. 0: no bound.
    pub per_address: usize,
    /// Addresses without that bound, because each carries many clients.
    pub proxies: TrustedProxies,
    /// From the first byte of a request head, or from accepting the connection, until the head is complete.
    pub head: Duration,
    pub idle: Duration,
    /// A peer that accepts no bytes for this long is disconnected.
    pub write: Duration,
    pub stop: Duration,
    /// Serve a request even if the client has closed its side meanwhile. If not, hyper reads while a request is served, which costs
    /// three system calls, and the request is cancelled.
    pub half_close: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4_096,
            per_address: 0,
            proxies: TrustedProxies::default(),
            head: Duration::from_secs(10),
            idle: Duration::from_secs(60),
            write: Duration::from_secs(60),
            stop: Duration::from_secs(10),
            half_close: false,
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub struct PeerAddr(pub SocketAddr);

/// A listening socket with `TCP_NODELAY` for its connections.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(address),
        socket2::Type::STREAM.nonblocking().cloexec(),
        Some(socket2::Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?; // Accepted sockets inherit it.
    socket.bind(&address.into())?;
    socket.listen(65_535)?; // The kernel caps it at net.core.somaxconn.
    TcpListener::from_std(socket.into())
}

/// Then those that were accepted are served before more are: hyper has 16 KiB of buffers for each, which a storm of new clients would
/// otherwise multiply by their number.
const ACCEPTED_IN_A_ROW: usize = 32;

type Takeover = Box<dyn FnOnce(net::TcpStream) + Send>;

/// A response extension that requests the socket instead of answering.
#[derive(Clone)]
struct Ticket(Arc<Mutex<Option<Takeover>>>);

/// A response that makes [`serve`] give the connection's socket to `takeover`, which then writes the whole answer, head
/// included. Earlier answers are sent first; bytes that the client sent after its request head are lost. If the connection breaks
/// before, `takeover` is dropped without a call. The socket does not block.
pub fn hand_off<B: Default>(takeover: impl FnOnce(net::TcpStream) + Send + 'static) -> Response<B> {
    let mut response = Response::new(B::default());
    response.extensions_mut().insert(Ticket(Arc::new(Mutex::new(Some(Box::new(takeover))))));
    response
}

/// Serves until `stop` is cancelled, then lets requests in progress finish, and cuts them after `limits.stop`.
#[expect(clippy::disallowed_methods, reason = "one connection, whose panic is counted")]
pub async fn serve<S, B>(
    listener: TcpListener,
    service: S,
    limits: Limits,
    metrics: ListenerMetrics,
    stop: CancellationToken,
) where
    S: Service<Request<RequestBody>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
    B: Body + From<Vec<u8>> + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let connections = Arc::new(Connections::new(&limits, metrics.connections()));
    let (limits, metrics) = (Arc::new(limits), Arc::new(metrics));
    let tasks = TaskTracker::new();
    let cut = CancellationToken::new();
    let listener = match Acceptor::new(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "cannot watch the listener; the process stops"),
    };
    let mut in_a_row = 0;
    loop {
        if in_a_row == ACCEPTED_IN_A_ROW {
            in_a_row = 0;
            yield_now().await;
        }
        in_a_row += 1;
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if is_about_one_connection(&error) => continue,
            Err(error) => {
                // Out of descriptors or memory, which end when connections do.
                tracing::error!(%error, "accept failed; retrying");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let watch = Arc::new(Watch::default());
        let permit = tokio::select! {
            permit = connections.permit(peer.ip(), &watch) => permit,
            () = stop.cancelled() => break,
        };
        let Some(permit) = permit else {
            metrics.closed("address_limit");
            tracing::debug!(listener = metrics.name, %peer, "connection refused: CONNECTIONS_PER_ADDRESS reached");
            continue;
        };
        let edge = Edge { service: service.clone(), peer, watch, metrics: metrics.clone() };
        let connection = drive(socket, edge, connections.changed.clone(), limits.clone(), stop.clone());
        let (cut, metrics) = (cut.clone(), metrics.clone());
        tasks.spawn(async move {
            // A panic outside a handler must release the permit, too.
            let connection = AssertUnwindSafe(connection).catch_unwind();
            tokio::select! {
                ended = connection => if ended.is_err() {
                    metrics.panicked();
                    tracing::error!(listener = metrics.name, %peer, "connection panicked; it is closed");
                },
                () = cut.cancelled() => {}
            }
            drop(permit);
        });
    }
    drop(listener);
    tasks.close();
    if tokio::time::timeout(limits.stop, tasks.wait()).await.is_err() {
        tracing::warn!(
            connections = tasks.len(),
            "shutdown deadline reached; closing the remaining connections"
        );
        cut.cancel();
        tasks.wait().await;
    }
}

fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// One connection from its first byte to its end or its handoff.
async fn drive<S, B>(
    socket: Socket,
    edge: Edge<S>,
    idle: Arc<Notify>,
    limits: Arc<Limits>,
    stop: CancellationToken,
) where
    S: Service<Request<RequestBody>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
    B: Body + From<Vec<u8>> + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (peer, watch, metrics) = (edge.peer, edge.watch.clone(), edge.metrics.clone());
    // The connection may have waited for its permit.
    watch.enter(Phase::Head);
    let io = TokioIo::new(Watched { socket, watch: watch.clone(), idle });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(None) // It also runs while a connection is idle; ours does not.
        .half_close(limits.half_close)
        .max_buf_size(16 * 1024)
        .serve_connection(io, edge);
    let mut stopped = pin!(stop.cancelled_owned());
    let mut makes_room = pin!(watch.makes_room.notified());
    let (mut stopping, mut making_room) = (false, false);
    let mut timer = pin!(sleep(limits.head));
    let outcome = std::future::poll_fn(|cx| {
        if !stopping && stopped.as_mut().poll(cx).is_ready() {
            stopping = true;
            Pin::new(&mut connection).graceful_shutdown();
        }
        if let Poll::Ready(result) = Pin::new(&mut connection).poll(cx) {
            return Poll::Ready(Outcome::Ended(result.is_ok()));
        }
        if !making_room && makes_room.as_mut().poll(cx).is_ready() {
            making_room = true;
            if watch.idle_since().is_some() {
                return Poll::Ready(Outcome::Cut("made_room"));
            }
            // A request arrived first: its answer announces the close.
            Pin::new(&mut connection).graceful_shutdown();
        }
        if watch.may_hand_off() {
            return Poll::Ready(Outcome::HandOff);
        }
        match watch.deadline(&limits) {
            Some((deadline, reason)) => {
                poll_deadline(timer.as_mut(), deadline, cx).map(|()| Outcome::Cut(reason))
            }
            None => Poll::Pending,
        }
    })
    .await;
    match outcome {
        Outcome::Ended(clean) => tracing::trace!(%peer, clean, "connection ended"),
        Outcome::Cut(reason) => {
            metrics.closed(reason);
            tracing::debug!(listener = metrics.name, %peer, reason, "connection closed");
        }
        Outcome::HandOff => {
            let socket = connection.into_parts().io.into_inner().socket;
            let takeover = watch.take_ticket().and_then(|ticket| lock(&ticket.0).take());
            if let (Some(takeover), Ok(socket)) = (takeover, socket.into_std()) {
                takeover(socket);
            }
        }
    }
}

enum Outcome {
    Ended(bool),
    Cut(&'static str),
    HandOff,
}

fn poll_deadline(mut timer: Pin<&mut Sleep>, deadline: Instant, cx: &mut Context<'_>) -> Poll<()> {
    if timer.deadline() != deadline {
        timer.set(sleep_until(deadline));
    }
    timer.poll(cx)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The service under hyper: what is common to every request, around the routes of one listener.
struct Edge<S> {
    service: S,
    peer: SocketAddr,
    watch: Arc<Watch>,
    metrics: Arc<ListenerMetrics>,
}

impl<S, B> hyper::service::Service<Request<Incoming>> for Edge<S>
where
    S: Service<Request<RequestBody>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
    B: Body + From<Vec<u8>> + Send + Unpin + 'static,
{
    type Response = Response<AnswerBody<B>>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        self.watch.enter(Phase::Serving);
        let (mut head, body) = request.into_parts();
        let body = RequestBody::new(body, &head.headers);
        let rest = body.rest();
        let id = request_id(&head.headers);
        let id_header = HeaderValue::from_str(&id).expect("letters, digits, dashes");
        head.headers.insert(REQUEST_ID, id_header.clone());
        head.extensions.insert(PeerAddr(self.peer));
        // A handler that takes the socket needs the version, which warp does not expose.
        head.extensions.insert(head.version);
        let request = Request::from_parts(head, body);
        let (watch, metrics, peer) = (self.watch.clone(), self.metrics.clone(), self.peer);
        let mut service = self.service.clone();
        Box::pin(async move {
            let mut answer = if let Some(malformed) = Malformed::find(&request) {
                metrics.malformed(malformed.as_str());
                tracing::debug!(listener = metrics.name, request.id = id, %peer, reason = malformed.as_str(), "malformed request");
                drop(request);
                malformed.answer(&id)
            } else {
                let answer = async move { service.call(request).await };
                match AssertUnwindSafe(answer).catch_unwind().await {
                    Ok(Ok(answer)) => answer,
                    Err(_) => {
                        metrics.panicked();
                        tracing::error!(listener = metrics.name, request.id = id, %peer, "request handler panicked; answered 500");
                        let sentence = "Internal server error";
                        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", sentence, &id)
                            .into_response()
                    }
                }
            };
            if let Some(ticket) = answer.extensions_mut().remove::<Ticket>() {
                watch.hand_off(ticket);
                // Hyper gets no answer; `drive` takes the connection apart.
                return std::future::pending().await;
            }
            set_common_headers(answer.headers_mut(), id_header);
            match rest.read().await {
                Some(end) => watch.answered(end),
                None => {
                    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
            }
            Ok(answer.map(|body| AnswerBody { body, watch }))
        })
    }
}

#[cfg(test)]
mod tests;
