//! One stream after the handoff: a cursor and a socket. It has no queue: only the rest of a block that its socket did not
//! take and, while it catches up, one page of the feed.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    net::Shutdown,
    num::NonZeroU32,
};

use bytes::Bytes;
use protocol::{
    claims::KeyName,
    ids::SessionId,
    position::{Position, Seq},
};

use crate::{
    event::EncodedEvent,
    frame::{Chunk, Framing, Goodbye, Heartbeat},
    limits::Permit,
    sequencer::{Millis, ResyncReason},
};

/// What a client says about its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// It sent no cursor: start at the head.
    Head,
    After(Position),
    /// It sent something that is not a cursor.
    Invalid,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its position is not known yet.
    Joining(Resume),
    /// `position` is its cursor.
    Joined,
}

pub struct Connection {
    pub socket: mio::net::TcpStream,
    pub generation: u32,
    /// Index of the user in the hub.
    pub user: u32,
    /// None: a token of the external issuer, which has no session.
    pub session: Option<SessionId>,
    /// The key that signed the token.
    pub key: KeyName,
    pub state: State,
    /// The last event written: in `Joined`, and from the start if the client sent a cursor.
    pub position: Position,
    /// The events after this one are sent; moved by a resync.
    pub started_after: Seq,
    /// Bytes that the socket did not take. Nothing else is written before them.
    pub rest: Bytes,
    /// Events after the cursor, read from the feed because the replay buffer does not have them.
    pub page: VecDeque<EncodedEvent>,
    /// Head batches sent before this connection opened. Only an answer to a later one confirms its session: an earlier one may
    /// have been read before the session ended.
    pub came_after_batch: u32,
    pub session_requested: bool,
    /// True without a session. Until then the connection receives nothing.
    pub session_confirmed: bool,
    /// The request in flight for the events after this connection's cursor.
    pub range_request: Option<NonZeroU32>,
    /// `ready` must be written; the flag: whether the stream resumes.
    pub pending_ready: Option<bool>,
    /// A resync must be written.
    pub pending_resync: Option<ResyncReason>,
    pub closing: Option<Goodbye>,
    /// The gateway waits for the client to close.
    pub goodbye_written: bool,
    pub heartbeat_at: Millis,
    pub heartbeat: Heartbeat,
    pub framing: Framing,
    pub ends_at: Millis,
    pub ends_why: Goodbye,
    /// While `rest` is not empty: when the socket last took bytes.
    pub blocked_since: Millis,
    /// The connection's valid entry in the wheel.
    pub due: Millis,
    /// Bytes.
    pub unexpected_input: u32,
    pub _permit: Permit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    All,
    /// The socket takes no more; `rest` has the remaining bytes.
    Short,
}

impl Connection {
    pub fn is_joined(&self) -> bool {
        self.state == State::Joined
    }

    /// The next event may be written directly to the socket.
    pub fn is_live(&self) -> bool {
        self.is_joined()
            && self.rest.is_empty()
            && self.page.is_empty()
            && self.pending_ready.is_none()
            && self.pending_resync.is_none()
            && self.closing.is_none()
    }

    /// Writes a block and, after a goodbye, the end of the body.
    pub fn write_block(&mut self, block: &Chunk, now: Millis) -> io::Result<Written> {
        let bytes = if self.goodbye_written { self.framing.last(block) } else { self.framing.bytes(block) };
        self.write(bytes, now)
    }

    /// Writes as much as the socket takes. `rest` must be empty.
    pub fn write(&mut self, bytes: Bytes, now: Millis) -> io::Result<Written> {
        debug_assert!(self.rest.is_empty(), "a block inside another");
        self.rest = bytes;
        self.blocked_since = now;
        self.flush(now).inspect_err(|_| self.rest = Bytes::new())
    }

    pub fn flush(&mut self, now: Millis) -> io::Result<Written> {
        while !self.rest.is_empty() {
            match self.socket.write(&self.rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    let _ = self.rest.split_to(count);
                    self.blocked_since = now;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Written::Short),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.rest = Bytes::new(); // Frees the frame.
        Ok(Written::All)
    }

    /// Discards unexpected input. `false` when the client has closed its side.
    pub fn discard_input(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 4_096];
        loop {
            match self.socket.read(&mut buffer) {
                Ok(0) => return Ok(false),
                Ok(count) => self.unexpected_input = self.unexpected_input.saturating_add(count as u32),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if self.unexpected_input > MAX_UNEXPECTED_INPUT {
                return Ok(true);
            }
        }
    }

    /// Ends the body of a stream without a goodbye, unless that would cut a block.
    pub fn end_body(&mut self) {
        if self.rest.is_empty() && !self.goodbye_written {
            let _ = self.socket.write(self.framing.end());
        }
        self.finish_writing();
    }

    /// Closes only our side: closing the socket could make the kernel discard what the client has not read yet.
    pub fn finish_writing(&self) {
        let _ = self.socket.shutdown(Shutdown::Write);
    }
}

/// Bytes of unexpected input before the stream is closed.
pub const MAX_UNEXPECTED_INPUT: u32 = 64 * 1024;
