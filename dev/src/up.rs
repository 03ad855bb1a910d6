//! `cargo dev up`: everything, from the databases to the proxy in front, until Ctrl-C; stopped in reverse order.
//!
//! A process that ends is reported and not restarted: a developer wants to see it.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use testkit::ports::free_ports;
use testkit::secrets::signing_key;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::task::{JoinHandle, JoinSet};

use crate::cargo::{binaries, cargo};
use crate::demo::demo;
use crate::folders::Folders;
use crate::ingress::{self, Routes};
use crate::lifetime::Life;
use crate::process::{self, Child};
use crate::servers::{GivenServers, Servers};
use crate::state::{Lock, ProcessEntry, RunState};
use crate::stop::Stop;
use crate::terminal::{self, Colour};
use crate::{postgres, secrets};

const STOP_PATIENCE: Duration = Duration::from_secs(10);
const SEEDED: [&str; 2] = ["john", "jane"];

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Port on 127.0.0.1; the next free one if it is taken
    #[arg(long, default_value_t = 3000)]
    port: u16,
    /// Build and run optimised binaries
    #[arg(long)]
    release: bool,
}

pub(crate) async fn run(folders: &Folders, given: &GivenServers, options: &Options) -> Result<ExitCode> {
    let began = Instant::now();
    let dir = folders.up();
    let lock = Lock::take(&dir)?;
    let mut stop = Stop::listen()?;
    let mut running = RunningProcesses::default();
    let outcome = tokio::select! {
        outcome = running.start(folders, given, options, &lock) => outcome.map(Some),
        () = stop.requested() => Ok(None),
    };
    if let Ok(Some(address)) = &outcome {
        terminal::step("Ready", format_args!("in {:.1} s at {address}", began.elapsed().as_secs_f64()));
        terminal::answer(format_args!(
            "\n{address}\n\nOpen it, log in as john, and as jane in a private window. Or paste this into another terminal to see a message arrive:\n\n{}\nCtrl-C stops everything. Postgres and Redis log to .dev/up/*.log.\n",
            demo(address)
        ));
        running.watch(&mut stop).await;
    }
    terminal::step("Stopping", "everything");
    tokio::select! {
        () = running.stop() => {}
        // The children end with us.
        () = stop.requested() => terminal::warn("interrupted again; exiting immediately"),
    }
    outcome.map(|_| ExitCode::SUCCESS)
}

#[derive(Default)]
struct RunningProcesses {
    servers: Option<Servers>,
    api: Option<Child>,
    gateways: Vec<Child>,
    ingress: Option<JoinHandle<()>>,
}

impl RunningProcesses {
    /// Starts everything and returns the address to use. After a failure, what was started is in `self`, to be stopped.
    async fn start(
        &mut self,
        folders: &Folders,
        given: &GivenServers,
        options: &Options,
        lock: &Lock,
    ) -> Result<String> {
        let dir = folders.up();
        let mut state =
            RunState { runner: std::process::id(), address: String::new(), processes: Vec::new() };
        lock.write(&state)?;
        let servers = Servers::start(folders, given, &dir, Life::Durable).await?;
        let servers = self.servers.insert(servers);
        let binaries = build(folders, options.release).await?;

        let listener = ingress::listen(options.port).await?;
        let origin = format!("http://localhost:{}", listener.local_addr()?.port());
        let [api, internal, api_ops, gateway_1, gateway_1_ops, gateway_2, gateway_2_ops] =
            free_ports()?.map(local);
        let common = common_settings(&dir, &origin, servers)?;

        let settings = [common.clone(), api_settings(&dir, servers, [api, internal, api_ops])?].concat();
        migrate(&binaries, &settings).await?;
        seed(&servers.database_url).await?;

        let gateways = [(gateway_1, gateway_1_ops), (gateway_2, gateway_2_ops)];
        terminal::step("Starting", "one api and two gateways");
        let child = Child::follow("api", service(&binaries.join("api"), &[], &settings), Colour::Green)?;
        until_ready(self.api.insert(child), api_ops).await?;
        for (number, (listen, ops)) in (1..).zip(gateways) {
            let name = format!("gateway-{number}");
            let colour = if number == 1 { Colour::Magenta } else { Colour::Cyan };
            let settings = [common.clone(), gateway_settings(internal, listen, ops)].concat();
            let gateway = service(&binaries.join("stream-gateway"), &[], &settings);
            self.gateways.push(Child::follow(&name, gateway, colour)?);
        }
        for (gateway, (_, ops)) in self.gateways.iter().zip(gateways) {
            until_ready(gateway, ops).await?;
        }

        let routes = Routes::new(api, gateways.map(|(listen, _)| listen).to_vec());
        self.ingress = Some(tokio::spawn(ingress::serve(listener, Arc::new(routes))));

        let addresses = [api].into_iter().chain(gateways.map(|(listen, _)| listen));
        let services = self.api.iter().chain(&self.gateways).zip(addresses);
        state.processes = services
            .map(|(child, address)| ProcessEntry { name: child.name.clone(), pid: child.id(), address })
            .collect();
        state.address.clone_from(&origin);
        lock.write(&state)?;
        Ok(origin)
    }

    fn children(&self) -> impl Iterator<Item = &Child> {
        let servers = self.servers.iter().flat_map(|servers| &servers.children);
        servers.chain(&self.api).chain(&self.gateways)
    }

