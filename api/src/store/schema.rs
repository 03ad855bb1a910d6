//! The schema: applied by `api migrate`, a step of its own, and looked at when a server starts.

use sqlx::{
    PgConnection,
    migrate::{Migrate, MigrateError, Migrator},
};
use thiserror::Error;

use super::session::{self, Route};

pub static MIGRATIONS: Migrator = sqlx::migrate!();

/// Where sqlx notes what was applied.
const TABLE: &str = "_sqlx_migrations";

#[derive(Debug, Error)]
pub enum SchemaError {
    #[error("the schema is stale: {0} of {1} migrations are applied; run `api migrate` first")]
    Stale(usize, usize),
    #[error("migration {0} was edited after it was applied here, or failed half way")]
    Altered(i64),
    #[error(transparent)]
    Migrate(#[from] MigrateError),
}

impl From<sqlx::Error> for SchemaError {
    fn from(error: sqlx::Error) -> Self {
        Self::Migrate(error.into())
    }
}

/// Names the lock that `migrate` holds; any number that nobody else takes.
const LOCK: i64 = 0x6d65_7373_656e_6765;

/// Applies what is missing. Several at once wait for each other: by a lock of ours, since the one of sqlx belongs to a session, and
/// a pooler would leave it behind.
pub async fn migrate([holder, worker]: &mut [PgConnection; 2], route: Route) -> Result<(), MigrateError> {
    if route == Route::Direct {
        session::begin_without_limits(worker).await?;
    }
    let held = session::lock(holder, LOCK).await?;
    Migrator::with_migrations(MIGRATIONS.iter().cloned().collect()).set_locking(false).run(worker).await?;
    held.rollback().await?;
    Ok(())
}

/// Every migration of this build is applied, as it is here. More are no obstacle: a newer version is being rolled out.
pub async fn require_current(connection: &mut PgConnection) -> Result<(), SchemaError> {
    let needed = MIGRATIONS.iter().count();
    let made = sqlx::query_scalar!(r#"SELECT to_regclass('_sqlx_migrations') IS NOT NULL AS "made!""#)
        .fetch_one(&mut *connection)
        .await?;
    if !made {
        return Err(SchemaError::Stale(0, needed));
    }
    if let Some(version) = connection.dirty_version(TABLE).await? {
        return Err(SchemaError::Altered(version));
    }
    let applied = connection.list_applied_migrations(TABLE).await?;
    let mut found = 0;
    for migration in MIGRATIONS.iter() {
        match applied.iter().find(|applied| applied.version == migration.version) {
            Some(applied) if applied.checksum == migration.checksum => found += 1,
            Some(_) => return Err(SchemaError::Altered(migration.version)),
            None => {}
        }
    }
    if found < needed { Err(SchemaError::Stale(found, needed)) } else { Ok(()) }
}
