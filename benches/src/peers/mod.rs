//! Other servers of event streams, as Debian has them, with their own ways to publish.

mod events;
mod grip;

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::sys::resource::{Resource, getrlimit};
use serde_json::json;
use tempfile::TempDir;
use testkit::{
    ports::free_ports,
    process::Process,
    programs,
    servers::Redis,
    usage::{self, Cpu, Memory},
};

pub use self::events::PeerEvents;
use self::grip::GripBackend;
use crate::{
    clock::Micros,
    publisher::{Publisher, Window, Wire, zmtp},
};

const NCHAN: &str = "/usr/lib/nginx/modules/ngx_nchan_module.so";
const PUSHPIN: &str = "/usr/lib/pushpin/internal.conf";
const PATIENCE: Duration = Duration::from_secs(20);
/// Publishers' connections to nginx, which answers a connection's requests one after the other. A channel keeps to one, so that its
/// events stay in order.
const HTTP_CONNECTIONS: usize = 16;
/// Open files of a server besides its streams.
const SPARE_FILES: u64 = 500;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// nginx with nchan: messages in its shared memory or in Redis; one worker, or one per core as in Debian.
    Nchan {
        redis: bool,
        one_worker: bool,
    },
    Pushpin,
}

impl Peer {
    /// What to install, if it is not there.
    pub fn missing(self) -> Option<&'static str> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        match self {
            Self::Nchan { .. } => (!Path::new(NCHAN).exists()).then_some("nginx, libnginx-mod-nchan"),
            Self::Pushpin => {
                let programs = ["pushpin", "condure", "zurl"];
                let there = Path::new(PUSHPIN).exists()
                    && programs.iter().all(|name| programs::on_path(&path, &[name]).is_some());
                (!there).then_some("pushpin, condure, zurl")
            }
        }
    }
}

pub struct PeerServer {
    peer: Peer,
    process: Process,
    address: SocketAddr,
    publish_address: SocketAddr,
    redis: Option<Redis>,
    _backend: Option<GripBackend>,
    /// Last, because the process writes to it.
    _folder: TempDir,
}

impl PeerServer {
    pub fn start(peer: Peer) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("bench-peer-").tempdir()?;
        let [public, publish, subscribe, http, control] = free_ports()?;
        let at = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let redis = matches!(peer, Peer::Nchan { redis: true, .. }).then(Redis::start);
        let backend = (peer == Peer::Pushpin).then(GripBackend::start).transpose()?;
        let (_, files) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let connections = files.saturating_sub(SPARE_FILES);
        let mut command = match &backend {
            None => {
                let path = folder.path().join("nginx.conf");
                let one_worker = matches!(peer, Peer::Nchan { one_worker: true, .. });
                let workers = if one_worker { "1" } else { "auto" };
                let limits = [files, connections];
                fs::write(&path, nginx_config(folder.path(), at(public), redis.as_ref(), workers, limits))?;
                let mut command = Command::new(programs::nginx());
                command.arg("-p").arg(folder.path()).arg("-c").arg(path).args(["-e", "stderr"]);
                command
            }
            Some(backend) => {
                let path = folder.path().join("pushpin.conf");
                let ports = [publish, subscribe, http, control];
                fs::write(&path, pushpin_config(folder.path(), at(public), ports, connections))?;
                fs::write(folder.path().join("routes"), format!("* {}\n", backend.address()))?;
                let mut command = Command::new("pushpin");
                command.arg("--config").arg(path);
                command
            }
        };
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = Process::start_family(&mut command)?;
        let publish_address = at(if peer == Peer::Pushpin { publish } else { public });
        let mut server = Self {
            peer,
            process,
            address: at(public),
            publish_address,
            redis,
            _backend: backend,
            _folder: folder,
        };
        server.wait()?;
        Ok(server)
    }

    fn wait(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while [self.address, self.publish_address].iter().any(|address| TcpStream::connect(address).is_err())
        {
            anyhow::ensure!(self.process.ended().is_none(), "{:?} ends at its start", self.peer);
            anyhow::ensure!(Instant::now() < deadline, "{:?} does not listen", self.peer);
            std::thread::sleep(Duration::from_millis(20));
        }
        // nchan's connections to Redis are made meanwhile.
        std::thread::sleep(Duration::from_secs(1));
        Ok(())
    }

    /// Connections that it can open at a time: Pushpin answers 502 to many more.
    pub fn opens_at_once(&self) -> usize {
        if self.peer == Peer::Pushpin { 50 } else { 1_000 }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn cpu(&self) -> anyhow::Result<Cpu> {
        Ok(Cpu::of_family(self.process.id())?)
    }

    pub fn broker_cpu(&self) -> anyhow::Result<Option<Cpu>> {
        Ok(self.redis.as_ref().map(|redis| Cpu::of(redis.id())).transpose()?)
    }

    /// PSS of all its processes.
    pub fn memory(&self) -> anyhow::Result<u64> {
        let children = usage::children(self.process.id())?;
        let family = std::iter::once(self.process.id()).chain(children);
        family.map(|process| Ok(Memory::of(process)?.pss)).sum()
    }

    pub fn broker_memory(&self) -> anyhow::Result<Option<u64>> {
        Ok(self.redis.as_ref().map(|redis| Memory::of(redis.id())).transpose()?.map(|memory| memory.pss))
    }

    fn wire(&self) -> (Wire, usize) {
        match self.peer {
            Peer::Nchan { .. } => (Wire::Http, HTTP_CONNECTIONS),
            Peer::Pushpin => (Wire::Zmtp, 1),
        }
    }

    fn publisher(&self, since: Micros, window: Option<Window>) -> anyhow::Result<Publisher> {
        let (wire, connections) = self.wire();
        Publisher::start(wire, self.publish_address, connections, since, window)
    }

    fn write_command(&self, channel: u64, message: &str, to: &mut Vec<u8>) {
        if self.wire().0 == Wire::Zmtp {
            let content = format!("data: {message}\n\n");
            let formats = json!({ "http-stream": { "content": content } });
            let item = json!({ "channel": channel.to_string(), "formats": formats });
            return zmtp::write_message(format!("J{item}").as_bytes(), to);
        }
        let (address, length) = (self.address, message.len());
        let head =
            format!("POST /pub/{channel} HTTP/1.1\r\nHost: {address}\r\nContent-Length: {length}\r\n\r\n");
        to.extend_from_slice(head.as_bytes());
        to.extend_from_slice(message.as_bytes());
    }
}

