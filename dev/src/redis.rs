//! A private Redis (or Valkey), found or installed and started on a free port of loopback. It keeps nothing on disk:
//! it may forget everything, so it does.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use testkit::{ports::free_ports, process::Account, programs};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::folders::{Folders, works_in};
use crate::lifetime::{Life, log_end, log_file};
use crate::process::{Child, command, run_as};
use crate::{install, secrets, terminal, tools};

const START_DEADLINE: Duration = Duration::from_secs(20);
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// Finds Redis on the machine or under `.dev`, or installs it. `valkey`: only Valkey.
pub(crate) async fn program(folders: &Folders, valkey: bool) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = install::redis_server(&folders.tools());
    let names = if valkey { &programs::REDIS[1..] } else { &programs::REDIS };
    let look = || programs::on_path(&path, names).or_else(|| installed.is_file().then(|| installed.clone()));
    if let Some(program) = look() {
        return Ok(program);
    }
    install::install_redis(tools::python(), &folders.tools()).await?;
    look().with_context(|| format!("none of {names:?} could be found or installed: set REDIS_URL instead"))
}

pub(crate) struct DevRedis {
    /// None when it was already running.
    pub(crate) child: Option<Child>,
    port: u16,
    password: String,
}

impl DevRedis {
    pub(crate) fn url(&self) -> String {
        format!("redis://default:{}@127.0.0.1:{}/", self.password, self.port)
    }
}

pub(crate) async fn start(program: &Path, dir: &Path, life: Life) -> Result<DevRedis> {
    let data = dir.join("redis");
    fs::create_dir_all(&data)?;
    let account = Account::for_data(&data)?;
    if let Some(account) = account {
        account.own(&data)?;
    }
    let password = secrets::kept(&dir.join("redis.password"), secrets::random_password)?;
    if let Some((_, port)) = running(dir) {
        return Ok(DevRedis { child: None, port, password });
    }
    let [port] = free_ports()?;
    terminal::step("Starting", format_args!("Redis on 127.0.0.1:{port}"));
    let mut server = command(program, ["-"]);
    server.current_dir("/");
    run_as(&mut server, account);
    let mut server = life.shape(server, Signal::SIGKILL);
    // By standard input: on the command line every account could read the password.
    let (read, mut write) = std::io::pipe()?;
    server.stdin(read);
    let settings = format!(
        "port {port}\nbind 127.0.0.1\nrequirepass {password}\ndir {0}\npidfile {0}/redis.pid\n\
         save \"\"\nappendonly no\ndaemonize no\nloglevel warning\n",
        data.display()
    );
    let child = Child::spawn("redis", server, log_file(dir, "redis")?)?;
    std::io::Write::write_all(&mut write, settings.as_bytes())?;
    drop(write);
    let redis = DevRedis { child: Some(child), port, password };
    wait_until_ready(&redis).await.with_context(|| log_end(dir, "redis"))?;
    fs::write(dir.join("redis.port"), port.to_string())?;
    Ok(redis)
}

async fn wait_until_ready(redis: &DevRedis) -> Result<()> {
    let wait = async {
        while !answers(redis).await {
            if redis.child.as_ref().is_some_and(Child::has_ended) {
                bail!("Redis ended while starting");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    };
    tokio::time::timeout(START_DEADLINE, wait).await.context("Redis did not become ready")?
}

/// Whether our own server answers, and not another process that has taken the port.
async fn answers(redis: &DevRedis) -> bool {
    let exchange = async {
        let mut socket = TcpStream::connect(("127.0.0.1", redis.port)).await?;
        socket.write_all(format!("AUTH {}\r\n", redis.password).as_bytes()).await?;
        let mut answer = [0; 5];
        socket.read_exact(&mut answer).await?;
        Ok::<_, std::io::Error>(answer == *b"+OK\r\n")
    };
    exchange.await.unwrap_or(false)
}

pub(crate) fn running(dir: &Path) -> Option<(u32, u16)> {
    let data = dir.join("redis");
    let pid = fs::read_to_string(data.join("redis.pid")).ok()?.trim().parse().ok()?;
    let port = fs::read_to_string(dir.join("redis.port")).ok()?.parse().ok()?;
    works_in(pid, &data).then_some((pid, port))
}

pub(crate) async fn stop(redis: &DevRedis) {
    if let Some(child) = &redis.child {
        child.stop(Signal::SIGTERM, STOP_PATIENCE).await;
    }
}
