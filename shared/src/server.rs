//! The accept loop of both services: hyper's HTTP/1.1 under a tower service such as `warp::service`, with what hyper does
//! not give: a limit on connections, a deadline for a request head, an idle limit, a write deadline, the peer's address as
//! an extension, an orderly stop; and the handoff, by which a handler takes the bare socket out of hyper.
//!
//! Each connection is one task that polls hyper. [`Watched`], between hyper and the socket, only notes what it sees; after
//! every poll the task looks at the notes to know which deadline runs and whether a handoff may happen.

use std::{
    convert::Infallible,
    future::Future,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{Request, Response};
use http_body::Body;
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{Instant, Sleep, sleep, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower_service::Service;

/// Bounds of one listener.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections inside HTTP at once; more wait in the kernel's backlog. Handed-over sockets no longer count.
    pub connections: usize,
    /// A request head must be whole this long after its first byte, or after the connection was made.
    pub head: Duration,
    /// A connection without a request in progress is closed after this long.
    pub idle: Duration,
    /// A peer that takes nothing of what we write for this long is cut.
    pub write: Duration,
    /// How long connections may take to finish once a stop was asked for.
    pub stop: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4_096,
            head: Duration::from_secs(10),
            idle: Duration::from_secs(60),
            write: Duration::from_secs(60),
            stop: Duration::from_secs(10),
        }
    }
}

/// The other end of the connection, in every request's extensions.
#[derive(Debug, Clone, Copy)]
pub struct PeerAddr(pub SocketAddr);

/// A listening socket whose connections send small writes at once.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(address),
        socket2::Type::STREAM.nonblocking().cloexec(),
        Some(socket2::Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?; // Accepted sockets inherit it.
    socket.bind(&address.into())?;
    socket.listen(65_535)?; // The kernel lowers it to net.core.somaxconn: how long the queue may be is the operator's.
    TcpListener::from_std(socket.into())
}

type Takeover = Box<dyn FnOnce(TcpStream) + Send>;

/// In a response's extensions: not an answer, but the wish to have the socket.
#[derive(Clone)]
struct Ticket(Arc<Mutex<Option<Takeover>>>);

/// A response that makes [`serve`] give the connection's socket to `takeover`, which then writes the whole answer, head
/// included. Everything that hyper had to send before is sent; bytes that the client sent after its request head are lost.
/// `takeover` is dropped uncalled when the connection breaks first.
pub fn hand_off<B: Default>(takeover: impl FnOnce(TcpStream) + Send + 'static) -> Response<B> {
    let mut response = Response::new(B::default());
    response.extensions_mut().insert(Ticket(Arc::new(Mutex::new(Some(Box::new(takeover))))));
    response
}

/// Serves until `stop` is cancelled, then lets requests in progress finish, and cuts them after `limits.stop`.
pub async fn serve<S, B>(listener: TcpListener, service: S, limits: Limits, stop: CancellationToken)
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let places = Arc::new(Semaphore::new(limits.connections));
    let tasks = TaskTracker::new();
    let cut = CancellationToken::new();
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            accepted = accepted => accepted,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok((socket, peer)) => {
                let connection = drive(socket, peer, service.clone(), limits, stop.clone());
                let cut = cut.clone();
                tasks.spawn(async move {
                    tokio::select! {
                        () = connection => {}
                        () = cut.cancelled() => {}
                    }
                    drop(place);
                });
            }
            Err(error) if is_about_one_connection(&error) => {}
            Err(error) => {
                // Out of descriptors or memory: connections end, and the next try may succeed.
                tracing::error!(%error, "cannot accept connections");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    tasks.close();
    if tokio::time::timeout(limits.stop, tasks.wait()).await.is_err() {
        tracing::warn!(connections = tasks.len(), "cutting connections that did not finish in time");
        cut.cancel();
        tasks.wait().await;
    }
}

fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// One connection from its first byte to its end or its handoff.
async fn drive<S, B>(socket: TcpStream, peer: SocketAddr, service: S, limits: Limits, stop: CancellationToken)
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let notes = Arc::new(Mutex::new(Notes::new()));
    let io = TokioIo::new(Watched { socket, notes: notes.clone() });
    let service = Noting { service, peer, notes: notes.clone() };
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(None) // It runs while a connection is idle, too; ours does not.
        .max_buf_size(16 * 1024)
        .serve_connection(io, service);
    let mut stopped = pin!(stop.cancelled_owned());
    let mut stopping = false;
    let mut timer = pin!(sleep(limits.head));
    let outcome = std::future::poll_fn(|cx| {
        if !stopping && stopped.as_mut().poll(cx).is_ready() {
            stopping = true;
            Pin::new(&mut connection).graceful_shutdown();
        }
        if let Poll::Ready(result) = Pin::new(&mut connection).poll(cx) {
            // A broken connection is the client's matter; nothing of ours failed.
            return Poll::Ready(Outcome::Ended(result.is_ok()));
        }
        let deadline = {
            let notes = lock(&notes);
            if notes.may_hand_off() {
                return Poll::Ready(Outcome::HandOff);
            }
            notes.deadline(&limits)
        };
        match deadline {
            Some((deadline, reason)) => {
                poll_deadline(timer.as_mut(), deadline, cx).map(|()| Outcome::Cut(reason))
            }
            None => Poll::Pending,
        }
    })
    .await;
    match outcome {
        Outcome::Ended(clean) => tracing::trace!(%peer, clean, "connection ended"),
        Outcome::Cut(reason) => tracing::debug!(%peer, reason, "connection cut"),
        Outcome::HandOff => {
            let socket = connection.into_parts().io.into_inner().socket;
            let takeover = lock(&notes).ticket.take().and_then(|(ticket, _)| lock(&ticket.0).take());
            if let Some(takeover) = takeover {
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

/// What was seen of one connection.
struct Notes {
    phase: Phase,
    since: Instant,
    /// Since when the peer takes nothing of what we write.
    blocked: Option<Instant>,
    /// How often everything that hyper had to send was sent.
    flushes: u64,
    /// The wish for a handoff, and `flushes` when it was made.
    ticket: Option<(Ticket, u64)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing of a next request was seen.
    Idle,
    /// A request head has begun.
    Head,
    /// A handler has the request; it bounds its own time.
    Serving,
    /// All is said. What the client still sends is thrown away, so that the kernel does not reset what it has not read yet.
    Closing,
}

/// How long a connection may stay half closed.
const LINGER: Duration = Duration::from_secs(1);

impl Notes {
    fn new() -> Self {
        // A new connection owes us a head at once, so it starts there.
        Self { phase: Phase::Head, since: Instant::now(), blocked: None, flushes: 0, ticket: None }
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.since = Instant::now();
    }

    fn deadline(&self, limits: &Limits) -> Option<(Instant, &'static str)> {
        if let Some(blocked) = self.blocked {
            return Some((blocked + limits.write, "the peer takes nothing"));
        }
        match self.phase {
            Phase::Idle => Some((self.since + limits.idle, "idle")),
            Phase::Head => Some((self.since + limits.head, "no whole request head")),
            Phase::Serving => None,
            Phase::Closing => Some((self.since + LINGER, "half closed")),
        }
    }

    /// `into_parts` forgets what hyper has not sent yet, so an earlier answer on this connection must be out first. Hyper
    /// flushes at the end of each poll: one flush after the wish means that nothing is left.
    fn may_hand_off(&self) -> bool {
        self.ticket.as_ref().is_some_and(|(_, before)| self.flushes > *before)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The service under hyper: adds the peer's address, notes when a request is being served, holds tickets back.
struct Noting<S> {
    service: S,
    peer: SocketAddr,
    notes: Arc<Mutex<Notes>>,
}

impl<S, B> hyper::service::Service<Request<Incoming>> for Noting<S>
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = Response<B>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<B>, Infallible>> + Send>>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        lock(&self.notes).enter(Phase::Serving);
        request.extensions_mut().insert(PeerAddr(self.peer));
        // A handler that takes the socket over writes the answer itself, and warp does not expose the version.
        let version = request.version();
        request.extensions_mut().insert(version);
        let answer = self.service.clone().call(request);
        let notes = self.notes.clone();
        Box::pin(async move {
            let mut response = answer.await?;
            let Some(ticket) = response.extensions_mut().remove::<Ticket>() else {
                lock(&notes).enter(Phase::Idle);
                return Ok(response);
            };
            {
                let mut notes = lock(&notes);
                let flushes = notes.flushes;
                notes.ticket = Some((ticket, flushes));
            }
            // Hyper never gets an answer: the driver takes the connection apart.
            std::future::pending().await
        })
    }
}

/// The socket under hyper: notes the progress of reads, writes and flushes.
struct Watched {
    socket: TcpStream,
    notes: Arc<Mutex<Notes>>,
}

impl Watched {
    fn note_write(&self, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        let mut notes = lock(&self.notes);
        if result.is_pending() {
            notes.blocked.get_or_insert_with(Instant::now);
        } else {
            notes.blocked = None;
            if notes.phase == Phase::Idle {
                notes.since = Instant::now();
            }
        }
        result
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.socket).poll_read(cx, buf);
        if buf.filled().len() > before {
            let mut notes = lock(&self.notes);
            if notes.phase == Phase::Idle {
                notes.enter(Phase::Head);
            }
        }
        result
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.socket).poll_write(cx, buf);
        self.note_write(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.socket).poll_write_vectored(cx, bufs);
        self.note_write(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    /// Hyper calls this only when its own buffer is empty.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.socket).poll_flush(cx);
        if result.is_ready() {
            lock(&self.notes).flushes += 1;
        }
        result
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if lock(&self.notes).phase != Phase::Closing {
            ready!(Pin::new(&mut self.socket).poll_shutdown(cx))?;
            let mut notes = lock(&self.notes);
            notes.enter(Phase::Closing);
            notes.blocked = None;
        }
        let mut space = [std::mem::MaybeUninit::uninit(); 4_096];
        loop {
            let mut buffer = ReadBuf::uninit(&mut space);
            ready!(Pin::new(&mut self.socket).poll_read(cx, &mut buffer))?;
            if buffer.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

#[cfg(test)]
mod tests;
