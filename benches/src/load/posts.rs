//! The process that posts messages: a thread per client, each with one connection that it keeps, one request at a time.

use std::{io::Write, net::SocketAddr, path::PathBuf, thread, time::Duration};

use serde::{Deserialize, Serialize};

use super::{Sender, read_lines};
use crate::{
    clock::{Micros, micros, now, sleep_until},
    http::Connection,
};

/// The order, as JSON.
#[derive(Debug, Serialize, Deserialize)]
pub struct Posts {
    pub api: SocketAddr,
    pub senders: PathBuf,
    pub clients: usize,
    pub length: Duration,
    /// Messages a second of all clients together; without it each client sends the next once the last is answered.
    pub per_second: Option<u32>,
    /// When to begin. The texts of messages say at which microsecond after it they were due.
    pub begin: Micros,
}

/// What came of it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Posted {
    /// Answered 201.
    pub accepted: u64,
    /// From when a message was due to its answer; microseconds.
    pub latencies: Vec<u32>,
    /// From the first to the last answer, in microseconds.
    pub took: Micros,
    pub cpu_seconds: f64,
}

pub fn run(order: &str) -> anyhow::Result<()> {
    let posts: Posts = serde_json::from_str(order)?;
    let senders: Vec<Sender> = read_lines(&posts.senders)?;
    anyhow::ensure!(senders.len() >= 2 * posts.clients, "more clients than pairs who may write");
    let results: Vec<anyhow::Result<Posted>> = thread::scope(|scope| {
        let (posts, senders) = (&posts, &senders[..]);
        let clients: Vec<_> =
            (0..posts.clients).map(|number| scope.spawn(move || client(posts, senders, number))).collect();
        let joined = clients.into_iter().map(|client| client.join());
        joined.map(|result| result.unwrap_or_else(|_| anyhow::bail!("a client panicked"))).collect()
    });
    let mut all = Posted::default();
    for result in results {
        let posted = result?;
        all.accepted += posted.accepted;
        all.latencies.extend(posted.latencies);
        all.took = all.took.max(posted.took);
    }
    all.cpu_seconds = crate::usage::Cpu::of(std::process::id())?.seconds();
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", serde_json::to_string(&all)?)?;
    Ok(stdout.flush()?)
}

/// One client: its share of the pairs write in turn, so that no two clients meet in a conversation.
fn client(posts: &Posts, senders: &[Sender], number: usize) -> anyhow::Result<Posted> {
    let mut connection = Connection::open(posts.api)?;
    let mut posted = Posted::default();
    let length = micros(posts.length);
    let mine = senders.chunks(2).skip(number).step_by(posts.clients).flatten().cycle();
    for (turn, sender) in mine.enumerate() {
        let due = match posts.per_second {
            Some(rate) => {
                let message = turn * posts.clients + number;
                message as Micros * 1_000_000 / Micros::from(rate)
            }
            None => now().saturating_sub(posts.begin),
        };
        if due >= length {
            break;
        }
        sleep_until(posts.begin + due);
        let answer = connection.exchange(&request(posts, sender, due, number, turn))?;
        anyhow::ensure!(answer.status == 201, "{}: {}", answer.status, answer.body);
        let answered = now() - posts.begin;
        posted.accepted += 1;
        posted.latencies.push((answered - due) as u32);
        posted.took = answered;
    }
    Ok(posted)
}

/// As a careful client sends it: with a key, so that a repeat would be recognised.
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
