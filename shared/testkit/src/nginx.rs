//! A real nginx in front of the services, as in production: the one origin that browsers know. Plain HTTP/1.1, or TLS with
//! HTTP/2; its buffering and its idea of a dead upstream are its defaults, because deployments use those. A bench also has it in
//! the place of the Service by which gateways reach `api`, and removes stopping replicas as a cluster does.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    process::{Command, Stdio},
    sync::Arc,
};

use nix::sys::resource::{Resource, getrlimit};
use tempfile::TempDir;

use crate::{
    http::Client,
    process::{Process, Signal},
    programs,
    service::{Log, Service},
    until,
    usage::Cpu,
};

/// An origin that is not open yet: services need its name to start, and nginx needs their addresses.
pub struct Front {
    listener: TcpListener,
    tls: bool,
    origin: String,
}

impl Front {
    pub fn plain() -> Self {
        Self::new("http")
    }

    pub fn tls() -> Self {
        Self::new("https")
    }

    fn new(scheme: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("a bound socket has an address").port();
        Self { listener, tls: scheme == "https", origin: format!("{scheme}://localhost:{port}") }
    }

    /// Browsers use another address: there is a proxy in between.
    pub fn known_as(self, origin: &str) -> Self {
        Self { origin: origin.to_owned(), ..self }
    }

    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().expect("a bound socket has an address")
    }

    pub fn origin(&self) -> String {
        self.origin.clone()
    }

    pub async fn open(self, apis: &[&Service], gateways: &[&Service]) -> Nginx {
        let public =
            |services: &[&Service]| services.iter().map(|service| service.public()).collect::<Vec<_>>();
        self.open_at(&public(apis), &public(gateways)).await
    }

    pub async fn open_at(self, apis: &[SocketAddr], gateways: &[SocketAddr]) -> Nginx {
        let (address, tls) = (self.address(), self.tls);
        drop(self.listener);
        let (apis, gateways) = (apis.to_vec(), gateways.to_vec());
        Nginx::start(Upstreams { address, tls, apis, gateways, replicated: None }).await
    }
}

pub struct Upstreams {
    pub address: SocketAddr,
    pub tls: bool,
    pub apis: Vec<SocketAddr>,
    pub gateways: Vec<SocketAddr>,
    pub replicated: Option<Replicated>,
}

/// For replicas that come and go under load, as in `docs/deploy.md`.
pub struct Replicated {
    pub address: SocketAddr,
    pub apis: Vec<SocketAddr>,
}

pub struct Nginx {
    process: Process,
    folder: TempDir,
    log: Arc<Log>,
    upstreams: Upstreams,
    generation: u32,
    client: Client,
}

impl Nginx {
    pub async fn start(upstreams: Upstreams) -> Self {
        let folder = tempfile::Builder::new().prefix("test-nginx-").tempdir().expect("a temporary folder");
        if upstreams.tls {
            let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
            let key = made.signing_key.serialize_pem();
            for (name, text) in [("cert.pem", made.cert.pem()), ("key.pem", key)] {
                fs::write(folder.path().join(name), text).expect("a file in our own folder");
            }
        }
        let log = Arc::new(Log::of("nginx".into()));
        write_config(&folder, &upstreams, &[], 0);
        let process = run(&folder, &log);
        let mut nginx = Self { process, folder, log, upstreams, generation: 0, client: Client::default() };
        nginx.until_open().await;
        nginx
    }

    pub fn address(&self) -> SocketAddr {
        self.upstreams.address
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }

    pub async fn restart(&mut self) {
        self.process.kill();
        self.process = run(&self.folder, &self.log);
        self.until_open().await;
    }

    /// Sends nothing new to these addresses. Connections that they have continue: the old workers stay as long as those do.
    pub async fn leave_out(&mut self, away: &[IpAddr]) {
        self.generation += 1;
        write_config(&self.folder, &self.upstreams, away, self.generation);
        self.process.signal(Signal::SIGHUP);
        let url = format!("http://{}/generation", self.address());
        let wanted = self.generation.to_string();
        until("nginx takes its new configuration", || async {
            let answer = self.client.get(&url).header("connection", "close").send().await;
            answer.is_ok_and(|answer| answer.text() == wanted)
        })
        .await;
    }

    pub fn cpu(&self) -> io::Result<Cpu> {
        Cpu::of_family(self.process.id())
    }

    /// Its errors about replicas that it could not reach, with their counts.
    pub fn complaints(&self) -> Vec<(&'static str, usize)> {
        let log = self.log.lines();
        let times = |what: &'static str| (what, log.iter().filter(|line| line.contains(what)).count());
        let kinds = ["Connection refused", "prematurely closed", "Connection reset", "timed out"];
        let kinds = kinds.into_iter().chain(["no live upstreams"]).map(times);
        kinds.filter(|(_, times)| *times > 0).collect()
    }

