//! Load comes from processes of its own: no runtime, no descriptor and no lock is shared with what is measured, and what the
//! load itself costs is known. This file is what both sides agree on, and the side that gives the orders.

mod chunks;
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
use testkit::{process::Process, usage::Cpu};

pub use self::{
    posts::{Posted, Posts, run as run_posts},
    streams::run as run_streams,
    viewer::digest,
};
use crate::clock::Micros;

/// The subcommands by which this program runs as a load process.
pub const STREAMS: &str = "load-streams";
pub const POSTS: &str = "load-posts";

/// Whose stream to open.
#[derive(Debug, Serialize, Deserialize)]
pub struct Viewer {
    pub user: UserId,
    pub token: String,
}

/// Who may write, and where.
#[derive(Debug, Serialize, Deserialize)]
pub struct Sender {
    pub conversation: ConversationId,
    pub token: String,
}

/// One line to the process that holds streams; one line comes back.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// Open a stream for each viewer of the file, so many a second.
    Open {
        gateway: SocketAddr,
        viewers: PathBuf,
        per_second: u32,
    },
    /// Forget what was measured; times in the texts of messages are from now on relative to `since`.
    Measure {
        since: Micros,
    },
    /// What to do when a stream ends: come back after the `retry` that it was told, as browsers do, or wait for `Reconnect`.
    ComeBack {
        by_itself: bool,
    },
    /// All that are closed, at once; who fails or is turned away comes back by itself.
    Reconnect,
    Status,
    Report,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Status {
    /// Streams whose present connection has had its `ready`.
    pub ready: usize,
    /// Connections being made or waiting for `ready`.
    pub opening: usize,
    /// Durable events since `Measure`, and when the last one came.
    pub events: u64,
    pub last_event_at: Micros,
    /// Streams that had a heartbeat since `Measure`.
    pub heartbeats: usize,
    /// Connections that ended since `Measure`, by the reason they were told, if any.
    pub ended: BTreeMap<String, u64>,
    /// Durable events from the beginning on.
    pub events_ever: u64,
}

/// One stream's ledger. Cursors are texts here.
#[derive(Debug, Serialize, Deserialize)]
pub struct StreamSummary {
    pub user: UserId,
    /// That of the first `ready`.
    pub began: Option<String>,
    /// The newest event.
    pub newest: Option<String>,
    /// [`digest`] of what was told in between.
    pub digest: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    pub summaries: Vec<StreamSummary>,
    /// From the time in a message's text to its arrival at the other participant; microseconds.
    pub latencies: Vec<u32>,
    /// From `since` to each `ready`; microseconds.
    pub readies: Vec<u32>,
    /// From when Postgres made a message to its arrival at each of the two; microseconds.
    pub delays: Vec<u32>,
    /// The longest of these of each stream that had one.
    pub longest_delays: Vec<u32>,
    /// When connections were begun, and when they ended.
    pub begun_at: Vec<Micros>,
    pub ended_at: Vec<Micros>,
    /// From the end of each stream's connection to its next `ready`; microseconds.
    pub away: Vec<u32>,
    /// Answers by status, from the beginning on.
    pub statuses: BTreeMap<u16, u64>,
    /// Events that did not follow the one before them, with what was wrong first.
    pub faults: u64,
    pub first_fault: Option<String>,
    pub resyncs: u64,
}

/// The process that holds streams.
pub struct Streams {
    process: Process,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Streams {
    pub fn start() -> anyhow::Result<Self> {
        let mut process = start(&[STREAMS])?;
        let orders = process.child().stdin.take().context("stdin is piped")?;
        let answers = process.child().stdout.take().context("stdout is piped")?;
        Ok(Self { process, orders, answers: BufReader::new(answers) })
    }

    pub fn order(&mut self, order: &Order) -> anyhow::Result<Status> {
        self.ask(order)
    }

    pub fn status(&mut self) -> anyhow::Result<Status> {
        self.ask(&Order::Status)
    }

    pub fn report(&mut self) -> anyhow::Result<Report> {
        self.ask(&Order::Report)
    }

    /// Asks again and again until the answer will do.
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

    pub fn cpu(&self) -> anyhow::Result<Cpu> {
        Ok(Cpu::of(self.process.id())?)
    }

    fn ask<A: DeserializeOwned>(&mut self, order: &Order) -> anyhow::Result<A> {
        let mut line = serde_json::to_string(order)?;
        line.push('\n');
        self.orders.write_all(line.as_bytes()).context("the load process takes no orders")?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        serde_json::from_str(&answer).context("the load process has ended")
    }
}

/// What a report must say for a figure to count: nothing lost, repeated or out of order, and every ledger ends where the
/// feed in Postgres ends.
pub fn check(report: &Report, heads: &[(UserId, Position)]) -> anyhow::Result<()> {
    let first = report.first_fault.as_deref().unwrap_or_default();
    anyhow::ensure!(report.faults == 0, "{} events did not follow: {first}", report.faults);
    anyhow::ensure!(report.resyncs == 0, "{} streams were told to reload", report.resyncs);
    let heads: BTreeMap<_, _> = heads.iter().copied().collect();
    for StreamSummary { user, newest, .. } in &report.summaries {
        let head = heads.get(user).map(Position::to_string);
        anyhow::ensure!(*newest == head, "the stream of {user} ends at {newest:?}, the feed at {head:?}");
    }
    Ok(())
}

/// The process that posts.
pub struct Posting {
    process: Process,
}

impl Posting {
    pub fn start(posts: &Posts) -> anyhow::Result<Self> {
        Ok(Self { process: start(&[POSTS, &serde_json::to_string(posts)?])? })
    }

    /// Without a `length` it goes on until now. Waits for its last answers.
    pub fn finish(mut self) -> anyhow::Result<Posted> {
        drop(self.process.child().stdin.take());
        let stdout = self.process.child().stdout.take().context("stdout is piped")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        serde_json::from_str(&line).context("the process that posts failed")
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
