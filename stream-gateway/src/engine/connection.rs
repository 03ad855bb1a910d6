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
    frame::{Chunk, Event, Framing, Goodbye, Heartbeat},
    limits::Place,
    sequencer::{Lost, Millis},
};

/// Names one connection for as long as the process runs: slots are used again, generations are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub index: u32,
    pub generation: u32,
}

/// What a client says about its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// Nothing: start at the head.
    Head,
    After(Position),
    /// Something that is no cursor of ours.
    Nonsense,
}

/// What was last seen of the way to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Its place is not known yet.
    Joining(Resume),
    /// `head` is its cursor.
    Placed,
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
    pub stage: Stage,
    /// The last event that was written: in `Placed`, and from the start when the client brought a cursor.
    pub head: Position,
    /// The place after which it began, or began anew.
    pub after: Seq,
    /// What the socket did not take. Nothing else is written before it.
    pub rest: Bytes,
    /// What follows the cursor, read from the feed because the ring does not hold it.
    pub page: VecDeque<Event>,
    /// Requests about heads that had been sent when this connection came. Only answers to later ones confirm its session: an
    /// earlier one says nothing about a session that ended meanwhile.
    pub came_after_request: u32,
    pub session_asked: bool,
    /// The session lives, or there is none. Until then the connection receives nothing.
    pub session_confirmed: bool,
    /// A question about this connection's cursor is on its way.
    pub asked: Option<NonZeroU32>,
    /// `ready` is still to be written; whether it resumes.
    pub owes_ready: Option<bool>,
    /// The place is lost; a resync is still to be written.
    pub lost: Option<Lost>,
    pub parting: Option<Goodbye>,
    /// The goodbye was written; the client's end of the connection is awaited.
    pub said_goodbye: bool,
    pub beat_at: Millis,
    pub heartbeat: Heartbeat,
    pub framing: Framing,
    pub ends_at: Millis,
    pub ends_why: Goodbye,
    /// Since when the socket takes nothing, while `rest` is not empty.
    pub blocked_since: Millis,
    /// The connection's own time in the wheel.
    pub due: Millis,
    /// Bytes that the client sent on a stream.
    pub noise: u32,
    pub _place: Place,
}

/// What came of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    All,
    /// The socket takes no more; the rest is kept.
    Short,
}

impl Connection {
    pub fn is_placed(&self) -> bool {
        self.stage == Stage::Placed
    }

    /// An event that follows may be written straight to the socket.
    pub fn is_clear(&self) -> bool {
        self.is_placed()
            && self.rest.is_empty()
            && self.page.is_empty()
            && self.owes_ready.is_none()
            && self.lost.is_none()
            && self.parting.is_none()
    }

    /// Writes a block; behind a goodbye, the end of the body with it.
    pub fn write_block(&mut self, block: &Chunk, now: Millis) -> io::Result<Written> {
        let bytes = if self.said_goodbye { self.framing.last(block) } else { self.framing.bytes(block) };
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
                Ok(count) => self.noise = self.noise.saturating_add(count as u32),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if self.noise > MAX_NOISE {
                return Ok(true);
            }
        }
    }

    /// Ends the body of a stream that gets no goodbye, unless that would cut a block.
    pub fn end_body(&mut self) {
        if self.rest.is_empty() && !self.said_goodbye {
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
pub const MAX_NOISE: u32 = 64 * 1024;
