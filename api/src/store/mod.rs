//! Postgres; nothing else knows SQL. Functions run on the caller's connection, one statement each, but for [`messages::page`].
//!
//! [`Database`] bounds the number of connections, the wait for one, and the wait for an answer.

pub mod audience;
pub mod blocks;
pub mod conversations;
pub mod erasures;
pub mod export;
pub mod feed;
pub mod groups;
pub mod identities;
pub mod messages;
mod pool;
pub mod published;
pub mod relay;
pub mod retention;
pub mod schema;
pub mod service_tokens;
pub mod session;
pub mod sessions;
pub mod users;

use std::{borrow::Cow, sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use prometheus_client::metrics::counter::Counter;
use protocol::{
    event::{self, Envelope},
    ids::UserId,
    position::{Epoch, Position, Seq},
};
use serde_json::value::RawValue;
use sqlx::{PgConnection, postgres::PgConnectOptions};
use thiserror::Error;

use crate::{domain::event::Event, request_context::RequestContext};
use pool::Pool;

#[derive(Debug, Error)]
pub enum StoreError {
    /// Temporary: the client may repeat the request.
    #[error("database unavailable: {0}")]
    Unavailable(String),
    #[error("database error: {0}")]
    Fault(#[from] sqlx::Error),
    /// Temporary: too many commands wait for their turn on one conversation.
    #[error("too many commands on one conversation")]
    Crowded,
}

#[derive(Clone)]
pub struct Database {
    pool: Arc<Pool>,
    conflicts: Counter,
}

/// A server that sends nothing for this long counts as unavailable.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

impl Database {
    /// Connects when first needed. Until [`Self::use_sessions`], each piece of work is a transaction with its own settings, which
    /// works through any pooler.
    pub fn new(options: PgConnectOptions, connections: usize, conflicts: Counter) -> Self {
        Self { pool: Arc::new(Pool::new(options, connections)), conflicts }
    }

    /// No pooler is in between ([`session::Route::Direct`]): a statement commits itself, in one round trip.
    pub fn use_sessions(&self) {
        self.pool.use_sessions();
    }

    /// Runs `work` on a connection, in bounded time. A conflict with another transaction is retried once: Postgres has rolled it back,
    /// so nothing happens twice.
    pub async fn run<T>(
        &self,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error> + Clone,
    ) -> Result<T, StoreError> {
        let mut in_use = self.pool.acquire().await.map_err(classify)?;
        let answer = async {
            match in_use.run(work.clone()).await {
                Err(error) if self.is_conflict(&error) => in_use.run(work).await.inspect_err(|error| {
                    self.is_conflict(error);
                }),
                answer => answer,
            }
        };
        match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
            Ok(Ok(answer)) => {
                self.pool.put_back(in_use);
                Ok(answer)
            }
            Ok(Err(error)) => Err(classify(error)),
            Err(_) => Err(StoreError::Unavailable("no answer in time".into())),
        }
    }

    pub fn connections(&self) -> (usize, usize) {
        (self.pool.in_use(), self.pool.idle())
    }

    /// Every later [`Self::run`] fails.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// Counts it if it is one: two transactions could not both continue (40001), or waited for each other (40P01), or a receiver
    /// was erased (P0002).
    fn is_conflict(&self, error: &sqlx::Error) -> bool {
        let is_conflict = sql_state(error).is_some_and(|code| CONFLICTS.contains(&&*code));
        if is_conflict {
            self.conflicts.inc();
        }
        is_conflict
    }
}

fn classify(error: sqlx::Error) -> StoreError {
    let transient = matches!(error, sqlx::Error::Tls(_)) || is_transient(&error);
    if transient { StoreError::Unavailable(error.to_string()) } else { StoreError::Fault(error) }
}

/// By SQLSTATE: connection lost, also behind a pooler (08), too many connections or out of memory or disk (53), shutting down or starting
/// (57P), a time limit (57014, 55P03, 25P03, 25P04), a read-only standby after a failover (25006), a conflict.
pub fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => true,
        _ => sql_state(error).is_some_and(|code| {
            ["08", "53", "57P"].iter().any(|class| code.starts_with(class))
                || ["57014", "55P03", "25P03", "25P04", "25006"].contains(&&*code)
                || CONFLICTS.contains(&&*code)
        }),
    }
}