    async fn watch(&self, stop: &mut Stop) {
        let mut ends = JoinSet::new();
        for child in self.children() {
            let name = child.name.clone();
            let end = child.ended();
            ends.spawn(async move { (name, end.await) });
        }
        loop {
            tokio::select! {
                () = stop.requested() => return,
                Some(Ok((name, status))) = ends.join_next() => {
                    let how = status.map_or_else(|| "for an unknown reason".to_owned(), |status| status.to_string());
                    terminal::warn(format_args!(
                        "{name} ended ({how}) and is not restarted; everything else runs until Ctrl-C"
                    ));
                }
            }
        }
    }

    async fn stop(&mut self) {
        if let Some(ingress) = &self.ingress {
            ingress.abort();
        }
        for gateway in &self.gateways {
            gateway.signal(Signal::SIGTERM);
        }
        for gateway in &self.gateways {
            gateway.wait_or_kill(STOP_PATIENCE).await;
        }
        if let Some(api) = &self.api {
            api.stop(Signal::SIGTERM, STOP_PATIENCE).await;
        }
        if let Some(servers) = &self.servers {
            servers.stop().await;
        }
    }
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

async fn build(folders: &Folders, release: bool) -> Result<PathBuf> {
    let mut build = cargo(folders, &["build", "--package", "api", "--package", "stream-gateway"]);
    if release {
        build.arg("--release");
    }
    let status = process::run_to_end(build, Signal::SIGTERM).await?;
    if !status.success() {
        bail!("the services do not compile");
    }
    binaries(if release { "release" } else { "debug" })
}

type ServiceSettings = Vec<(&'static str, String)>;

fn common_settings(dir: &Path, origin: &str, servers: &Servers) -> Result<ServiceSettings> {
    let secret = secrets::kept(&dir.join("internal-secret"), secrets::random_password)?;
    Ok(vec![
        ("ORIGIN", origin.to_owned()),
        ("REDIS_URL", servers.redis_url.clone()),
        ("INTERNAL_SECRET", secret),
        ("TRUSTED_PROXIES", "127.0.0.1".to_owned()),
        ("LOG_FORMAT", "human".to_owned()),
    ])
}

fn api_settings(
    dir: &Path,
    servers: &Servers,
    [listen, internal, ops]: [SocketAddr; 3],
) -> Result<ServiceSettings> {
    let key = dir.join("signing-key.pem");
    secrets::kept(&key, || Ok(signing_key()?))?;
    let state_secret = secrets::kept(&dir.join("state-secret"), secrets::random_password)?;
    Ok(vec![
        ("LISTEN", listen.to_string()),
        ("INTERNAL_LISTEN", internal.to_string()),
        ("OPS_LISTEN", ops.to_string()),
        ("DATABASE_URL", servers.database_url.clone()),
        ("SIGNING_KEY_FILES", key.display().to_string()),
        ("STATE_SECRET", state_secret),
        ("DEV_LOGIN", "true".to_owned()),
        // No load balancer has to notice the shutdown.
        ("SHUTDOWN_WAIT_SECONDS", "0".to_owned()),
        ("SHUTDOWN_GRACE_SECONDS", "2".to_owned()),
    ])
}

fn gateway_settings(internal: SocketAddr, listen: SocketAddr, ops: SocketAddr) -> ServiceSettings {
    vec![
        ("LISTEN", listen.to_string()),
        ("OPS_LISTEN", ops.to_string()),
        ("API_INTERNAL_URL", format!("http://{internal}")),
        ("DRAIN_WAIT_SECONDS", "0".to_owned()),
        ("DRAIN_WINDOW_SECONDS", "1".to_owned()),
    ]
}

fn service(program: &Path, arguments: &[&str], settings: &ServiceSettings) -> Command {
    let mut command = process::command(program, arguments);
    command.envs(settings.iter().map(|(name, value)| (name, value)));
    if !terminal::has_colours() {
        command.env("NO_COLOR", "1");
    }
    process::bind_to_runner(&mut command, Signal::SIGKILL);
    command
}

async fn migrate(binaries: &Path, settings: &ServiceSettings) -> Result<()> {
    terminal::step("Migrating", "the database");
    let migrate = service(&binaries.join("api"), &["migrate"], settings);
    let ended = Child::follow("api migrate", migrate, Colour::Green)?.ended().await;
    if !ended.is_some_and(|status| status.success()) {
        bail!("`api migrate` failed; see its output above (`cargo dev reset` starts with an empty database)");
    }
    Ok(())
}

async fn seed(database_url: &str) -> Result<()> {
    let mut connection = postgres::connect(database_url).await?;
    sqlx::query("INSERT INTO messenger.users (username) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING")
        .bind(SEEDED.as_slice())
        .execute(&mut connection)
        .await
        .context("cannot make the users john and jane")?;
    Ok(())
}

async fn until_ready(child: &Child, ops: SocketAddr) -> Result<()> {
    child.until_ready(async || is_ready(ops).await).await.context("see the output above")
}

async fn is_ready(ops: SocketAddr) -> bool {
    let exchange = async {
        let mut socket = TcpStream::connect(ops).await?;
        socket.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
        let mut head = [0; 12];
        socket.read_exact(&mut head).await?;
        Ok::<_, std::io::Error>(head.ends_with(b" 200"))
    };
    tokio::time::timeout(Duration::from_secs(2), exchange).await.is_ok_and(|outcome| outcome.unwrap_or(false))
}
