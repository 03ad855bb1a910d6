//! Connections to Postgres, kept open between statements.
//!
//! Sqlx's own pool tries each connection when it is handed out and again when it comes back: two more round trips around every
//! statement, and the second one without a limit, so that a link that dies at that moment takes a place of the pool with it for
//! a quarter of an hour. Here a connection is tried only if it has rested for a while, and what did not end well is dropped.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};

use super::session;

/// To get a connection, waiting for one included.
const TAKE_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that has rested longer is tried before it is used, and must answer in as short a time.
const RESTED: Duration = Duration::from_secs(1);
/// A connection is not used for longer, so that a pool finds its way to where the name of the server leads by now.
const LIFETIME: Duration = Duration::from_mins(30);

pub(super) struct Pool {
    options: PgConnectOptions,
    size: usize,
    places: Arc<Semaphore>,
    /// A connection is a session of the server, which keeps the settings that it begins with.
    has_sessions: AtomicBool,
    /// The last one used is the next one used, so that no more are kept busy than are needed.
    resting: Mutex<Vec<Resting>>,
}

struct Resting {
    connection: PgConnection,
    is_session: bool,
    made: Instant,
    since: Instant,
}

/// A connection in use. It is closed when dropped; [`Pool::put_back`] keeps it.
pub(super) struct InUse {
    connection: PgConnection,
    /// Its session has our settings. Otherwise each transaction sets them.
    is_session: bool,
    made: Instant,
    _place: OwnedSemaphorePermit,
}

impl Pool {
    pub(super) fn new(options: PgConnectOptions, size: usize) -> Self {
        let places = Arc::new(Semaphore::new(size));
        Self { options, size, places, has_sessions: AtomicBool::new(false), resting: Mutex::default() }
    }

    /// No pooler is in between: connections that are made from now on are sessions.
    pub(super) fn use_sessions(&self) {
        self.has_sessions.store(true, Ordering::Relaxed);
    }

    pub(super) async fn take(&self) -> sqlx::Result<InUse> {
        timeout(TAKE_TIMEOUT, self.find()).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
    }

    async fn find(&self) -> sqlx::Result<InUse> {
        let place = self.places.clone().acquire_owned().await.map_err(|_| sqlx::Error::PoolClosed)?;
        let resting = self.resting().pop();
        if let Some(Resting { mut connection, is_session, made, since }) = resting {
            if since.elapsed() < RESTED || answers(&mut connection).await {
                return Ok(InUse { connection, is_session, made, _place: place });
            }
            // What has ended this one has most likely ended those that rest for longer.
            self.resting().clear();
        }
        let mut connection = PgConnection::connect_with(&self.options).await?;
        let is_session = self.has_sessions.load(Ordering::Relaxed);
        if is_session {
            session::begin(&mut connection).await?;
        }
        Ok(InUse { connection, is_session, made: Instant::now(), _place: place })
    }

    /// Only what is in good order comes back: after a whole answer, not after a wait that was given up.
    pub(super) fn put_back(&self, InUse { connection, is_session, made, _place: place }: InUse) {
        if made.elapsed() < LIFETIME && !self.places.is_closed() {
            self.resting().push(Resting { connection, is_session, made, since: Instant::now() });
        }
        // Last, so that whoever gets the place finds the connection.
        drop(place);
    }

    /// Connections that are in use or being made.
    pub(super) fn in_use(&self) -> usize {
        self.size - self.places.available_permits()
    }

    pub(super) fn idle(&self) -> usize {
        self.resting().len()
    }

    /// Nobody gets a connection any more, and Postgres is told that those at rest are done.
    pub(super) async fn close(&self) {
        self.places.close();
        let resting = std::mem::take(&mut *self.resting());
        for Resting { connection, .. } in resting {
            let _ = timeout(RESTED, connection.close()).await;
        }
    }

    fn resting(&self) -> MutexGuard<'_, Vec<Resting>> {
        self.resting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InUse {
    /// Runs `work` with our limits and at our isolation level, whatever the database's defaults are.
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
    timeout(RESTED, connection.ping()).await.is_ok_and(|answer| answer.is_ok())
}

#[cfg(test)]
mod tests {
    use sqlx::PgPool;
    use testkit::proxy::Proxy;

    use super::*;

    /// A machine that is slow makes connections slowly, which is no fault of those that were cut.
    async fn take(pool: &Pool) -> InUse {
        loop {
            match pool.take().await {
                Ok(taken) => return taken,
                Err(sqlx::Error::PoolTimedOut) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[sqlx::test(migrations = false)]
    async fn connections_cut_while_at_rest_are_replaced(database: PgPool) {
        let options = (*database.connect_options()).clone();
        let upstream = (options.get_host(), options.get_port());
        let upstream = tokio::net::lookup_host(upstream).await.unwrap().next().unwrap();
        let proxy = Proxy::start(upstream).await;
        let pool = Pool::new(options.host("127.0.0.1").port(proxy.address().port()), 4);
        let mut taken = Vec::new();
        for _ in 0..4 {
            taken.push(take(&pool).await);
        }
        taken.into_iter().for_each(|taken| pool.put_back(taken));
        // A restart of Postgres, seen by connections that rest.
        proxy.cut_all().await;
        for resting in &mut *pool.resting() {
            resting.since -= RESTED;
        }
        for _ in 0..4 {
            let mut taken = take(&pool).await;
            taken.connection.ping().await.unwrap();
            pool.put_back(taken);
        }
        assert_eq!((pool.idle(), pool.in_use()), (1, 0), "the others are not kept");
    }
}
