//! TLS as an operator has it: an authority of one's own, a certificate by it that is good for `localhost` and for no other
//! name, and a door that speaks TLS in front of a server that does not.

use std::{fs, net::SocketAddr, path::PathBuf, sync::Arc};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use tempfile::TempDir;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer},
    },
};

pub struct Authority {
    folder: TempDir,
    server: CertificateDer<'static>,
    server_key: KeyPair,
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

impl Authority {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut own = CertificateParams::default();
        // Its own name, so that another authority is not taken for this one with a wrong signature.
        own.distinguished_name.push(DnType::CommonName, folder.path().display().to_string());
        own.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        own.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let own_key = KeyPair::generate().expect("a key can be made");
        let root = own.self_signed(&own_key).expect("an authority signs itself");
        let server_key = KeyPair::generate().expect("a key can be made");
        let server = CertificateParams::new(["localhost".to_owned()])
            .and_then(|server| server.signed_by(&server_key, &Issuer::new(own, own_key)))
            .expect("an authority signs for a name");
        for (name, text) in
            [("ca.pem", root.pem()), ("server.pem", server.pem()), ("server.key", server_key.serialize_pem())]
        {
            fs::write(folder.path().join(name), text).expect("the folder can be written to");
        }
        Self { server: server.der().clone(), folder, server_key }
    }

    pub fn root(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    pub(crate) fn server_certificate(&self) -> PathBuf {
        self.folder.path().join("server.pem")
    }

    pub(crate) fn server_key(&self) -> PathBuf {
        self.folder.path().join("server.key")
    }

    fn acceptor(&self) -> TlsAcceptor {
        let key = PrivateKeyDer::try_from(self.server_key.serialize_der()).expect("a key of ours");
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("ring knows the usual versions")
            .with_no_client_auth()
            .with_single_cert(vec![self.server.clone()], key)
            .expect("the certificate is the key's");
        TlsAcceptor::from(Arc::new(config))
    }
}

/// Terminates TLS; a plain connection is closed.
pub struct Door {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Door {
    pub async fn start(upstream: SocketAddr, authority: &Authority) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let acceptor = authority.acceptor();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                connections.spawn(async move {
                    let mut inside = acceptor.accept(socket).await?;
                    let mut server = TcpStream::connect(upstream).await?;
                    copy_bidirectional(&mut inside, &mut server).await
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Self { address, task }
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.task.abort();
    }
}
