//! May this replica get traffic? It may while Postgres answers. Redis is not asked: without it delivery is slower, and an
//! unready replica would make it none.

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

/// The newest judgement.
#[derive(Clone)]
pub struct Judgement(Arc<Mutex<Readiness>>);

impl Judgement {
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

impl Default for Judgement {
    fn default() -> Self {
        Self::new()
    }
}

/// Asks Postgres once a second, on a connection of its own: a busy pool is no reason to be taken out of service. Until `stop`;
/// from then on the judgement is "no".
pub async fn watch(
    postgres: PgConnectOptions,
    database: Database,
    metrics: Metrics,
    judgement: Judgement,
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
            answer = timeout(PATIENCE, ask(&mut connection, &postgres)) => answer.is_ok_and(|answer| answer.is_ok()),
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
            (false, _) => judgement.set(false, "Postgres does not answer"),
            (true, true) => judgement.set(true, "ready"),
            (true, false) => judgement.set(true, "ready, degraded: Redis does not answer"),
        }
    }
    judgement.set(false, "stopping");
}

/// A connection that has died since the last time, as when the server ends idle ones, says nothing about a new one.
async fn ask(connection: &mut Option<PgConnection>, postgres: &PgConnectOptions) -> Result<(), sqlx::Error> {
    if let Some(known) = connection
        && known.ping().await.is_ok()
    {
        return Ok(());
    }
    connection.insert(PgConnection::connect_with(postgres).await?).ping().await
}