/// nchan's defaults, except for limits that ten thousand channels would reach. Nothing is logged.
fn nginx_config(
    folder: &Path,
    address: SocketAddr,
    redis: Option<&Redis>,
    workers: &str,
    [files, connections]: [u64; 2],
) -> String {
    let folder = folder.display();
    let user = if nix::unistd::geteuid().is_root() { "user root;" } else { "" };
    let (upstream, pass) = match redis {
        Some(redis) => (
            format!("upstream redis {{ nchan_redis_server {}; }}", redis.url().trim_end_matches('/')),
            "nchan_redis_pass redis;",
        ),
        None => (String::new(), ""),
    };
    format!(
        "load_module {NCHAN};
        daemon off;
        {user}
        worker_processes {workers};
        worker_rlimit_nofile {files};
        pid {folder}/pid;
        error_log stderr crit;
        events {{ worker_connections {connections}; }}
        http {{
            access_log off;
            client_body_temp_path {folder}/body;
            proxy_temp_path {folder}/proxy;
            fastcgi_temp_path {folder}/fastcgi;
            uwsgi_temp_path {folder}/uwsgi;
            scgi_temp_path {folder}/scgi;
            keepalive_requests 100000000;
            nchan_shared_memory_size 1g;
            {upstream}
            server {{
                listen {address} backlog=4096;
                location ~ ^/sub/(\\w+)$ {{
                    nchan_subscriber eventsource;
                    nchan_subscriber_first_message newest;
                    nchan_channel_id $1;
                    {pass}
                }}
                location ~ ^/pub/(\\w+)$ {{
                    nchan_publisher;
                    nchan_channel_id $1;
                    {pass}
                }}
            }}
        }}
        "
    )
}

/// Debian's settings, without its `message_rate`, which delays messages beyond 2,500 a second. zurl, which asks the backend, is among
/// its own processes instead of a service of the system. Only warnings are logged.
fn pushpin_config(folder: &Path, address: SocketAddr, ports: [u16; 4], connections: u64) -> String {
    let (folder, [publish, subscribe, http, control]) = (folder.display(), ports);
    format!(
        "[global]
include={{libdir}}/internal.conf
rundir={folder}
ipc_prefix=p-
port_offset=0

[runner]
services=condure,zurl,pushpin-proxy,pushpin-handler
http_port={address}
logdir={folder}
log_level=1
client_buffer_size=8192
client_maxconn={connections}
condure_bin=condure
zurl_bin=zurl

[proxy]
routesfile=routes
zurl_out_specs=ipc://{{rundir}}/{{ipc_prefix}}zurl-in
zurl_out_stream_specs=ipc://{{rundir}}/{{ipc_prefix}}zurl-in-stream
zurl_in_specs=ipc://{{rundir}}/{{ipc_prefix}}zurl-out
updates_check=off

[handler]
push_in_spec=tcp://127.0.0.1:{publish}
push_in_sub_specs=tcp://127.0.0.1:{subscribe}
push_in_http_addr=127.0.0.1
push_in_http_port={http}
command_spec=tcp://127.0.0.1:{control}
message_wait=5000
connection_subscription_max=20
"
    )
}
