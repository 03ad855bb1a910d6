//! Observes a connection between hyper and its socket: its phase, and which deadline applies.

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
    time::Instant,
};

use super::{Limits, Ticket, lock, socket::Socket};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// No byte of a next request has arrived.
    Idle,
    Head,
    /// A handler has the request and bounds its own time.
    Serving,
    Flushing,
    /// Everything is written. Input is discarded, because closing with unread input would reset the connection.
    Closing,
}

/// The longest time in which a connection may stay half closed.
const LINGER: Duration = Duration::from_secs(1);

#[derive(Default)]
pub(super) struct Watch {
    notes: Mutex<Notes>,
    /// Another connection needs this one's permit.
    pub(super) makes_room: Notify,
}

struct Notes {
    phase: Phase,
    since: Instant,
    /// Since when the peer accepts no bytes.
    blocked: Option<Instant>,
    flushes: u64,
    /// The requested handoff, and `flushes` at that time.
    ticket: Option<(Ticket, u64)>,
    read: Tail,
    /// The last bytes of the answered request: if others arrived after them, hyper has those in its buffer.
    answered: Tail,
}

impl Default for Notes {
    fn default() -> Self {
        Self {
            phase: Phase::Head,
            since: Instant::now(),
            blocked: None,
            flushes: 0,
            ticket: None,
            read: Tail::default(),
            answered: Tail::default(),
        }
    }
}

impl Watch {
    pub(super) fn enter(&self, phase: Phase) {
        lock(&self.notes).enter(phase);
    }

    pub(super) fn answered(&self, request: Tail) {
        lock(&self.notes).answered = request;
    }

    pub(super) fn hand_off(&self, ticket: Ticket) {
        let mut notes = lock(&self.notes);
        let flushes = notes.flushes;
        notes.ticket = Some((ticket, flushes));
    }

    /// `into_parts` discards what hyper has not sent, so earlier answers must be sent first. Hyper flushes at the end of each poll:
    /// after one flush nothing is left.
    pub(super) fn may_hand_off(&self) -> bool {
        let notes = lock(&self.notes);
        notes.ticket.as_ref().is_some_and(|(_, before)| notes.flushes > *before)
    }

    pub(super) fn take_ticket(&self) -> Option<Ticket> {
        lock(&self.notes).ticket.take().map(|(ticket, _)| ticket)
    }

    pub(super) fn idle_since(&self) -> Option<Instant> {
        let notes = lock(&self.notes);
        (notes.phase == Phase::Idle).then_some(notes.since)
    }

    /// The time at which the connection is closed, and the reason for the metric.
    pub(super) fn deadline(&self, limits: &Limits) -> Option<(Instant, &'static str)> {
        let notes = lock(&self.notes);
        if let Some(blocked) = notes.blocked {
            return Some((blocked + limits.write, "slow_reader"));
        }
        match notes.phase {
            Phase::Idle => Some((notes.since + limits.idle, "idle")),
            Phase::Head => Some((notes.since + limits.head, "slow_head")),
            Phase::Serving | Phase::Flushing => None,
            Phase::Closing => Some((notes.since + LINGER, "half_closed")),
        }
    }
}

impl Notes {
    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.since = Instant::now();
    }
}

/// The last bytes of a request or of a connection.
#[derive(Clone, Default)]
pub(super) struct Tail(Vec<u8>);

impl Tail {
    const LENGTH: usize = 16;

    pub(super) fn of(bytes: &[u8]) -> Self {
        let mut tail = Self::default();
        tail.push(bytes);
        tail
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(&bytes[bytes.len().saturating_sub(Self::LENGTH)..]);
        let excess = self.0.len().saturating_sub(Self::LENGTH);
        self.0.drain(..excess);
    }

    fn ends_with(&self, end: &Self) -> bool {
        self.0.ends_with(&end.0)
    }
}

/// The socket under hyper: notes the progress of reads, writes and flushes.
pub(super) struct Watched {
    pub(super) socket: Socket,
    pub(super) watch: Arc<Watch>,
    pub(super) idle: Arc<Notify>,
}

impl Watched {
    fn note_write(&self, result: Poll<std::io::Result<usize>>) -> Poll<std::io::Result<usize>> {
        let mut notes = lock(&self.watch.notes);
        if result.is_pending() {
            notes.blocked.get_or_insert_with(Instant::now);
        } else {
            notes.blocked = None;
        }
        result
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.socket).poll_read(cx, buf);
        let new = &buf.filled()[before..];
        if !new.is_empty() {
            let mut notes = lock(&self.watch.notes);
            notes.read.push(new);
            if notes.phase == Phase::Idle {
                notes.enter(Phase::Head);
            }
        }
        result
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let result = Pin::new(&mut self.socket).poll_write(cx, buf);
        self.note_write(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let result = Pin::new(&mut self.socket).poll_write_vectored(cx, bufs);
        self.note_write(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    /// Hyper calls this only when its own buffer is empty.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        let result = Pin::new(&mut self.socket).poll_flush(cx);
        if result.is_ready() {
            let mut notes = lock(&self.watch.notes);
            notes.flushes += 1;
            if notes.phase == Phase::Flushing {
                // The beginning of a next head may have come with the request or while it was served.
                let nothing_more = notes.read.ends_with(&notes.answered);
                notes.enter(if nothing_more { Phase::Idle } else { Phase::Head });
                drop(notes);
                self.idle.notify_one();
            }
        }
        result
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        if lock(&self.watch.notes).phase != Phase::Closing {
            ready!(Pin::new(&mut self.socket).poll_shutdown(cx))?;
            let mut notes = lock(&self.watch.notes);
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
