//! One stream after the handoff: a cursor and a socket. It has no queue of its own; what it holds is the rest of the block
//! that its socket did not take, and while it catches up, one page of the feed.

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
    /// Nothing: start at the head.
    Head,
    After(Position),
    /// Something that is no cursor of ours.
    Invalid,
}

/// What was last seen of the way to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its place is not known yet.
    Joining(Resume),
    /// `head` is its cursor.
    Joined,
}

pub struct Connection {
    pub socket: mio::net::TcpStream,
    pub generation: u32,
    /// Where the user is in the hub.
    pub user: u32,
    /// None: a foreign token, which nobody can revoke here.
    pub session: Option<SessionId>,
    /// Which signed the token.
    pub key: KeyName,
    pub state: State,
    /// The last event that was written: in `Joined`, and from the start when the client brought a cursor.
    pub position: Position,
    /// The place after which it began, or began anew.
    pub started_after: Seq,
    /// What the socket did not take. Nothing else is written before it.
    pub rest: Bytes,
    /// What follows the cursor, read from the feed because the replay does not hold it.
    pub page: VecDeque<EncodedEvent>,
    /// Requests about heads that had been sent when this connection came. Only answers to later ones confirm its session: an
    /// earlier one says nothing about a session that ended meanwhile.
    pub came_after_batch: u32,
    pub session_requested: bool,
    /// The session lives, or there is none. Until then the connection receives nothing.
    pub session_confirmed: bool,
    /// A question about this connection's cursor is on its way.
    pub range_request: Option<NonZeroU32>,
    /// `ready` is still to be written; whether it resumes.
    pub pending_ready: Option<bool>,
    /// The place is lost; a resync is still to be written.
    pub pending_resync: Option<ResyncReason>,
    pub closing: Option<Goodbye>,
    /// The goodbye was written; the client's end of the connection is awaited.
    pub goodbye_written: bool,
    pub heartbeat_at: Millis,
    pub heartbeat: Heartbeat,
    pub framing: Framing,
    pub ends_at: Millis,
    pub ends_why: Goodbye,
    /// Since when the socket takes nothing, while `rest` is not empty.
    pub blocked_since: Millis,
    /// The connection's own time in the wheel.
    pub due: Millis,
    /// Bytes that the client sent on a stream.
    pub unexpected_input: u32,
    pub _permit: Permit,
}

/// What came of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    All,
    /// The socket takes no more; the rest is kept.
    Short,
}

impl Connection {
    pub fn is_joined(&self) -> bool {
        self.state == State::Joined
    }

    /// An event that follows may be written straight to the socket.
    pub fn is_live(&self) -> bool {
        self.is_joined()
            && self.rest.is_empty()
            && self.page.is_empty()
            && self.pending_ready.is_none()
            && self.pending_resync.is_none()
            && self.closing.is_none()
    }

    /// Writes a block; behind a goodbye, the end of the body with it.
    pub fn write_block(&mut self, block: &Chunk, now: Millis) -> io::Result<Written> {
        let bytes = if self.goodbye_written { self.framing.last(block) } else { self.framing.bytes(block) };
        self.write(bytes, now)
    }

    /// Writes this, or as much of it as the socket takes. Only when nothing is left of what was written before.
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
        self.rest = Bytes::new(); // Lets go of the frame.
        Ok(Written::All)
    }

    /// Reads and forgets. `false` when the client has closed its side.
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

    /// Ends the body of a stream that gets no goodbye, unless that would cut a block.
    pub fn end_body(&mut self) {
        if self.rest.is_empty() && !self.goodbye_written {
            let _ = self.socket.write(self.framing.end());
        }
        self.finish_writing();
    }

    /// No more will be written. Closing at once could make the kernel discard what the client has not read yet.
    pub fn finish_writing(&self) {
        let _ = self.socket.shutdown(Shutdown::Write);
    }
}

/// Bytes that a client may send on a stream, where it has nothing to say.
pub const MAX_UNEXPECTED_INPUT: u32 = 64 * 1024;
