//! A private Redis (or Valkey), found or installed and started on a free port of loopback. It keeps nothing on disk:
//! it may forget everything, so it does.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use testkit::{ports::free_ports, process::Account, programs};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::folders::{Folders, works_in};
use crate::lifetime::{self, Life};
use crate::process::{Child, command};
use crate::{install, secrets, terminal, tools};

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

/// The URL of a Redis, and the server unless it was already running.
pub(crate) async fn start(program: &Path, dir: &Path, life: Life) -> Result<(String, Option<Child>)> {
    let data = dir.join("redis");
    fs::create_dir_all(&data)?;
    let account = Account::for_data(&data)?;
    account.own(&data)?;
    let password = secrets::kept(&dir.join("redis.password"), secrets::random_password)?;
    let url = |port: u16| format!("redis://default:{password}@127.0.0.1:{port}/");
    if let Some((_, port)) = running(dir) {
        return Ok((url(port), None));
    }
    let [port] = free_ports()?;
    terminal::step("Starting", format_args!("Redis on 127.0.0.1:{port}"));
    let mut server = command(program, ["-"]);
    // By standard input: on the command line every account could read the password.
    let (read, mut write) = std::io::pipe()?;
    server.stdin(read);
    write!(
        write,
        "port {port}\nbind 127.0.0.1\nrequirepass {password}\ndir {0}\npidfile {0}/redis.pid\n\
         save \"\"\nappendonly no\ndaemonize no\nloglevel warning\n",
        data.display()
    )?;
    drop(write);
    let ready = async || answers(port, &password).await.unwrap_or(false);
    let child = lifetime::start("redis", server, account, dir, life, ready).await?;
    fs::write(dir.join("redis.port"), port.to_string())?;
    Ok((url(port), Some(child)))
}

/// Whether our own server answers, and not another process that has taken the port.
async fn answers(port: u16, password: &str) -> std::io::Result<bool> {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await?;
    socket.write_all(format!("AUTH {password}\r\n").as_bytes()).await?;
    let mut answer = [0; 5];
    socket.read_exact(&mut answer).await?;
    Ok(answer == *b"+OK\r\n")
}

pub(crate) fn running(dir: &Path) -> Option<(u32, u16)> {
    let data = dir.join("redis");
    let pid = fs::read_to_string(data.join("redis.pid")).ok()?.trim().parse().ok()?;
    let port = fs::read_to_string(dir.join("redis.port")).ok()?.parse().ok()?;
    works_in(pid, &data).then_some((pid, port))
}
