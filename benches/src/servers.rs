//! Private Postgres and Redis servers with the settings of production: what Postgres has confirmed is on disk. (Redis keeps
//! nothing on disk in production either: it only passes messages on.)

use std::{
    fs,
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::{fs::chown, process::CommandExt},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tempfile::TempDir;
use testkit::process::Process;

use crate::settings;

/// Debian's `nobody`: Postgres refuses to run as root.
const NOBODY: u32 = 65_534;
const START_WITHIN: Duration = Duration::from_mins(1);

pub struct Server {
    pub url: String,
    pub process: Process,
    _folder: TempDir,
}

pub fn start_postgres() -> anyhow::Result<Server> {
    let programs = settings::postgres_programs()?;
    let folder = folder("postgres")?;
    let is_root = nix::unistd::geteuid().is_root();
    if is_root {
        chown(folder.path(), Some(NOBODY), Some(NOBODY))?;
    }
    let as_nobody = |program: &str| {
        let mut command = Command::new(programs.join(program));
        if is_root {
            command.uid(NOBODY).gid(NOBODY);
        }
        command.current_dir(folder.path());
        command
    };
    let data = folder.path().join("data");
    let made = as_nobody("initdb")
        .args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "-D"])
        .arg(&data)
        .output()
        .context("initdb cannot be started")?;
    anyhow::ensure!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
    let port = free_port()?;
    let mut server = as_nobody("postgres");
    server.arg("-D").arg(&data).args(["-h", "127.0.0.1", "-p", &port.to_string()]);
    for setting in [
        "unix_socket_directories=",
        "shared_buffers=512MB",
        "max_wal_size=4GB",
        // Durable: the defaults, here because figures mean nothing without them.
        "fsync=on",
        "synchronous_commit=on",
        "full_page_writes=on",
    ] {
        server.args(["-c", setting]);
    }
    let log = fs::File::create(folder.path().join("log"))?;
    server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let mut process = Process::start(&mut server).context("Postgres cannot be started")?;
    until_listening(&mut process, port)
        .with_context(|| fs::read_to_string(folder.path().join("log")).unwrap_or_default())?;
    let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
    Ok(Server { url, process, _folder: folder })
}

pub fn start_redis() -> anyhow::Result<Server> {
    let folder = folder("redis")?;
    let port = free_port()?;
    let mut server = Command::new(settings::redis_server()?);
    server
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut process = Process::start(&mut server).context("Redis cannot be started")?;
    until_listening(&mut process, port)?;
    Ok(Server { url: format!("redis://127.0.0.1:{port}/"), process, _folder: folder })
}

fn folder(kind: &str) -> anyhow::Result<TempDir> {
    let folder = tempfile::Builder::new().prefix(&format!("bench-{kind}-")).tempdir();
    folder.context("a temporary folder cannot be made")
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

fn until_listening(process: &mut Process, port: u16) -> anyhow::Result<()> {
    let deadline = Instant::now() + START_WITHIN;
    while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
        if let Some(status) = process.ended() {
            anyhow::bail!("the server ended at its start: {status}");
        }
        anyhow::ensure!(Instant::now() < deadline, "the server does not listen after {START_WITHIN:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
