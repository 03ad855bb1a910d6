//! Events for gateways at a steady rate, without `api`: committed to Postgres in bulk, as `api` would have, and then published
//! to Redis at the time they are due. So every request of a gateway gets a correct answer, and the rate is not bounded by
//! what POST can do.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpStream},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use protocol::{
    event::{self, Envelope, kind, rfc3339},
    position::{Position, Seq},
};
use rand::seq::SliceRandom;
use serde_json::{json, value::RawValue};
use sqlx::Connection;
use testkit::user::TestUser;

use crate::{
    clock::{self, HEAD_START, Micros, micros, now, sleep_until},
    fixtures::{self, Bench},
};

const BATCH_EVERY: Duration = Duration::from_millis(10);
const BATCH_ROWS: usize = 5_000;
/// Events that are due within the same millisecond are sent together.
const GRAIN: Micros = 1_000;
/// Events are committed this long before they are due.
const LEAD: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Commits {
    /// Shortly before they are published.
    Meanwhile,
    /// All before the first is published, so that Postgres is idle during the measurement. The gateway must not reconcile
    /// meanwhile: it would deliver them early.
    Before,
}

pub struct EventLoad<'a> {
    world: &'a Bench,
    users: &'a [TestUser],
    /// A random order; each turn goes once through all.
    order: Vec<usize>,
    next: usize,
    heads: Vec<Position>,
}

#[derive(Debug)]
pub struct PublishReport {
    pub events: u64,
    /// The longest delay of a publication: above zero, the source could not keep up.
    pub latest: Micros,
    /// Receivers at Redis, over all events.
    pub heard: u64,
}

struct EventRow {
    due: Micros,
    user: usize,
    seq: Seq,
    payload: String,
    created_at: DateTime<Utc>,
}

struct Burst {
    due: Micros,
    events: u64,
    commands: Vec<u8>,
}

impl<'a> EventLoad<'a> {
    pub async fn new(world: &'a Bench, users: &'a [TestUser]) -> anyhow::Result<Self> {
        let mut order: Vec<usize> = (0..users.len()).collect();
        order.shuffle(&mut rand::rng());
        let heads = fixtures::heads(world, users).await?.into_iter().map(|(_, head)| head).collect();
        Ok(Self { world, users, order, next: 0, heads })
    }

    pub async fn one_each(&mut self) -> anyhow::Result<PublishReport> {
        let rows = (0..self.users.len()).map(|_| self.row(0)).collect::<Vec<_>>();
        self.commit(&rows).await?;
        let publisher = RedisPublisher::start(self.world.redis.address(), now())?;
        rows.chunks(500).try_for_each(|rows| publisher.send(self.burst(0, rows)?))?;
        publisher.finish()
    }

    /// `per_second` events for `length`, to all users in turn. `begin` gets the time to which all due times are relative, before
    /// the first event is published.
    pub async fn steady(
        &mut self,
        per_second: u32,
        length: Duration,
        commits: Commits,
        begin: impl FnOnce(Micros) -> anyhow::Result<()>,
    ) -> anyhow::Result<PublishReport> {
        let total = (f64::from(per_second) * length.as_secs_f64()) as u64;
        let due = |number: u64| number * 1_000_000 / u64::from(per_second) / GRAIN * GRAIN;
        let mut bursts = VecDeque::new();
        if commits == Commits::Before {
            let mut rows: Vec<EventRow> = (0..total).map(|number| self.row(due(number))).collect();
            for some in rows.chunks(BATCH_ROWS) {
                self.commit(some).await?;
            }
            sqlx::query("CHECKPOINT").execute(&self.world.sql).await?;
            let said = Utc::now() + HEAD_START;
            for row in &mut rows {
                row.created_at = said + Duration::from_micros(row.due); // For the gateway's own histogram.
            }
            for some in rows.chunk_by(|a, b| a.due == b.due) {
                bursts.push_back(self.burst(some[0].due, some)?);
            }
        }
        let since = clock::soon();
        begin(since)?;
        let publisher = RedisPublisher::start(self.world.redis.address(), since)?;
        bursts.into_iter().try_for_each(|burst| publisher.send(burst))?;
        if commits == Commits::Meanwhile {
            let mut number = 0;
            while number < total {
                let batch_from = due(number);
                let mut rows = Vec::new();
                while number < total && due(number) < batch_from + micros(BATCH_EVERY) {
                    rows.push(self.row(due(number)));
                    number += 1;
                }
                sleep_until((since + batch_from).saturating_sub(micros(LEAD)));
                self.commit(&rows).await?;
                for some in rows.chunk_by(|a, b| a.due == b.due) {
                    publisher.send(self.burst(some[0].due, some)?)?;
                }
            }
        }
        publisher.finish()
    }

    fn row(&mut self, due: Micros) -> EventRow {
        let user = self.order[self.next % self.order.len()];
        self.next += 1;
        self.heads[user].seq += 1;
        let (seq, created_at) = (self.heads[user].seq, Utc::now());
        // As `api` writes it, with a text of a usual length.
        let payload = json!({
            "id": self.next.to_string(),
            "content": format!("{due:010} is when this message of the bench was due, in microseconds"),
            "conversationId": (user + 1).to_string(),
            "createdAt": rfc3339(created_at),
            "mine": false,
        });
        EventRow { due, user, seq, payload: payload.to_string(), created_at }
    }

