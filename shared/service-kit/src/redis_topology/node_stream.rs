//! The bytes of a connection to one node. The redis library connects in the same way, but keeps the stream to itself.

use std::{net::SocketAddr, sync::Arc};

use futures_util::future::select_ok;
use redis::{ConnectionAddr, ConnectionInfo, ErrorKind, RedisConnectionInfo, RedisError, RedisResult};
use rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream, lookup_host},
};
use tokio_rustls::TlsConnector;

/// Plain or encrypted.
pub trait NodeStream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> NodeStream for S {}

/// Where a node is, and how to connect to it.
pub struct NodeAddress {
    info: ConnectionInfo,
    tls: Option<Arc<ClientConfig>>,
}

impl NodeAddress {
    /// Reads the trusted certificates, if they are needed.
    pub(super) fn new(info: ConnectionInfo) -> RedisResult<Self> {
        let tls = match info.addr() {
            ConnectionAddr::TcpTls { insecure: false, .. } => Some(Arc::new(trusting_the_system())),
            ConnectionAddr::TcpTls { insecure: true, .. } => {
                return Err(
                    (ErrorKind::InvalidClientConfig, "TLS without verification is not supported").into()
                );
            }
            _ => None,
        };
        Ok(Self { info, tls })
    }

    /// User, password and database.
    pub fn login(&self) -> &RedisConnectionInfo {
        self.info.redis_settings()
    }

    /// Connects to the address that answers first. The stream belongs to the runtime that runs this.
    pub async fn connect(&self) -> RedisResult<Box<dyn NodeStream>> {
        match (self.info.addr(), &self.tls) {
            (ConnectionAddr::TcpTls { host, port, .. }, Some(tls)) => {
                let name = ServerName::try_from(host.clone()).map_err(|_| {
                    RedisError::from((ErrorKind::InvalidClientConfig, "TLS needs the name of a host"))
                })?;
                let connector = TlsConnector::from(tls.clone());
                Ok(Box::new(connector.connect(name, connect(host, *port).await?).await?))
            }
            (ConnectionAddr::Tcp(host, port), _) => Ok(Box::new(connect(host, *port).await?)),
            (ConnectionAddr::Unix(path), _) => Ok(Box::new(UnixStream::connect(path).await?)),
            _ => Err((ErrorKind::InvalidClientConfig, "cannot connect to this kind of address").into()),
        }
    }
}

async fn connect(host: &str, port: u16) -> RedisResult<TcpStream> {
    let addresses: Vec<SocketAddr> = lookup_host((host, port)).await?.collect();
    if addresses.is_empty() {
        return Err((ErrorKind::Io, "the name has no address").into());
    }
    let attempts = addresses.into_iter().map(|address| Box::pin(TcpStream::connect(address)));
    let (stream, _) = select_ok(attempts).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Trusts the certificates of the system, or those of `SSL_CERT_FILE` and `SSL_CERT_DIR`.
fn trusting_the_system() -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring supports the default TLS versions");
    config.with_root_certificates(roots).with_no_client_auth()
}
