//! The fault proxy: a TCP proxy that can be slow, cut connections after some bytes, swallow everything, refuse, or change its
//! target.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Semaphore, watch},
    task::{JoinHandle, JoinSet},
    time::sleep,
};

use crate::until;

const CONNECTIONS: usize = 1_024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LinkFault {
    None,
    /// Delays each piece, both ways.
    Slow(Duration),
    /// Accepts connections and forwards nothing: a dead link.
    Silent,
    /// Nothing listens, and connections are reset.
    Refusing,
}

#[derive(Debug, Clone)]
struct ProxyState {
    upstream: SocketAddr,
    fault: LinkFault,
    /// A new connection is reset after this many bytes to the client.
    budget: Option<u64>,
    /// A connection is reset after this text.
    last_text: Option<&'static str>,
    /// Held by all present connections; replaced to reset them.
    generation: Arc<()>,
}

pub struct Proxy {
    address: SocketAddr,
    state: watch::Sender<ProxyState>,
    task: JoinHandle<()>,
}

impl Proxy {
    pub async fn start(upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let (state, watched) = watch::channel(ProxyState {
            upstream,
            fault: LinkFault::None,
            budget: None,
            last_text: None,
            generation: Arc::default(),
        });
        let task = tokio::spawn(accept(listener, watched));
        Self { address, state, task }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn resume(&self) {
        self.state.send_modify(|state| {
            (state.fault, state.budget, state.last_text) = (LinkFault::None, None, None);
        });
    }

    pub fn slow(&self, by: Duration) {
        self.state.send_modify(|state| state.fault = LinkFault::Slow(by));
    }

    pub fn silence(&self) {
        self.state.send_modify(|state| state.fault = LinkFault::Silent);
    }

    pub fn refuse(&self) {
        self.state.send_modify(|state| {
            state.fault = LinkFault::Refusing;
            state.generation = Arc::default();
        });
    }

    pub fn cut(&self) {
        self.state.send_modify(|state| state.generation = Arc::default());
    }

    /// Resets all connections, and returns when they are gone.
    pub async fn cut_all(&self) {
        let old = Arc::downgrade(&self.state.borrow().generation);
        self.cut();
        until("all connections are reset", || async { old.strong_count() == 0 }).await;
    }

    pub fn cut_after(&self, bytes: u64) {
        self.state.send_modify(|state| state.budget = Some(bytes));
    }

    /// From now on each connection is reset as soon as it has carried this text, and carries nothing after it.
    pub fn cut_behind(&self, text: &'static str) {
        self.state.send_modify(|state| state.last_text = Some(text));
    }

    pub fn aim(&self, upstream: SocketAddr) {
        self.state.send_modify(|state| state.upstream = upstream);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, mut state: watch::Receiver<ProxyState>) {
    let address = listener.local_addr().expect("a bound socket has an address");
    let mut listener = Some(listener);
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new(); // Aborted with this task.
    loop {
        if state.borrow_and_update().fault == LinkFault::Refusing {
            listener = None;
        } else if listener.is_none() {
            listener = Some(listen_again(address).await);
        }
        let accepted = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            accepted = accepted => {
                let Ok((client, _)) = accepted else { continue };
                let Ok(permit) = permits.clone().try_acquire_owned() else { continue };
                let state = state.clone();
                connections.spawn(async move {
                    let _ = carry(client, state).await; // Broken connections are the purpose.
                    drop(permit);
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn listen_again(address: SocketAddr) -> TcpListener {
    loop {
        // Tokio sets SO_REUSEADDR, so old connections do not prevent this.
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn carry(client: TcpStream, mut state: watch::Receiver<ProxyState>) -> io::Result<()> {
    let begun = state.borrow_and_update().clone();
    end_by_reset(&client, true)?;
    client.set_nodelay(true)?;
    open_again(&mut state).await;
    let upstream = state.borrow().upstream;
    let upstream = TcpStream::connect(upstream).await?;
    end_by_reset(&upstream, true)?;
    upstream.set_nodelay(true)?;
    let (from_client, to_client) = client.into_split();
    let (from_upstream, to_upstream) = upstream.into_split();
    let mut cut = state.clone();
    let both = async {
        tokio::try_join!(
            pump(from_client, to_upstream, state.clone(), None),
            pump(from_upstream, to_client, state, begun.budget),
        )
    };
    tokio::select! {
        result = both => result.map(drop),
        _ = cut.wait_for(|now| !Arc::ptr_eq(&now.generation, &begun.generation)) => Ok(()),
    }
}

/// With a reset, bytes that are still under way never arrive.
fn end_by_reset(socket: &TcpStream, reset: bool) -> io::Result<()> {
    socket2::SockRef::from(socket).set_linger(reset.then_some(Duration::ZERO))
}

async fn open_again(state: &mut watch::Receiver<ProxyState>) {
    let _ = state.wait_for(|now| now.fault != LinkFault::Silent).await;
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut state: watch::Receiver<ProxyState>,
    mut budget: Option<u64>,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    // The end of the bytes so far, because the text may come in two pieces.
    let mut recent = Vec::new();
    loop {
        // Does not even read, so that the sender's buffers fill as on a dead link.
        open_again(&mut state).await;
        let length = tokio::select! {
            length = from.read(&mut buffer) => length?,
            _ = state.wait_for(|now| now.fault == LinkFault::Silent) => continue,
        };
        if length == 0 {
            // An orderly end is passed on as one.
            end_by_reset(to.as_ref(), false)?;
            return to.shutdown().await;
        }
        let fault = state.borrow().fault;
        if let LinkFault::Slow(by) = fault {
            sleep(by).await;
        }
        open_again(&mut state).await;
        let mut length =
            budget.map_or(length, |left| length.min(usize::try_from(left).unwrap_or(usize::MAX)));
        let last_text = state.borrow().last_text;
        let cut = last_text.and_then(|text| end_of(text, &mut recent, &buffer[..length]));
        length = cut.unwrap_or(length);
        to.write_all(&buffer[..length]).await?;
        if let Some(left) = &mut budget {
            *left -= length as u64;
        }
        if cut.is_some() || budget == Some(0) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
    }
}

/// Where in `piece` the text ends; it may begin in `recent`, the end of the pieces before.
fn end_of(text: &str, recent: &mut Vec<u8>, piece: &[u8]) -> Option<usize> {
    let before = recent.len();
    recent.extend_from_slice(piece);
    let at = recent.windows(text.len()).position(|window| window == text.as_bytes());
    let end = at.map(|at| (at + text.len()).saturating_sub(before));
    recent.drain(..recent.len().saturating_sub(text.len() - 1));
    end
}