/// P0002: a user who was to receive an event was erased after the statement had found them; it finds them no more.
const CONFLICTS: [&str; 3] = ["40001", "40P01", "P0002"];

fn sql_state(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    error.as_database_error()?.code()
}

/// An event that was committed to the feed of `receiver`.
#[derive(Debug)]
pub struct Appended {
    pub receiver: UserId,
    pub envelope: Envelope,
}

/// The arrays of a command function: where its event was appended.
struct AppendedTo {
    receivers: Option<Vec<i64>>,
    epochs: Option<Vec<i64>>,
    seqs: Option<Vec<i64>>,
}

impl AppendedTo {
    fn positions(self) -> sqlx::Result<Positions> {
        let [receivers, epochs, seqs] =
            [self.receivers, self.epochs, self.seqs].map(Option::unwrap_or_default);
        if receivers.len() != epochs.len() || receivers.len() != seqs.len() {
            return Err(sqlx::Error::Decode("a receiver without a position".into()));
        }
        let positions = epochs.into_iter().zip(seqs).map(|(epoch, seq)| position(epoch, seq));
        receivers.into_iter().zip(positions).map(|(user, at)| Ok((UserId(user), at?))).collect()
    }

    /// Of a command with events of two kinds, where `kinds` tells which one went to the nth receiver: those of `first`, and the others.
    fn of_kind(self, kinds: Option<Vec<String>>, first: &str) -> sqlx::Result<(Positions, Positions)> {
        let (positions, kinds) = (self.positions()?, kinds.unwrap_or_default());
        if positions.len() != kinds.len() {
            return Err(sqlx::Error::Decode("a receiver without a kind of event".into()));
        }
        let (first, second): (Vec<_>, Vec<_>) =
            positions.into_iter().zip(kinds).partition(|(_, kind)| kind == first);
        let without_kinds = |of: Vec<(_, String)>| of.into_iter().map(|(position, _)| position).collect();
        Ok((without_kinds(first), without_kinds(second)))
    }
}

/// Receivers, and where in their feeds.
type Positions = Vec<(UserId, Position)>;

/// The same event for each of these receivers.
fn envelopes(
    receivers: impl IntoIterator<Item = (UserId, Position)>,
    event: &Event,
    created_at: DateTime<Utc>,
    request: &RequestContext,
) -> sqlx::Result<Vec<Appended>> {
    let data = to_json(event)?;
    let envelope = |(receiver, at)| {
        let (request_id, traceparent) = (Some(request.request_id.clone()), request.traceparent());
        let envelope = envelope(at, event.name(), data.clone(), created_at, request_id, traceparent);
        Appended { receiver, envelope }
    };
    Ok(receivers.into_iter().map(envelope).collect())
}

fn to_json(event: &Event) -> sqlx::Result<Box<RawValue>> {
    serde_json::value::to_raw_value(event).map_err(|error| sqlx::Error::Encode(error.into()))
}

fn envelope(
    Position { epoch, seq }: Position,
    name: impl Into<String>,
    data: Box<RawValue>,
    created_at: DateTime<Utc>,
    request_id: Option<String>,
    traceparent: Option<String>,
) -> Envelope {
    Envelope { v: event::VERSION, epoch, seq, event: name.into(), data, created_at, request_id, traceparent }
}

/// An outcome that the function's comment does not name.
fn unexpected(outcome: &str) -> sqlx::Error {
    sqlx::Error::Decode(format!("unexpected outcome {outcome:?}").into())
}

fn position(epoch: i64, seq: i64) -> sqlx::Result<Position> {
    Ok(Position { epoch: Epoch::from_sql(epoch), seq: number(seq)? })
}

fn number(seq: i64) -> Result<Seq, sqlx::Error> {
    Seq::try_from(seq).map_err(|error| sqlx::Error::Decode(error.into()))
}
