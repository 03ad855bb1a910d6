//! Load comes from separate processes: they share no runtime, descriptor or lock with the measured services, and their own cost is
//! known. This file has the protocol of both sides and the controlling side.

mod hosts;
mod posts;
mod streams;
mod viewer;

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use protocol::{
    ids::{ConversationId, UserId},
    position::Position,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use testkit::{
    process::Process,
    usage::{Cpu, Memory},
};

pub use self::{
    hosts::{HostReport, Hosts, Way, run as run_hosts},
    posts::{PostReport, Posts, run as run_posts},
    streams::run as run_streams,
    viewer::digest,
};
use crate::clock::Micros;

const AT_ONCE: usize = 1_000;
pub const STREAMS: &str = "load-streams";
pub const POSTS: &str = "load-posts";
pub const HOSTS: &str = "load-hosts";

#[derive(Debug, Serialize, Deserialize)]
pub struct Viewer {
    pub user: UserId,
    pub token: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Sender {
    pub conversation: ConversationId,
    pub token: String,
}

/// One line to the process that holds streams; one line comes back.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    Viewers(Audience),
    /// Opens each stream that has no connection.
    Open(Opening),
    /// Reset the measurements; times in messages are relative to `since` from now on.
    Measure {
        since: Micros,
    },
    /// When a stream ends: reconnect after its `retry`, as browsers do, or wait for `Reconnect`.
    ComeBack {
        by_itself: bool,
    },
    /// Reconnect all closed streams together; one that fails or is rejected retries by itself.
    Reconnect,
    Status,
    Report,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Audience {
    pub viewers: PathBuf,
    /// Their server is not ours: no login, and no cursor that says what was missed.
    pub foreign: bool,
    /// The streams come from addresses in 127.`network`.0.0/24.
    pub network: u8,
    /// A file that has the number of delivered events in its first 8 bytes, for a source that waits for them.
    pub delivered: Option<PathBuf>,
}

impl Audience {
    pub fn of(viewers: PathBuf) -> Self {
        Self { viewers, foreign: false, network: 0, delivered: None }
    }
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Opening {
    pub server: SocketAddr,
    pub per_second: u32,
    /// Connections that may be opening at a time: more than the server's listen queue holds are repeated by TCP a second later.
    pub at_once: usize,
}

impl Opening {
    pub fn at_rate(server: SocketAddr, per_second: u32) -> Self {
        Self { server, per_second, at_once: AT_ONCE }
    }

    pub fn at_full_speed(server: SocketAddr) -> Self {
        Self::at_rate(server, 1_000_000)
    }
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Status {
    pub ready: usize,
    pub opening: usize,
    /// Durable events since `Measure`, and the time of the last one.
    pub events: u64,
    pub last_event_at: Micros,
    pub heartbeats: usize,
    /// Connections that ended since `Measure`, by reason.
    pub ended: BTreeMap<String, u64>,
    pub events_ever: u64,
}

impl Status {
    pub fn endings(&self) -> String {
        let ended: Vec<_> = self.ended.iter().map(|(reason, times)| format!("{times} {reason}")).collect();
        if ended.is_empty() { "none".into() } else { ended.join(", ") }
    }
}

/// One stream's result. Cursors are texts here.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StreamSummary {
    pub user: UserId,
    pub began: Option<String>,
    pub newest: Option<String>,
    pub digest: u64,
}

/// Lists are of what happened since `Measure`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    pub summaries: Vec<StreamSummary>,
    /// From the time in a message's text to its arrival at the other participant; microseconds.
    pub latencies: Vec<u32>,
    pub readies: Vec<u32>,
    /// From a message's time in Postgres to its arrival at each of the two; microseconds.
    pub delays: Vec<u32>,
    pub longest_delays: Vec<u32>,
    pub begun_at: Vec<Micros>,
    pub ended_at: Vec<Micros>,
    pub away: Vec<u32>,
    pub statuses: BTreeMap<u16, u64>,
    pub faults: u64,
    pub first_fault: Option<String>,
    pub resyncs: u64,
}

pub struct StreamLoad {
    process: Process,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl StreamLoad {
    pub fn start() -> anyhow::Result<Self> {
        let mut process = start(&[STREAMS])?;
        let orders = process.child().stdin.take().context("stdin is piped")?;
        let answers = process.child().stdout.take().context("stdout is piped")?;
        Ok(Self { process, orders, answers: BufReader::new(answers) })
    }

    pub fn order(&mut self, order: &Order) -> anyhow::Result<Status> {
        self.send(order)
    }

    pub fn status(&mut self) -> anyhow::Result<Status> {
        self.send(&Order::Status)
    }

    pub fn report(&mut self) -> anyhow::Result<Report> {
        self.send(&Order::Report)
    }

    pub fn until(
        &mut self,
        what: &str,
        within: Duration,
        enough: impl Fn(&Status) -> bool,
    ) -> anyhow::Result<Status> {
        let deadline = Instant::now() + within;
        loop {
            let status = self.status()?;
            if enough(&status) {
                return Ok(status);
            }
            anyhow::ensure!(Instant::now() < deadline, "waited {within:?} in vain: {what}: {status:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn memory(&self) -> anyhow::Result<Memory> {
        Ok(Memory::of(self.process.id())?)
    }

    pub fn cpu(&self) -> anyhow::Result<Cpu> {
        Ok(Cpu::of(self.process.id())?)
    }

    fn send<A: DeserializeOwned>(&mut self, order: &Order) -> anyhow::Result<A> {
        let mut line = serde_json::to_string(order)?;
        line.push('\n');
        self.orders.write_all(line.as_bytes()).context("the load process takes no orders")?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        serde_json::from_str(&answer).context("the load process has ended")
    }
}

impl Report {
    /// When the last of these streams was ready.
    pub fn last_ready(&self) -> Duration {
        Duration::from_micros(self.readies.iter().copied().max().unwrap_or_default().into())
    }
}

/// A figure counts only if nothing was lost, repeated or out of order, and every stream ends where the feed in Postgres ends.
pub fn check(report: &Report, heads: &[(UserId, Position)]) -> anyhow::Result<()> {
    let first = report.first_fault.as_deref().unwrap_or_default();
    anyhow::ensure!(report.faults == 0, "{} events did not follow: {first}", report.faults);
    anyhow::ensure!(report.resyncs == 0, "{} streams got a resync", report.resyncs);
    let heads: BTreeMap<_, _> = heads.iter().copied().collect();
    for StreamSummary { user, newest, .. } in &report.summaries {
        let head = heads.get(user).map(Position::to_string);
        anyhow::ensure!(*newest == head, "the stream of {user} ends at {newest:?}, the feed at {head:?}");
    }
    Ok(())
}

pub struct Posting {
    process: Process,
}

impl Posting {
    pub fn start(posts: &Posts) -> anyhow::Result<Self> {
        Ok(Self { process: start(&[POSTS, &serde_json::to_string(posts)?])? })
    }

    /// Without a `length` it posts until now. Waits for the last answers.
    pub fn finish(mut self) -> anyhow::Result<PostReport> {
        drop(self.process.child().stdin.take());
        let stdout = self.process.child().stdout.take().context("stdout is piped")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        serde_json::from_str(&line).context("the process that posts failed")
    }
}

pub struct Hosting {
    process: Process,
}

impl Hosting {
    pub fn start(hosts: &Hosts) -> anyhow::Result<Self> {
        Ok(Self { process: start(&[HOSTS, &serde_json::to_string(hosts)?])? })
    }

    pub fn finish(mut self) -> anyhow::Result<HostReport> {
        let stdout = self.process.child().stdout.take().context("stdout is piped")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        serde_json::from_str(&line).context("the process that publishes failed")
    }
}

fn start(arguments: &[&str]) -> anyhow::Result<Process> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
    Process::start(&mut command).context("a load process cannot be started")
}

fn read_lines<T: DeserializeOwned>(file: &Path) -> anyhow::Result<Vec<T>> {
    let text = std::fs::read_to_string(file)?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}
