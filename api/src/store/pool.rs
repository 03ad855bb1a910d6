//! Connections to Postgres, kept open between statements.
//!
//! A connection is tested before use only if it was idle for a while, so a statement is one round trip. A conflict with
//! another transaction is repeated on its connection. One whose work did not end well otherwise (an error, a time-out, a cancelled
//! request) is closed and never used again. Why neither sqlx's pool nor `deadpool`:
//! `docs/decisions/0010-a-connection-pool-of-our-own.md`.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};

use super::session;

const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that was idle for longer is tested before use, and must answer within this time.
const IDLE: Duration = Duration::from_secs(1);
/// A connection is not used for longer, so that the pool follows the server's name to another address.
const LIFETIME: Duration = Duration::from_mins(30);

pub(super) struct Pool {
    options: PgConnectOptions,
    size: usize,
    permits: Arc<Semaphore>,
    /// A connection is a session of the server, which keeps the settings that it begins with.
    has_sessions: AtomicBool,
    /// The last one used is the next one used, so that no more stay open than are needed.
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    connection: PgConnection,
    is_session: bool,
    opened: Instant,
    since: Instant,
}

/// A connection in use. It is closed when dropped; [`Pool::put_back`] keeps it.
pub(super) struct InUse {
    connection: PgConnection,
    /// Its session has our settings. Otherwise each transaction sets them.
    is_session: bool,
    opened: Instant,
    /// Dropped after the connection is closed, so that the server never sees more than `size`.
    _permit: OwnedSemaphorePermit,
}

impl Pool {
    pub(super) fn new(options: PgConnectOptions, size: usize) -> Self {
        let permits = Arc::new(Semaphore::new(size));
        Self { options, size, permits, has_sessions: AtomicBool::new(false), idle: Mutex::default() }
    }

    /// No pooler is in between: connections opened from now on are sessions.
    pub(super) fn use_sessions(&self) {
        self.has_sessions.store(true, Ordering::Relaxed);
    }

    pub(super) async fn acquire(&self) -> sqlx::Result<InUse> {
        timeout(ACQUIRE_TIMEOUT, self.reuse_or_connect()).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
    }

    async fn reuse_or_connect(&self) -> sqlx::Result<InUse> {
        let permit = self.permits.clone().acquire_owned().await.map_err(|_| sqlx::Error::PoolClosed)?;
        let idle = self.idle_connections().pop();
        if let Some(Idle { mut connection, is_session, opened, since }) = idle {
            if since.elapsed() < IDLE || answers(&mut connection).await {
                return Ok(InUse { connection, is_session, opened, _permit: permit });
            }
            // The cause has most likely ended the connections that were idle for longer, too.
            self.idle_connections().clear();
        }
        let mut connection = PgConnection::connect_with(&self.options).await?;
        let is_session = self.has_sessions.load(Ordering::Relaxed);
        if is_session {
            session::begin(&mut connection).await?;
        }
        Ok(InUse { connection, is_session, opened: Instant::now(), _permit: permit })
    }

    /// Call it only after a complete answer.
    pub(super) fn put_back(&self, InUse { connection, is_session, opened, _permit: permit }: InUse) {
        if opened.elapsed() < LIFETIME && !self.permits.is_closed() {
            self.idle_connections().push(Idle { connection, is_session, opened, since: Instant::now() });
        }
        // Last, so that the next owner of the permit finds the connection.
        drop(permit);
    }

    pub(super) fn in_use(&self) -> usize {
        self.size - self.permits.available_permits()
    }

    pub(super) fn idle(&self) -> usize {
        self.idle_connections().len()
    }

    /// Hands out no more connections, and closes the idle ones in the protocol's way.
    pub(super) async fn close(&self) {
        self.permits.close();
        let idle = std::mem::take(&mut *self.idle_connections());
        let _ = timeout(IDLE, join_all(idle.into_iter().map(|idle| idle.connection.close()))).await;
    }

    fn idle_connections(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InUse {
    /// Runs `work` with our limits and at our isolation level, not with the database's defaults.
    pub(super) async fn run<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut PgConnection) -> sqlx::Result<T>,
    ) -> sqlx::Result<T> {
        if self.is_session {
            return work(&mut self.connection).await;
        }
        let mut transaction = self.connection.begin_with(session::BEGIN_TRANSACTION).await?;
        let answer = work(&mut transaction).await?;
        transaction.commit().await?;
        Ok(answer)
    }
}

async fn answers(connection: &mut PgConnection) -> bool {
    timeout(IDLE, connection.ping()).await.is_ok_and(|answer| answer.is_ok())
}

#[cfg(test)]
mod tests {
    use sqlx::PgPool;
    use testkit::proxy::Proxy;

    use super::*;

    /// A slow machine opens connections slowly, which is no fault of the pool.
    async fn acquire(pool: &Pool) -> InUse {
        loop {
            match pool.acquire().await {
                Ok(in_use) => return in_use,
                Err(sqlx::Error::PoolTimedOut) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[sqlx::test(migrations = false)]
    async fn idle_connections_that_were_cut_are_replaced(database: PgPool) {
        let options = (*database.connect_options()).clone();
        let upstream = (options.get_host(), options.get_port());
        let upstream = tokio::net::lookup_host(upstream).await.unwrap().next().unwrap();
        let proxy = Proxy::start(upstream).await;
        let pool = Pool::new(options.host("127.0.0.1").port(proxy.address().port()), 4);
        let mut in_use = Vec::new();
        for _ in 0..4 {
            in_use.push(acquire(&pool).await);
        }
        in_use.into_iter().for_each(|in_use| pool.put_back(in_use));
        // Postgres restarts while all of them are idle.
        proxy.cut_all().await;
        for idle in &mut *pool.idle_connections() {
            idle.since -= IDLE;
        }
        for _ in 0..4 {
            let mut in_use = acquire(&pool).await;
            in_use.connection.ping().await.unwrap();
            pool.put_back(in_use);
        }
        assert_eq!((pool.idle(), pool.in_use()), (1, 0), "the others are not kept");
    }
}
