//! Sockets that enter tokio's epoll only when they must be waited for.
//!
//! The request of a new client has usually arrived by the time its connection is accepted. Then the socket of a stream is read and
//! handed off without two system calls for the epoll, and without a task switch between accepting and reading.

use std::{
    io::{self, IoSlice, Read, Write},
    mem,
    net::{self, SocketAddr},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd},
    net::{TcpListener, TcpStream},
};

/// Bytes read without waiting; a usual request head fits.
const READ_FIRST: usize = 2_048;

pub(super) struct Acceptor(AsyncFd<mio::net::TcpListener>);

impl Acceptor {
    #[expect(unsafe_code, reason = "tokio requires a descriptor that stays valid")]
    pub(super) fn new(listener: TcpListener) -> io::Result<Self> {
        let listener = mio::net::TcpListener::from_std(listener.into_std()?);
        // SAFETY: the listener owns its descriptor, keeps it open until it is dropped and always names the same one.
        let listener = unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) };
        listener.map(Self).map_err(|error| error.into_parts().1)
    }

    /// Cancel safe.
    pub(super) async fn accept(&self) -> io::Result<(Socket, SocketAddr)> {
        let (socket, peer) = self.0.async_io(Interest::READABLE, mio::net::TcpListener::accept).await?;
        Ok((Socket::New(socket), peer))
    }
}

pub(super) enum Socket {
    New(mio::net::TcpStream),
    Watched(TcpStream),
    /// Tokio could not watch it.
    Lost,
}

impl Socket {
    pub(super) fn into_std(self) -> io::Result<net::TcpStream> {
        match self {
            Self::New(socket) => Ok(socket.into()),
            Self::Watched(socket) => socket.into_std(),
            Self::Lost => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// From now on in tokio's epoll.
    fn watched(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        if matches!(self, Self::New(_)) {
            let socket = mem::replace(self, Self::Lost).into_std()?;
            *self = Self::Watched(TcpStream::from_std(socket)?);
        }
        match self {
            Self::Watched(socket) => Ok(Pin::new(socket)),
            Self::New(_) | Self::Lost => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// The result, if the socket is new and need not be waited for.
    fn immediately<T>(
        &mut self,
        operation: impl FnOnce(&mut mio::net::TcpStream) -> io::Result<T>,
    ) -> Option<io::Result<T>> {
        let Self::New(socket) = self else { return None };
        let result = operation(socket);
        let waits = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
        };
        (!result.as_ref().is_err_and(waits)).then_some(result)
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read_first = |socket: &mut mio::net::TcpStream| {
            let mut bytes = [0; READ_FIRST];
            let length = READ_FIRST.min(buf.remaining());
            let count = socket.read(&mut bytes[..length])?;
            buf.put_slice(&bytes[..count]);
            Ok(())
        };
        match self.immediately(read_first) {
            Some(read) => Poll::Ready(read),
            None => self.watched()?.poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.immediately(|socket| socket.write(buf)) {
            Some(written) => Poll::Ready(written),
            None => self.watched()?.poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.immediately(|socket| socket.write_vectored(bufs)) {
            Some(written) => Poll::Ready(written),
            None => self.watched()?.poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.watched()?.poll_shutdown(cx)
    }
}
