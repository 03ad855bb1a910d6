//! Readiness: a replica gets traffic while Postgres answers. Redis does not count: without it delivery is only slower.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use service_kit::ops::Readiness;
use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::{metrics::Metrics, store::Database};

const PERIOD: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub struct SharedReadiness(Arc<Mutex<Readiness>>);

impl SharedReadiness {
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Readiness { ready: false, note: "starting".into() })))
    }

    pub fn get(&self) -> Readiness {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, ready: bool, note: &str) {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if current.ready != ready {
            tracing::info!(ready, note, "readiness changed");
        }
        *current = Readiness { ready, note: note.into() };
    }
}

impl Default for SharedReadiness {
    fn default() -> Self {
        Self::new()
    }
}

/// Pings Postgres once a second on a connection of its own, because a busy pool is no reason to become unready. After `stop`
/// the replica is unready.
pub async fn watch(
    postgres: PgConnectOptions,
    database: Database,
    metrics: Metrics,
    readiness: SharedReadiness,
    stop: CancellationToken,
) {
    let mut connection: Option<PgConnection> = None;
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => break,
        }
        let answers = tokio::select! {
            answer = timeout(PATIENCE, ping(&mut connection, &postgres)) => answer.is_ok_and(|answer| answer.is_ok()),
            () = stop.cancelled() => break,
        };
        if !answers {
            connection = None;
        }
        let (in_use, idle) = database.connections();
        metrics.database_connections_used.set(i64::try_from(in_use).unwrap_or(i64::MAX));
        metrics.database_connections_idle.set(i64::try_from(idle).unwrap_or(i64::MAX));
        let redis = metrics.redis_connected.get() == 1;
        match (answers, redis) {
            (false, _) => readiness.set(false, "Postgres does not answer"),
            (true, true) => readiness.set(true, "ready"),
            (true, false) => readiness.set(true, "ready, degraded: Redis does not answer"),
        }
    }
    readiness.set(false, "stopping");
}

/// Tries a new connection if the old one has died: the server may end idle ones.
async fn ping(connection: &mut Option<PgConnection>, postgres: &PgConnectOptions) -> Result<(), sqlx::Error> {
    if let Some(known) = connection
        && known.ping().await.is_ok()
    {
        return Ok(());
    }
    connection.insert(PgConnection::connect_with(postgres).await?).ping().await
}
