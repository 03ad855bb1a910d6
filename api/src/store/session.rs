//! What must hold between us and Postgres before we rely on it: the settings of a session that are ours to choose, an encoding
//! that holds every text, and no pooler in between that mixes up the statements of its clients.
//!
//! Nothing is asked for in the startup message, so that no pooler needs to be told what to ignore. A session sets what it needs
//! when it begins. Behind a pooler that gives each transaction another session, each transaction does.
//!
//! Left to the operator on purpose: `search_path` (it puts our tables into a schema), `default_transaction_read_only` (a brake
//! during a switchover; writes are answered 503), `synchronous_commit`. Of no effect: `TimeZone` and `DateStyle`, which the
//! driver sets, and `bytea_output`, `IntervalStyle` and `extra_float_digits`, since values travel in binary.

use std::time::Duration;

use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use thiserror::Error;

/// The limits and the isolation level of a session. `READ COMMITTED`: what the functions read after they took a lock is the newest
/// there is. An idle session is ours to end.
const SETTINGS: &str = "
    SET default_transaction_isolation = 'read committed';
    SET statement_timeout = '4s';
    SET lock_timeout = '2s';
    SET idle_session_timeout = 0";

/// The same for one transaction. Between its statements the server waits for us while it holds locks, so that wait has a limit too.
pub(super) const BEGIN_TRANSACTION: &str = "
    BEGIN ISOLATION LEVEL READ COMMITTED;
    SET LOCAL statement_timeout = '4s';
    SET LOCAL lock_timeout = '2s';
    SET LOCAL idle_in_transaction_session_timeout = '5s'";

/// For work that an operator started and waits for.
const WITHOUT_LIMITS: &str = "
    SET default_transaction_isolation = 'read committed';
    SET statement_timeout = 0;
    SET lock_timeout = 0;
    SET idle_session_timeout = 0;
    SET idle_in_transaction_session_timeout = 0;
    SET client_min_messages = warning";

/// A connection to `url`, named, with nothing in its startup message that a pooler might refuse.
pub fn options(url: PgConnectOptions) -> PgConnectOptions {
    url.application_name("api").extra_float_digits(None)
}

pub(super) async fn begin(connection: &mut PgConnection) -> sqlx::Result<()> {
    sqlx::raw_sql(SETTINGS).execute(connection).await?;
    Ok(())
}

/// Sets no limits, and reports no "relation already exists, skipping".
pub(super) async fn begin_without_limits(connection: &mut PgConnection) -> sqlx::Result<()> {
    sqlx::raw_sql(WITHOUT_LIMITS).execute(connection).await?;
    Ok(())
}

/// What is between us and Postgres.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// A connection is one session of the server until it is closed.
    Direct,
    /// A pooler may give each transaction another session.
    Pooled,
}

/// Why this database cannot be used as it is.
#[derive(Debug, Error)]
pub enum Unfit {
    #[error(
        "the database {database:?} has the encoding {encoding}, and texts need UTF8; \
         create another one: CREATE DATABASE name ENCODING 'UTF8' TEMPLATE template0"
    )]
    Encoding { database: String, encoding: String },
    #[error(
        "DATABASE_URL leads to a pooler that mixes up the prepared statements of its clients; use PgBouncer 1.21 or newer with \
         max_prepared_statements above 0, or pool_mode = session, or the address of Postgres itself (docs/deploy.md)"
    )]
    MixedStatements,
    #[error(transparent)]
    Store(#[from] sqlx::Error),
}

/// In which order two connections run their statement: each of them also twice in a row, so that a pooler that takes its
/// sessions in turn does not give each of them the same one every time.
const PROBES: [usize; 12] = [0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0];

/// Two new connections, through which the database was looked at.
pub async fn connect(postgres: &PgConnectOptions) -> Result<([PgConnection; 2], Route), Unfit> {
    let mut connections =
        [PgConnection::connect_with(postgres).await?, PgConnection::connect_with(postgres).await?];
    let route = find_route(&mut connections).await?;
    if route == Route::Direct {
        for connection in &mut connections {
            begin(connection).await?;
        }
    }
    let (database, encoding): (String, String) =
        sqlx::query_as("SELECT current_database()::text, current_setting('server_encoding')")
            .fetch_one(&mut connections[0])
            .await?;
    if encoding == "UTF8" { Ok((connections, route)) } else { Err(Unfit::Encoding { database, encoding }) }
}

/// Both connections prepare a statement of their own under the same name, as the driver numbers them, and run it several times. A
/// session has one process of the server for itself: another process, or one that serves both, means a pooler. When a pooler
/// moves a connection to a session that does not know its statement under this name, the server refuses the name, or runs the
/// statement of the other connection.
async fn find_route(connections: &mut [PgConnection; 2]) -> Result<Route, Unfit> {
    const STATEMENTS: [&str; 2] = ["SELECT pg_backend_pid(), 0", "SELECT pg_backend_pid(), 1"];
    let mut processes = [None, None];
    let mut route = Route::Direct;
    for probe in PROBES {
        let answer = sqlx::query_as(STATEMENTS[probe]).fetch_one(&mut connections[probe]).await;
        let (process, ran): (i32, i32) = answer.map_err(|error| match &error {
            sqlx::Error::Database(refusal) if refusal.code().is_some_and(|code| is_mixed(&code)) => {
                Unfit::MixedStatements
            }
            _ => Unfit::Store(error),
        })?;
        if usize::try_from(ran) != Ok(probe) {
            return Err(Unfit::MixedStatements);
        }
        if processes[1 - probe] == Some(process) || processes[probe].is_some_and(|known| known != process) {
            route = Route::Pooled;
        }
        processes[probe] = Some(process);
    }
    Ok(route)
}

/// By SQLSTATE: the name of the statement is taken, or is not known. A session that is ours alone answers neither.
fn is_mixed(code: &str) -> bool {
    ["42P05", "26000"].contains(&code)
}

const LOCK_TRIED_EVERY: Duration = Duration::from_millis(200);

/// Holds off everybody else who calls this until the transaction ends. The lock belongs to a transaction, so that it holds, and
/// ends, through a pooler as well. It is tried again and again rather than waited for: a statement that waits keeps a snapshot, and
/// `CREATE INDEX CONCURRENTLY` under the lock would wait for that one in turn. For the same reason it is `READ COMMITTED`.
pub(super) async fn lock(
    connection: &mut PgConnection,
    key: i64,
) -> sqlx::Result<sqlx::Transaction<'_, sqlx::Postgres>> {
    const BEGIN: &str = "
        BEGIN ISOLATION LEVEL READ COMMITTED;
        SET LOCAL statement_timeout = 0;
        SET LOCAL lock_timeout = 0;
        SET LOCAL idle_in_transaction_session_timeout = 0";
    let mut held = connection.begin_with(BEGIN).await?;
    while !sqlx::query_scalar("SELECT pg_try_advisory_xact_lock($1)").bind(key).fetch_one(&mut *held).await? {
        tokio::time::sleep(LOCK_TRIED_EVERY).await;
    }
    Ok(held)
}
