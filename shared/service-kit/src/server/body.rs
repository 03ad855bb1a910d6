//! The bodies around a handler. A request's body is read to its end, or the answer closes the connection; an answer's body
//! records when hyper has taken all of it.

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, header};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::timeout;

use super::{
    lock,
    watch::{Phase, Tail, Watch},
};

/// Bounds for reading an unread body after the answer, so that the client gets its answer and a connection
/// that a proxy shares stays open.
const UNWANTED_BYTES: u64 = 1 << 20;
const UNWANTED_TIME: Duration = Duration::from_secs(1);

/// The end of a request without a body, and of one in chunks.
const BLANK_LINE: &[u8] = b"\r\n\r\n";

/// The body that a handler gets, and may leave unread.
pub struct RequestBody(Arc<Mutex<Received>>);

struct Received {
    body: Incoming,
    started: bool,
    ended: bool,
    /// The client waits for `100 Continue`, which hyper sends at the first read.
    expects_continue: bool,
    tail: Tail,
}

impl RequestBody {
    pub(super) fn new(body: Incoming, headers: &HeaderMap) -> Self {
        let expects_continue = headers.contains_key(header::EXPECT);
        let ended = body.is_end_stream();
        Self(Arc::new(Mutex::new(Received {
            body,
            started: false,
            ended,
            expects_continue,
            tail: Tail::of(BLANK_LINE),
        })))
    }

    pub(super) fn rest(&self) -> Rest {
        Rest(self.0.clone())
    }
}

impl Received {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.started = true;
        let in_chunks = self.body.size_hint().exact().is_none();
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
            && !in_chunks
        {
            self.tail.push(data);
        }
        self.ended = frame.is_none() || self.body.is_end_stream();
        Poll::Ready(frame)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        lock(&self.0).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        lock(&self.0).body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        lock(&self.0).body.size_hint()
    }
}

pub(super) struct Rest(Arc<Mutex<Received>>);

impl Rest {
    /// Reads the rest and returns the last bytes of the request. `None`: the end was not reached, so the connection must close.
    pub(super) async fn read(self) -> Option<Tail> {
        // The handler answered and still reads.
        let received = Arc::into_inner(self.0)?;
        let received = received.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        let unwanted = received.body.size_hint().lower() > UNWANTED_BYTES
            || received.expects_continue && !received.started;
        if received.ended {
            return Some(received.tail);
        }
        if unwanted {
            return None;
        }
        timeout(UNWANTED_TIME, read_to_end(received)).await.ok().flatten()
    }
}

async fn read_to_end(mut received: Received) -> Option<Tail> {
    let mut left = UNWANTED_BYTES;
    while !received.ended {
        match std::future::poll_fn(|cx| received.poll_frame(cx)).await {
            Some(Ok(frame)) => left = left.checked_sub(frame.data_ref().map_or(0, Bytes::len) as u64)?,
            Some(Err(_)) => return None,
            None => {}
        }
    }
    Some(received.tail)
}

pub(super) struct AnswerBody<B> {
    pub(super) body: B,
    pub(super) watch: Arc<Watch>,
}

impl<B: Body + Unpin> Body for AnswerBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B> Drop for AnswerBody<B> {
    /// Hyper drops a body as soon as it has taken all of it.
    fn drop(&mut self) {
        self.watch.enter(Phase::Flushing);
    }
}
