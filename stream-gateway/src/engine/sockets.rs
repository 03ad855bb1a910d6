//! The sockets of all streams, watched by one epoll.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::fd::AsFd,
    time::Duration,
};

use bytes::{Buf, Bytes};
use mio::{Events, Interest, Poll, Token};
use slab::Slab;
use tokio::io::{Interest as Readable, unix::AsyncFd};

use super::effects::why_broken;
use crate::{core::ConnectionKey, limits::Permit};

/// The kernel doubles it. Enough for a page of the feed; the rest stays in the replay buffer or in Postgres.
const SEND_BUFFER: usize = 64 * 1024;
/// Bytes of unexpected input before the stream is closed.
const MAX_UNEXPECTED_INPUT: u32 = 64 * 1024;

pub struct Sockets {
    poll: AsyncFd<Poll>,
    events: Events,
    slots: Slab<Socket>,
    generation: u32,
}

struct Socket {
    stream: mio::net::TcpStream,
    generation: u32,
    /// Bytes.
    unexpected_input: u32,
    _permit: Permit,
}

/// What happened to one socket.
#[derive(Debug, Clone, Copy)]
pub struct SocketEvent {
    pub key: ConnectionKey,
    pub error: bool,
    pub readable: bool,
    pub writable: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    Discarded,
    /// More than [`MAX_UNEXPECTED_INPUT`].
    TooMuch,
    /// The client has closed its side, or the connection is broken.
    Closed,
}

/// On the listener, whose connections inherit them, so that no connection costs a system call.
pub fn set_options(listener: &impl AsFd, write_deadline: Duration) -> io::Result<()> {
    let listener = socket2::SockRef::from(listener);
    listener.set_send_buffer_size(SEND_BUFFER)?;
    // Bounds how long the kernel holds bytes that the client does not acknowledge or has no room for.
    listener.set_tcp_user_timeout(Some(write_deadline))
}

impl Sockets {
    #[expect(unsafe_code, reason = "tokio requires a descriptor that stays valid")]
    pub fn new(poll: Poll) -> io::Result<Self> {
        // SAFETY: `Poll` owns its descriptor, keeps it open until it is dropped and always names the same one.
        let poll = unsafe { AsyncFd::register_with_interest(poll, Readable::READABLE) };
        let poll = poll.map_err(|error| error.into_parts().1)?;
        let events = Events::with_capacity(1_024);
        Ok(Self { poll, events, slots: Slab::new(), generation: 0 })
    }

    /// The next sockets that are ready, at most 1,024. Cancel safe.
    pub async fn ready(&mut self) -> io::Result<std::vec::IntoIter<SocketEvent>> {
        let mut ready = self.poll.readable_mut().await?;
        match ready.get_inner_mut().poll(&mut self.events, Some(Duration::ZERO)) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        if self.events.iter().count() < self.events.capacity() {
            ready.clear_ready();
        }
        let ready = self.events.iter().filter_map(|event| {
            let index = event.token().0;
            let key = ConnectionKey { index: index as u32, generation: self.slots.get(index)?.generation };
            let (error, readable, writable) = (event.is_error(), event.is_readable(), event.is_writable());
            Some(SocketEvent { key, error, readable, writable })
        });
        Ok(ready.collect::<Vec<_>>().into_iter())
    }

    /// A socket that does not block, with the options of [`set_options`].
    pub fn insert(&mut self, socket: std::net::TcpStream, permit: Permit) -> io::Result<ConnectionKey> {
        let mut stream = mio::net::TcpStream::from_std(socket);
        let slot = self.slots.vacant_entry();
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.get_ref().registry().register(&mut stream, Token(slot.key()), interest)?;
        self.generation = self.generation.wrapping_add(1);
        let key = ConnectionKey { index: slot.key() as u32, generation: self.generation };
        slot.insert(Socket { stream, generation: key.generation, unexpected_input: 0, _permit: permit });
        Ok(key)
    }

    fn get(&mut self, key: ConnectionKey) -> Option<&mut Socket> {
        self.slots.get_mut(key.index as usize).filter(|socket| socket.generation == key.generation)
    }

    /// Writes as much as the socket takes, and leaves the rest in `bytes`.
    pub fn write(&mut self, key: ConnectionKey, bytes: &mut Bytes) -> io::Result<()> {
        let Some(socket) = self.get(key) else { return Ok(()) };
        while !bytes.is_empty() {
            match socket.stream.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => bytes.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Discards unexpected input.
    pub fn discard_input(&mut self, key: ConnectionKey) -> Input {
        let Some(socket) = self.get(key) else { return Input::Discarded };
        let mut buffer = [0; 4_096];
        loop {
            match socket.stream.read(&mut buffer) {
                Ok(0) => return Input::Closed,
                Ok(count) => socket.unexpected_input = socket.unexpected_input.saturating_add(count as u32),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Input::Discarded,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Input::Closed,
            }
            if socket.unexpected_input > MAX_UNEXPECTED_INPUT {
                return Input::TooMuch;
            }
        }
    }

    /// Why a socket that reports an error is broken.
    pub fn take_error(&mut self, key: ConnectionKey) -> &'static str {
        let error = self.get(key).and_then(|socket| socket.stream.take_error().ok().flatten());
        error.as_ref().map_or("client", why_broken)
    }

    /// Closes only our side: closing the socket could make the kernel discard what the client has not read yet.
    pub fn finish_writing(&mut self, key: ConnectionKey) {
        if let Some(socket) = self.get(key) {
            let _ = socket.stream.shutdown(Shutdown::Write);
        }
    }

    pub fn remove(&mut self, key: ConnectionKey) {
        if self.get(key).is_some() {
            let mut socket = self.slots.remove(key.index as usize);
            let _ = self.poll.get_ref().registry().deregister(&mut socket.stream);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn connections_inherit_the_options_of_their_listener() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let deadline = Duration::from_millis(12_345);
        set_options(&listener, deadline).unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let accepted = socket2::SockRef::from(&accepted);
        assert_eq!(accepted.send_buffer_size().unwrap(), 2 * SEND_BUFFER);
        assert_eq!(accepted.tcp_user_timeout().unwrap(), Some(deadline));
    }
}
