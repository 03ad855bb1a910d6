//! The process that posts messages: a thread per client, each with one connection that it keeps, one request at a time.

use std::{
    io::{Read, Write},
    net::SocketAddr,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;

use serde::{Deserialize, Serialize};

use super::{Sender, read_lines};
use crate::{
    clock::{Micros, micros, now, sleep_until},
    http::HttpConnection,
};

#[derive(Debug, Serialize, Deserialize)]
pub struct Posts {
    pub api: SocketAddr,
    pub senders: PathBuf,
    pub clients: usize,
    /// Without it, until standard input ends.
    pub length: Option<Duration>,
    /// Messages per second of all clients together; without it each client sends the next one after the answer.
    pub per_second: Option<u32>,
    /// Repeat a message with its key until it gets a 201.
    pub insist: bool,
    /// When to begin. Messages contain the microsecond after it at which they were due.
    pub begin: Micros,
}

const PAUSE: Duration = Duration::from_millis(250);
const PATIENCE: Duration = Duration::from_mins(1);

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct PostReport {
    pub accepted: u64,
    /// From when a message was due to its answer; microseconds.
    pub latencies: Vec<u32>,
    pub dues: Vec<Micros>,
    /// Attempts without a 201: when, and the outcome.
    pub failures: Vec<(Micros, String)>,
    pub took: Micros,
    pub cpu_seconds: f64,
}

static ENOUGH: AtomicBool = AtomicBool::new(false);

pub fn run(order: &str) -> anyhow::Result<()> {
    let posts: Posts = serde_json::from_str(order)?;
    let senders: Vec<Sender> = read_lines(&posts.senders)?;
    anyhow::ensure!(senders.len() >= 2 * posts.clients, "more clients than pairs who may write");
    if posts.length.is_none() {
        thread::spawn(|| {
            let _ = std::io::stdin().lock().read(&mut [0]);
            ENOUGH.store(true, Ordering::Relaxed);
        });
    }
    let results: Vec<anyhow::Result<PostReport>> = thread::scope(|scope| {
        let (posts, senders) = (&posts, &senders[..]);
        let clients: Vec<_> =
            (0..posts.clients).map(|number| scope.spawn(move || client(posts, senders, number))).collect();
        let joined = clients.into_iter().map(thread::ScopedJoinHandle::join);
        joined.map(|result| result.unwrap_or_else(|_| anyhow::bail!("a client panicked"))).collect()
    });
    let mut all = PostReport::default();
    for result in results {
        let posted = result?;
        all.accepted += posted.accepted;
        all.latencies.extend(posted.latencies);
        all.dues.extend(posted.dues);
        all.failures.extend(posted.failures);
        all.took = all.took.max(posted.took);
    }
    all.cpu_seconds = testkit::usage::Cpu::of(std::process::id())?.seconds();
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", serde_json::to_string(&all)?)?;
    Ok(stdout.flush()?)
}

fn client(posts: &Posts, senders: &[Sender], number: usize) -> anyhow::Result<PostReport> {
    let mut connection = Some(HttpConnection::open(posts.api)?);
    let mut posted = PostReport::default();
    let length = posts.length.map_or(Micros::MAX, micros);
    let mine = senders.chunks(2).skip(number).step_by(posts.clients).flatten().cycle();
    for (turn, sender) in mine.enumerate() {
        let due = match posts.per_second {
            Some(rate) => {
                let message = turn * posts.clients + number;
                message as Micros * 1_000_000 / Micros::from(rate)
            }
            None => now().saturating_sub(posts.begin),
        };
        if due >= length || ENOUGH.load(Ordering::Relaxed) {
            break;
        }
        sleep_until(posts.begin + due);
        let request = request(posts, sender, due, number, turn);
        let first_try = Instant::now();
        while let Err(error) = attempt(&mut connection, posts.api, &request) {
            anyhow::ensure!(posts.insist && first_try.elapsed() < PATIENCE, "{error:#}");
            posted.failures.push((now() - posts.begin, format!("{error:#}")));
            thread::sleep(PAUSE);
        }
        let answered = now() - posts.begin;
        posted.accepted += 1;
        posted.latencies.push((answered - due) as u32);
        posted.dues.push(due);
        posted.took = answered;
    }
    Ok(posted)
}

fn attempt(connection: &mut Option<HttpConnection>, api: SocketAddr, request: &[u8]) -> anyhow::Result<()> {
    let mut used = match connection.take().filter(HttpConnection::is_open) {
        Some(connection) => connection,
        None => HttpConnection::open(api).context("cannot connect")?,
    };
    let answer = used.exchange(request)?;
    if !answer.head.closes {
        *connection = Some(used);
    }
    let (status, body) = (answer.head.status, answer.body.lines().next().unwrap_or_default());
    anyhow::ensure!(status == 201, "{status}: {body}");
    Ok(())
}

fn request(posts: &Posts, sender: &Sender, due: Micros, client: usize, turn: usize) -> Vec<u8> {
    let Posts { api, begin, .. } = posts;
    let Sender { conversation, token } = sender;
    let body = format!(r#"{{"content":"{due:010} is when this message of the bench was due, in μs"}}"#);
    let length = body.len();
    format!(
        "POST /api/conversations/{conversation}/messages HTTP/1.1\r\nHost: {api}\r\nAuthorization: Bearer {token}\r\n\
         Content-Type: application/json\r\nIdempotency-Key: {begin}-{client}-{turn}\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}