    async fn commit(&self, rows: &[EventRow]) -> anyhow::Result<()> {
        let users: Vec<i64> = rows.iter().map(|row| self.users[row.user].id.0).collect();
        let seqs: Vec<i64> = rows.iter().map(|row| row.seq.cast_signed()).collect();
        let payloads: Vec<&str> = rows.iter().map(|row| row.payload.as_str()).collect();
        let mut connection = self.world.sql.acquire().await?;
        let mut transaction = connection.begin().await?;
        // Only here: the measurement begins after the commit.
        sqlx::query("SET LOCAL synchronous_commit = off").execute(&mut *transaction).await?;
        sqlx::query(
            "WITH rows AS MATERIALIZED (
                 SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[]) AS r (user_id, seq, payload)
             ), heads AS (
                 UPDATE messenger.feed_heads AS h SET head_seq = newest.seq
                 FROM (SELECT user_id, max(seq) AS seq FROM rows GROUP BY user_id) AS newest
                 WHERE h.user_id = newest.user_id
             )
             INSERT INTO messenger.feed (user_id, seq, kind, payload) SELECT user_id, seq, $4, payload FROM rows",
        )
        .bind(users)
        .bind(seqs)
        .bind(payloads)
        .bind(kind::MESSAGE)
        .execute(&mut *transaction)
        .await?;
        Ok(transaction.commit().await?)
    }

    fn burst(&self, due: Micros, rows: &[EventRow]) -> anyhow::Result<Burst> {
        let mut commands = Vec::with_capacity(rows.len() * 512);
        for row in rows {
            let user = &self.users[row.user];
            let envelope = Envelope {
                v: event::VERSION,
                epoch: self.heads[row.user].epoch,
                seq: row.seq,
                event: kind::MESSAGE.into(),
                data: RawValue::from_string(row.payload.clone())?,
                created_at: row.created_at,
                request_id: Some(format!("{:032x}", row.seq)),
                traceparent: None,
            };
            redis::cmd("PUBLISH")
                .arg(self.world.channels().user(user.id))
                .arg(serde_json::to_vec(&envelope)?)
                .write_packed_command(&mut commands);
        }
        Ok(Burst { due, events: rows.len() as u64, commands })
    }
}

struct RedisPublisher {
    bursts: SyncSender<Burst>,
    thread: thread::JoinHandle<anyhow::Result<PublishReport>>,
}

impl RedisPublisher {
    fn start(redis: SocketAddr, since: Micros) -> anyhow::Result<Self> {
        let socket = TcpStream::connect(redis)?;
        socket.set_nodelay(true)?;
        // A million events at the highest rates, one burst at a time.
        let (sender, bursts) = sync_channel(100_000);
        let thread = thread::spawn(move || publish(socket, &bursts, since));
        Ok(Self { bursts: sender, thread })
    }

    fn send(&self, burst: Burst) -> anyhow::Result<()> {
        self.bursts.send(burst).context("the publisher has ended")
    }

    fn finish(self) -> anyhow::Result<PublishReport> {
        drop(self.bursts);
        self.thread.join().unwrap_or_else(|_| anyhow::bail!("the publisher panicked"))
    }
}

fn publish(mut socket: TcpStream, bursts: &Receiver<Burst>, since: Micros) -> anyhow::Result<PublishReport> {
    let mut published = PublishReport { events: 0, latest: 0, heard: 0 };
    let answers = socket.try_clone()?;
    let (total_in, total) = sync_channel(1);
    let reader = thread::spawn(move || count_heard(answers, &total));
    for burst in bursts {
        sleep_until(since + burst.due);
        published.latest = published.latest.max(now().saturating_sub(since + burst.due));
        socket.write_all(&burst.commands)?;
        published.events += burst.events;
    }
    total_in.send(published.events)?;
    // The answer to the last one gives the reader the total.
    socket.write_all(b"PING\r\n")?;
    published.heard = reader.join().unwrap_or_else(|_| anyhow::bail!("the reader panicked"))?;
    Ok(published)
}

/// Redis answers each PUBLISH with the number of its receivers.
fn count_heard(answers: TcpStream, total: &Receiver<u64>) -> anyhow::Result<u64> {
    answers.set_read_timeout(Some(Duration::from_mins(1)))?;
    let mut heard = 0;
    let (mut seen, mut wanted) = (0, u64::MAX);
    for line in BufReader::new(answers).lines() {
        let line = line.context("Redis does not answer")?;
        if let Some(number) = line.strip_prefix(':') {
            seen += 1;
            heard += number.parse::<u64>().context("Redis counts")?;
        } else {
            anyhow::ensure!(line == "+PONG", "Redis says {line}");
            wanted = total.recv()?;
        }
        if seen >= wanted {
            return Ok(heard);
        }
    }
    anyhow::bail!("Redis has closed the connection")
}
