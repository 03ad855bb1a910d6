//! Events for gateways at a steady rate, without `api`: committed to Postgres in bulk, as `api` would have, and then published
//! to Redis at the time they are due. So every request of a gateway gets a correct answer, and the rate is not bounded by
//! what POST can do.

use std::{collections::VecDeque, time::Duration};

use chrono::{DateTime, Utc};
use protocol::{
    event::{self, Envelope, kind, rfc3339},
    ids::UserId,
    position::{Position, Seq},
};
use rand::seq::SliceRandom;
use serde_json::{json, value::RawValue};
use sqlx::Connection;

use crate::{
    clock::{self, HEAD_START, Micros, micros, now, sleep_until},
    fixtures::{self, Bench},
    publisher::{Burst, PublishReport, Publisher, Window, Wire},
};

const BATCH_EVERY: Duration = Duration::from_millis(10);
const BATCH_ROWS: usize = 5_000;
/// Events of a flood that are sent together.
pub const FLOOD_BURST: usize = 64;
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
    users: Vec<UserId>,
    /// A random order; each turn goes once through all.
    order: Vec<usize>,
    next: usize,
    heads: Vec<Position>,
}

struct EventRow {
    due: Micros,
    user: usize,
    seq: Seq,
    payload: String,
    created_at: DateTime<Utc>,
}

/// As `api` writes it, with a text of a usual length.
pub fn message(id: u64, due: Micros, conversation: usize, created_at: DateTime<Utc>) -> String {
    let message = json!({
        "id": id.to_string(),
        "content": content(due),
        "conversationId": (conversation + 1).to_string(),
        "sender": { "id": "1", "username": "viewer1", "avatarURL": null },
        "createdAt": rfc3339(created_at),
        "editedAt": null,
        "deletedAt": null,
        "mine": false,
    });
    message.to_string()
}

fn content(due: Micros) -> String {
    format!("{due:010} is when this message of the bench was due, in microseconds")
}

/// When events are due at a steady rate, in microseconds from its start.
pub fn due_times(per_second: u32, length: Duration) -> impl Iterator<Item = Micros> {
    let total = (f64::from(per_second) * length.as_secs_f64()) as u64;
    (0..total).map(move |number| number * 1_000_000 / u64::from(per_second) / GRAIN * GRAIN)
}

impl<'a> EventLoad<'a> {
    pub async fn new(world: &'a Bench, users: impl IntoIterator<Item = UserId>) -> anyhow::Result<Self> {
        let users: Vec<UserId> = users.into_iter().collect();
        let mut order: Vec<usize> = (0..users.len()).collect();
        order.shuffle(&mut rand::rng());
        let heads = fixtures::heads(world, &users).await?.into_iter().map(|(_, head)| head).collect();
        Ok(Self { world, users, order, next: 0, heads })
    }

    pub async fn one_each(&mut self) -> anyhow::Result<PublishReport> {
        let publisher = self.publisher(now(), None)?;
        let mut left = self.users.len();
        while left > 0 {
            let rows: Vec<EventRow> = (0..left.min(BATCH_ROWS)).map(|_| self.row(0)).collect();
            left -= rows.len();
            self.commit(&rows).await?;
            rows.chunks(500).try_for_each(|rows| publisher.send(self.burst(0, rows)?))?;
        }
        publisher.finish()
    }

    /// So many events to all users in turn, as fast as the window lets them; all are committed before.
    pub async fn flood(
        &mut self,
        events: u64,
        window: Window,
        begin: impl FnOnce(Micros) -> anyhow::Result<()>,
    ) -> anyhow::Result<PublishReport> {
        let rows: Vec<EventRow> = (0..events).map(|_| self.row(0)).collect();
        for some in rows.chunks(BATCH_ROWS) {
            self.commit(some).await?;
        }
        sqlx::query("CHECKPOINT").execute(&self.world.sql).await?;
        let bursts: Vec<Burst> =
            rows.chunks(FLOOD_BURST).map(|some| self.burst(0, some)).collect::<anyhow::Result<_>>()?;
        let since = clock::soon();
        begin(since)?;
        let publisher = self.publisher(since, Some(window))?;
        bursts.into_iter().try_for_each(|burst| publisher.send(burst))?;
        publisher.finish()
    }

    fn publisher(&self, since: Micros, window: Option<Window>) -> anyhow::Result<Publisher> {
        Publisher::start(Wire::Redis, self.world.redis.address(), 1, since, window)
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
        let dues: Vec<Micros> = due_times(per_second, length).collect();
        let mut bursts = VecDeque::new();
        if commits == Commits::Before {
            let mut rows: Vec<EventRow> = dues.iter().map(|due| self.row(*due)).collect();
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
        let publisher = self.publisher(since, None)?;
        bursts.into_iter().try_for_each(|burst| publisher.send(burst))?;
        if commits == Commits::Meanwhile {
            for dues in dues.chunk_by(|a, b| a / micros(BATCH_EVERY) == b / micros(BATCH_EVERY)) {
                let batch_from = dues[0];
                let rows: Vec<EventRow> = dues.iter().map(|due| self.row(*due)).collect();
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
        EventRow { due, user, seq, payload: message(self.next as u64, due, user, created_at), created_at }
    }

    async fn commit(&self, rows: &[EventRow]) -> anyhow::Result<()> {
        let users: Vec<i64> = rows.iter().map(|row| self.users[row.user].0).collect();
        let seqs: Vec<i64> = rows.iter().map(|row| row.seq.cast_signed()).collect();
        let contents: Vec<String> = rows.iter().map(|row| content(row.due)).collect();
        let mut connection = self.world.sql.acquire().await?;
        let mut transaction = connection.begin().await?;
        // Only here: the measurement begins after the commit.
        sqlx::query("SET LOCAL synchronous_commit = off").execute(&mut *transaction).await?;
        sqlx::query(
            "WITH rows AS MATERIALIZED (
                 SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[]) AS r (user_id, seq, content)
             ), heads AS (
                 UPDATE messenger.feed_heads AS h SET head_seq = newest.seq
                 FROM (SELECT user_id, max(seq) AS seq FROM rows GROUP BY user_id) AS newest
                 WHERE h.user_id = newest.user_id
             ), messages AS (
                 -- Of a conversation of each user's own that exists nowhere else.
                 INSERT INTO messenger.messages (conversation_id, number, sender_id, content) SELECT -user_id, seq, 0, content FROM rows
                 RETURNING -conversation_id AS user_id, number AS seq, id
             )
             INSERT INTO messenger.feed (user_id, seq, event_id) SELECT user_id, seq, id FROM messages",
        )
        .bind(users)
        .bind(seqs)
        .bind(contents)
        .execute(&mut *transaction)
        .await?;
        Ok(transaction.commit().await?)
    }

    fn burst(&self, due: Micros, rows: &[EventRow]) -> anyhow::Result<Burst> {
        let mut commands = Vec::with_capacity(rows.len() * 512);
        for row in rows {
            let user = self.users[row.user];
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
                .arg(self.world.channels().user(user))
                .arg(serde_json::to_vec(&envelope)?)
                .write_packed_command(&mut commands);
        }
        Ok(Burst { due, events: rows.len() as u64, commands: vec![commands] })
    }
}
