//! Settings and checks before we rely on a database: the settings of a session, an encoding that holds every text, and no
//! pooler that mixes up the statements of its clients.
//!
//! The startup message carries no settings, because poolers refuse unknown ones. A session sets them when it begins; behind a pooler in
//! transaction mode, each transaction does.
//!
//! Left to the operator: `default_transaction_read_only` (a brake during a switchover; writes are answered 503) and
//! `synchronous_commit`. Without effect: `search_path`, since names are qualified; `TimeZone` and `DateStyle`, which the driver sets;
//! `bytea_output`, `IntervalStyle` and `extra_float_digits`, since values travel in binary.

use std::time::Duration;

use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use thiserror::Error;

/// `READ COMMITTED`: what the functions read after they took a lock is the newest there is. Idle sessions are closed by us. The server logs
/// no parameters of a statement that fails: one may be a text.
const SETTINGS: &str = "
    SET default_transaction_isolation = 'read committed';
    SET log_parameter_max_length_on_error = 0;
    SET statement_timeout = '4s';
    SET lock_timeout = '2s';
    SET idle_session_timeout = 0";

/// The same for one transaction. Between its statements the server holds locks and waits for us, so that wait is bounded too.
pub(super) const BEGIN_TRANSACTION: &str = "
    BEGIN ISOLATION LEVEL READ COMMITTED;
    SET LOCAL log_parameter_max_length_on_error = 0;
    SET LOCAL statement_timeout = '4s';
    SET LOCAL lock_timeout = '2s';
    SET LOCAL idle_in_transaction_session_timeout = '5s'";

/// For work that an operator waits for.
const WITHOUT_LIMITS: &str = "
    SET default_transaction_isolation = 'read committed';
    SET log_parameter_max_length_on_error = 0;
    SET statement_timeout = 0;
    SET lock_timeout = 0;
    SET idle_session_timeout = 0;
    SET idle_in_transaction_session_timeout = 0;
    SET client_min_messages = warning";

pub(super) async fn begin(connection: &mut PgConnection) -> sqlx::Result<()> {
    sqlx::raw_sql(SETTINGS).execute(connection).await?;
    Ok(())
}

/// Also silences "relation already exists, skipping".
pub(super) async fn begin_without_limits(connection: &mut PgConnection) -> sqlx::Result<()> {
    sqlx::raw_sql(WITHOUT_LIMITS).execute(connection).await?;
    Ok(())
}

/// The connection to Postgres: direct, or through a pooler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// A connection keeps one session of the server.
    Direct,
    /// A pooler may give each transaction another session.
    Pooled,
}

#[derive(Debug, Error)]
pub enum UnusableDatabase {
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

/// The order in which two connections run their statement. Each also runs twice in a row, so that a pooler that takes its sessions in
/// turn does not give each connection the same one every time.
const PROBES: [usize; 12] = [0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0];

/// Two new connections, after the checks.
pub async fn connect(postgres: &PgConnectOptions) -> Result<([PgConnection; 2], Route), UnusableDatabase> {
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
    if encoding == "UTF8" {
        Ok((connections, route))
    } else {
        Err(UnusableDatabase::Encoding { database, encoding })
    }
}

/// Both connections prepare a different statement under the same name (the driver numbers them) and run it several times. A session has a
/// server process of its own: another process, or one that serves both, means a pooler. If the pooler moves a connection to a session
/// that does not have its statement, the server rejects the name or runs the other connection's statement.
async fn find_route(connections: &mut [PgConnection; 2]) -> Result<Route, UnusableDatabase> {
    const STATEMENTS: [&str; 2] = ["SELECT pg_backend_pid(), 0", "SELECT pg_backend_pid(), 1"];
    let mut processes = [None, None];
    let mut route = Route::Direct;
    for probe in PROBES {
        let answer = sqlx::query_as(STATEMENTS[probe]).fetch_one(&mut connections[probe]).await;
        let (process, ran): (i32, i32) = answer.map_err(|error| match &error {
            sqlx::Error::Database(rejected) if rejected.code().is_some_and(|code| is_mixed(&code)) => {
                UnusableDatabase::MixedStatements
            }
            _ => UnusableDatabase::Store(error),
        })?;
        if usize::try_from(ran) != Ok(probe) {
            return Err(UnusableDatabase::MixedStatements);
        }
        if processes[1 - probe] == Some(process) || processes[probe].is_some_and(|known| known != process) {
            route = Route::Pooled;
        }
        processes[probe] = Some(process);
    }
    Ok(route)
}

/// By SQLSTATE: the statement's name is taken or unknown, which never happens in a session of our own.
fn is_mixed(code: &str) -> bool {
    ["42P05", "26000"].contains(&code)
}

const LOCK_RETRY: Duration = Duration::from_millis(200);

/// Excludes all other callers until the transaction ends. The lock belongs to a transaction, so that it works through a pooler. It is
/// polled, not waited for: a waiting statement keeps a snapshot, and `CREATE INDEX CONCURRENTLY` under the lock would wait for that
/// snapshot. For the same reason the transaction is `READ COMMITTED`.
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
        tokio::time::sleep(LOCK_RETRY).await;
    }
    Ok(held)
}
