//! A real nginx in front of the services: the one origin that browsers know, as in production. Plain HTTP/1.1, or TLS with
//! HTTP/2; its buffering and its idea of a dead upstream are its defaults, because people have those.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use tempfile::TempDir;
use testkit::{process::Process, until};

use crate::{Service, service::Log, settings};

/// An origin that is not open yet: the services must be told it before they start, nginx needs them to have.
pub struct Front {
    /// Holds the port.
    listener: TcpListener,
    tls: bool,
    origin: String,
}

impl Front {
    pub fn plain() -> Self {
        Self::new(false)
    }

    /// With a certificate that nobody knows.
    pub fn tls() -> Self {
        Self::new(true)
    }

    fn new(tls: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("a bound socket has an address").port();
        let scheme = if tls { "https" } else { "http" };
        Self { listener, tls, origin: format!("{scheme}://localhost:{port}") }
    }

    /// Browsers come by another address: there is something on the way.
    pub fn known_as(self, origin: &str) -> Self {
        Self { origin: origin.to_owned(), ..self }
    }

    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().expect("a bound socket has an address")
    }

    pub fn origin(&self) -> String {
        self.origin.clone()
    }

    /// Streams go to the gateways, everything else to the apis.
    pub async fn open(self, apis: &[&Service], gateways: &[&Service]) -> Nginx {
        let public = |services: &[&Service]| Vec::from_iter(services.iter().map(|service| service.public()));
        self.open_at(&public(apis), &public(gateways)).await
    }

    /// The same, wherever they are: there may be something between.
    pub async fn open_at(self, apis: &[SocketAddr], gateways: &[SocketAddr]) -> Nginx {
        let (address, tls) = (self.address(), self.tls);
        drop(self.listener);
        let folder = tempfile::Builder::new().prefix("test-nginx-").tempdir().expect("a temporary folder");
        if tls {
            let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
            std::fs::write(folder.path().join("cert.pem"), made.cert.pem())
                .expect("a file in our own folder");
            let key = made.signing_key.serialize_pem();
            std::fs::write(folder.path().join("key.pem"), key).expect("a file in our own folder");
        }
        let config = config(folder.path(), address, tls, apis, gateways);
        std::fs::write(folder.path().join("nginx.conf"), config).expect("a file in our own folder");
        let log = Arc::new(Log::of("nginx".into()));
        let mut nginx = Nginx { process: start(folder.path(), &log), address, folder, log };
        nginx.until_open().await;
        nginx
    }
}

pub struct Nginx {
    process: Process,
    address: SocketAddr,
    folder: TempDir,
    log: Arc<Log>,
}

impl Nginx {
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Cuts every connection, and nobody listens.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// At the same address.
    pub async fn restart(&mut self) {
        self.process.kill();
        self.process = start(self.folder.path(), &self.log);
        self.until_open().await;
    }

    async fn until_open(&mut self) {
        let (address, log, process) = (self.address, &self.log, &mut self.process);
        until("nginx takes connections", || {
            assert!(process.ended().is_none(), "nginx does not start: {:#?}", log.lines());
            std::future::ready(TcpStream::connect(address).is_ok())
        })
        .await;
    }
}

/// One process, which dies with the test: workers would outlive a master that is killed.
fn start(folder: &Path, log: &Arc<Log>) -> Process {
    let mut command = Command::new(settings::program("DEV_NGINX", "nginx", "Debian: apt install nginx"));
    command.arg("-p").arg(folder).arg("-c").arg(folder.join("nginx.conf")).args(["-e", "stderr"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut process = Process::start(&mut command).expect("nginx can be started");
    log.follow(process.child().stderr.take().expect("stderr is piped"));
    process
}

fn config(
    folder: &Path,
    address: SocketAddr,
    tls: bool,
    apis: &[SocketAddr],
    gateways: &[SocketAddr],
) -> String {
    let folder = folder.display();
    let upstream = |addresses: &[SocketAddr]| {
        // Tried again soon: in a test a minute is long.
        let server = |address: &SocketAddr| format!("server {address} fail_timeout=1s;");
        addresses.iter().map(server).collect::<Vec<_>>().join(" ")
    };
    let (listen, certificate) = if tls {
        (" ssl http2", format!("ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;"))
    } else {
        ("", String::new())
    };
    format!(
        "daemon off;
        master_process off;
        pid {folder}/pid;
        error_log stderr warn;
        events {{ worker_connections 1024; }}
        http {{
            access_log off;
            client_body_temp_path {folder}/body;
            proxy_temp_path {folder}/proxy;
            fastcgi_temp_path {folder}/fastcgi;
            uwsgi_temp_path {folder}/uwsgi;
            scgi_temp_path {folder}/scgi;
            upstream apis {{ {apis} }}
            upstream gateways {{ {gateways} }}
            server {{
                listen {address}{listen};
                {certificate}
                proxy_http_version 1.1;
                proxy_set_header Connection '';
                proxy_set_header Host $http_host;
                proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
                location = /api/messages {{ proxy_pass http://gateways; }}
                location / {{ proxy_pass http://apis; }}
            }}
        }}
        ",
        apis = upstream(apis),
        gateways = upstream(gateways),
    )
}
