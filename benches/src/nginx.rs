//! A real nginx as the one origin of REST and streams, and in the place of the Service by which gateways reach `api`. As in a
//! cluster it is told when a replica is told to stop and when one is ready; that one was killed it must find out by itself.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::sys::resource::{Resource, getrlimit};
use testkit::process::{Process, Signal};

use crate::{http, settings, usage::Cpu};

const WORKERS: usize = 2;
const CHANGES_WITHIN: Duration = Duration::from_secs(30);

/// Who is behind it.
pub struct Replicas {
    pub public: Vec<SocketAddr>,
    pub internal: Vec<SocketAddr>,
    pub gateways: Vec<SocketAddr>,
}

pub struct Nginx {
    process: Process,
    folder: PathBuf,
    address: Ipv4Addr,
    replicas: Replicas,
    /// Which configuration it was last given.
    generation: u32,
}

impl Nginx {
    /// `folder` is for its files.
    pub fn start(folder: &Path, address: Ipv4Addr, replicas: Replicas) -> anyhow::Result<Self> {
        let folder = folder.join("nginx");
        fs::create_dir(&folder)?;
        let mut command = Command::new(settings::nginx()?);
        command.arg("-p").arg(&folder).arg("-c").arg(folder.join("nginx.conf"));
        command.arg("-e").arg(folder.join("log"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        fs::write(folder.join("nginx.conf"), config(&folder, address, &replicas, &[], 0)?)?;
        let process = Process::start_family(&mut command).context("nginx cannot be started")?;
        let mut nginx = Self { process, folder, address, replicas, generation: 0 };
        nginx.until_changed()?;
        Ok(nginx)
    }

    pub fn origin(&self) -> SocketAddr {
        (self.address, PUBLIC).into()
    }

    /// Where gateways ask api.
    pub fn internal(&self) -> SocketAddr {
        (self.address, INTERNAL).into()
    }

    /// Those at these addresses get nothing new. What they have goes on: nginx starts new workers, and the old ones stay for as
    /// long as their connections do.
    pub fn leave_out(&mut self, away: &[Ipv4Addr]) -> anyhow::Result<()> {
        self.generation += 1;
        let config = config(&self.folder, self.address, &self.replicas, away, self.generation)?;
        fs::write(self.folder.join("nginx.conf"), config)?;
        self.process.signal(Signal::SIGHUP);
        self.until_changed()
    }

    pub fn cpu(&self) -> anyhow::Result<Cpu> {
        Cpu::of_family(self.process.id())
    }

    /// What it says about replicas that it could not reach, and how often.
    pub fn complaints(&self) -> anyhow::Result<Vec<(&'static str, usize)>> {
        let log = fs::read_to_string(self.folder.join("log"))?;
        let times = |what: &'static str| (what, log.lines().filter(|line| line.contains(what)).count());
        let kinds = [
            "Connection refused",
            "prematurely closed",
            "Connection reset",
            "timed out",
            "no live upstreams",
        ];
        Ok(kinds.map(times).into_iter().filter(|(_, times)| *times > 0).collect())
    }

    fn until_changed(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + CHANGES_WITHIN;
        let wanted = self.generation.to_string();
        while !http::get(self.origin(), "/generation").is_ok_and(|answer| answer.body == wanted) {
            let log = || fs::read_to_string(self.folder.join("log")).unwrap_or_default();
            if let Some(status) = self.process.ended() {
                anyhow::bail!("nginx ended with {status}: {}", log());
            }
            anyhow::ensure!(Instant::now() < deadline, "nginx does not take its configuration: {}", log());
            // Only its answers tell that the new workers are there.
            sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

const PUBLIC: u16 = 8080;
const INTERNAL: u16 = 8081;

fn config(
    folder: &Path,
    address: Ipv4Addr,
    replicas: &Replicas,
    away: &[Ipv4Addr],
    generation: u32,
) -> anyhow::Result<String> {
    let (_, files) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let connections = files.min(20_000);
    let user = if nix::unistd::geteuid().is_root() { "user root;" } else { "" };
    let folder = folder.display();
    let upstream = |servers: &[SocketAddr]| {
        let server = |server: &SocketAddr| {
            let down = if away.iter().any(|away| server.ip() == *away) { " down" } else { "" };
            format!("server {server} max_fails=0{down};")
        };
        servers.iter().map(server).collect::<Vec<_>>().join(" ")
    };
    // What a deployment needs of this, and why, is in docs/deploy.md.
    Ok(format!(
        "daemon off;
        {user}
        worker_processes {WORKERS};
        worker_rlimit_nofile {files};
        pid {folder}/pid;
        error_log {folder}/log error;
        events {{ worker_connections {connections}; }}
        http {{
            access_log off;
            client_body_temp_path {folder}/body;
            proxy_temp_path {folder}/proxy;
            fastcgi_temp_path {folder}/fastcgi;
            uwsgi_temp_path {folder}/uwsgi;
            scgi_temp_path {folder}/scgi;
            upstream public {{ {public} keepalive 32; keepalive_timeout 30s; }}
            upstream internal {{ {internal} keepalive 32; keepalive_timeout 30s; }}
            upstream gateways {{ {gateways} }}
            split_clients $request_id $retry {{ 14% 2000; 14% 2500; 14% 3000; 14% 3500; 14% 4000; 14% 4500; * 5000; }}
            proxy_http_version 1.1;
            proxy_connect_timeout 5s;
            server {{
                listen {address}:{PUBLIC} reuseport backlog=4096;
                location = /generation {{ return 200 {generation}; }}
                proxy_set_header Connection '';
                proxy_set_header Host $http_host;
                proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
                location = /api/messages {{
                    proxy_pass http://gateways;
                    error_page 502 503 504 =200 @nobody;
                }}
                location @nobody {{
                    default_type \"text/event-stream; charset=utf-8\";
                    return 200 'retry: $retry\\nevent: goodbye\\ndata: {{\"reason\":\"drain\",\"reconnect\":true}}\\n\\n';
                }}
                location / {{ proxy_pass http://public; }}
            }}
            server {{
                listen {address}:{INTERNAL};
                proxy_set_header Connection '';
                client_max_body_size 8m;
                client_body_buffer_size 1m;
                location / {{
                    proxy_pass http://internal;
                    proxy_next_upstream error timeout non_idempotent;
                }}
            }}
        }}
        ",
        public = upstream(&replicas.public),
        internal = upstream(&replicas.internal),
        gateways = upstream(&replicas.gateways),
    ))
}