    async fn until_open(&mut self) {
        let (address, log, process) = (self.upstreams.address, &self.log, &mut self.process);
        until("nginx takes connections", || {
            assert!(process.ended().is_none(), "nginx does not start: {:#?}", log.lines());
            std::future::ready(TcpStream::connect(address).is_ok())
        })
        .await;
    }
}

fn run(folder: &TempDir, log: &Arc<Log>) -> Process {
    let folder = folder.path();
    let mut command = Command::new(programs::nginx());
    command.arg("-p").arg(folder).arg("-c").arg(folder.join("nginx.conf")).args(["-e", "stderr"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut process = Process::start_family(&mut command).expect("nginx can be started");
    log.follow(process.child().stderr.take().expect("stderr is piped"));
    process
}

fn write_config(folder: &TempDir, upstreams: &Upstreams, away: &[IpAddr], generation: u32) {
    let path = folder.path().join("nginx.conf");
    fs::write(path, config(folder, upstreams, away, generation)).expect("a file in our own folder");
}

fn config(folder: &TempDir, upstreams: &Upstreams, away: &[IpAddr], generation: u32) -> String {
    let folder = folder.path().display();
    let upstream = |addresses: &[SocketAddr]| {
        let server = |address: &SocketAddr| match (&upstreams.replicated, away.contains(&address.ip())) {
            // The default of ten seconds is long for a test.
            (None, _) => format!("server {address} fail_timeout=1s;"),
            (Some(_), false) => format!("server {address} max_fails=0;"),
            (Some(_), true) => format!("server {address} max_fails=0 down;"),
        };
        addresses.iter().map(server).collect::<String>()
    };
    let (listen, certificate) = if upstreams.tls {
        ("ssl http2", format!("ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;"))
    } else {
        ("", String::new())
    };
    let (mut process, mut connections) = ("master_process off;".to_owned(), 1_024);
    let (mut listen_more, mut keepalive, mut goodbye, mut at_stream) = ("", "", "", "");
    let mut internal = String::new();
    if let Some(replicated) = &upstreams.replicated {
        let (_, files) = getrlimit(Resource::RLIMIT_NOFILE).expect("every process has this limit");
        let user = if nix::unistd::geteuid().is_root() { "user root;" } else { "" };
        process = format!("{user} worker_processes 2; worker_rlimit_nofile {files};");
        connections = files.min(20_000);
        listen_more = "reuseport backlog=4096";
        keepalive = "keepalive 32; keepalive_timeout 30s;";
        at_stream = "error_page 502 503 504 =200 @nobody;";
        goodbye = r#"location @nobody {
                    default_type "text/event-stream; charset=utf-8";
                    return 200 'retry: $retry\nevent: goodbye\ndata: {"reason":"drain","reconnect":true}\n\n';
                }"#;
        internal = format!(
            "split_clients $request_id $retry {{ 14% 2000; 14% 2500; 14% 3000; 14% 3500; 14% 4000; 14% 4500; * 5000; }}
            proxy_connect_timeout 5s;
            upstream internal {{ {apis} {keepalive} }}
            server {{
                listen {address};
                proxy_set_header Connection '';
                client_max_body_size 8m;
                client_body_buffer_size 1m;
                location / {{
                    proxy_pass http://internal;
                    proxy_next_upstream error timeout non_idempotent;
                }}
            }}",
            apis = upstream(&replicated.apis),
            address = replicated.address,
        );
    }
    format!(
        "daemon off;
        {process}
        pid {folder}/pid;
        error_log stderr error;
        events {{ worker_connections {connections}; }}
        http {{
            access_log off;
            client_body_temp_path {folder}/body;
            proxy_temp_path {folder}/proxy;
            fastcgi_temp_path {folder}/fastcgi;
            uwsgi_temp_path {folder}/uwsgi;
            scgi_temp_path {folder}/scgi;
            upstream apis {{ {apis} {keepalive} }}
            upstream gateways {{ {gateways} }}
            proxy_http_version 1.1;
            {internal}
            server {{
                listen {address} {listen} {listen_more};
                {certificate}
                location = /generation {{ return 200 {generation}; }}
                proxy_set_header Connection '';
                proxy_set_header Host $http_host;
                proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
                location = /api/messages {{ proxy_pass http://gateways; {at_stream} }}
                {goodbye}
                location / {{ proxy_pass http://apis; }}
            }}
        }}
        ",
        address = upstreams.address,
        apis = upstream(&upstreams.apis),
        gateways = upstream(&upstreams.gateways),
    )
}
