//! The schema: applied by `api migrate`, a step of its own, and checked when a server starts.
//!
//! Tables change by numbered migrations, each applied once and never edited. Functions (`api/sql`) are replaced as a set whenever their
//! text has changed. Every set that was ever applied is recorded, so that a replica of the release before can still restart while
//! this one rolls out.

use std::sync::LazyLock;

use sha2::{Digest, Sha256};
use sqlx::{
    AssertSqlSafe, Connection, PgConnection, SqlSafeStr,
    migrate::{Migrate, MigrateError, Migration, MigrationType, Migrator},
};
use thiserror::Error;

use super::session::{self, Route};

const SCHEMA: &str = "messenger";
/// sqlx's record of the applied migrations.
const MIGRATIONS_TABLE: &str = "messenger._sqlx_migrations";

static TABLES: Migrator = sqlx::migrate!();

/// Each after its dependencies, since Postgres checks views and the bodies of plain SQL functions when they are created.
const FUNCTIONS: [&str; 36] = [
    include_str!("../../sql/session_is_live.sql"),
    include_str!("../../sql/append_to_feed.sql"),
    include_str!("../../sql/append_to_feeds.sql"),
    include_str!("../../sql/visible_last_read.sql"),
    include_str!("../../sql/seen_conversations.sql"),
    include_str!("../../sql/seen_participants.sql"),
    include_str!("../../sql/find_user.sql"),
    include_str!("../../sql/may_add.sql"),
    include_str!("../../sql/lock_group.sql"),
    include_str!("../../sql/lock_message.sql"),
    include_str!("../../sql/append_for_members.sql"),
    include_str!("../../sql/leave_group.sql"),
    include_str!("../../sql/post_message.sql"),
    include_str!("../../sql/edit_message.sql"),
    include_str!("../../sql/delete_message.sql"),
    include_str!("../../sql/expire_messages.sql"),
    include_str!("../../sql/empty_left_group.sql"),
    include_str!("../../sql/start_conversation.sql"),
    include_str!("../../sql/mark_read.sql"),
    include_str!("../../sql/create_group.sql"),
    include_str!("../../sql/rename_group.sql"),
    include_str!("../../sql/tell_of_user.sql"),
    include_str!("../../sql/update_user.sql"),
    include_str!("../../sql/add_participant.sql"),
    include_str!("../../sql/set_role.sql"),
    include_str!("../../sql/remove_participant.sql"),
    include_str!("../../sql/provision_user.sql"),
    include_str!("../../sql/put_user.sql"),
    include_str!("../../sql/check_event.sql"),
    include_str!("../../sql/stage_event.sql"),
    include_str!("../../sql/publish.sql"),
    include_str!("../../sql/relay_events.sql"),
    include_str!("../../sql/note_erasures.sql"),
    include_str!("../../sql/erase_user.sql"),
    include_str!("../../sql/erase_messages.sql"),
    include_str!("../../sql/finish_erasure.sql"),
];

/// Tables and functions in one, for `#[sqlx::test(migrator = …)]`.
pub static MIGRATIONS: LazyLock<Migrator> = LazyLock::new(|| {
    let functions = AssertSqlSafe(replace_functions()).into_sql_str();
    let functions = Migration::new(i64::MAX, "functions".into(), MigrationType::Simple, functions, false);
    let mut migrator = migrator(TABLES.iter().cloned().chain([functions]));
    migrator.create_schema(SCHEMA);
    migrator
});

#[derive(Debug, Error)]
pub enum SchemaError {
    #[error("the schema is stale: {0} of {1} migrations are applied; run `api migrate` first")]
    Stale(usize, usize),
    #[error("the schema is stale: the SQL functions of this build are not applied; run `api migrate` first")]
    StaleFunctions,
    #[error("migration {0} was edited after it was applied here, or was interrupted")]
    Altered(i64),
    #[error(transparent)]
    Migrate(#[from] MigrateError),
}

impl From<sqlx::Error> for SchemaError {
    fn from(error: sqlx::Error) -> Self {
        Self::Migrate(error.into())
    }
}

/// The advisory lock that `migrate` holds; any number that nobody else takes.
const LOCK: i64 = 0x6d65_7373_656e_6765;

/// Applies the missing migrations, then the functions if another set is in place. Concurrent runs wait for each other: by a lock of
/// ours, because sqlx's belongs to a session, and a pooler would leave it behind.
pub async fn migrate([holder, worker]: &mut [PgConnection; 2], route: Route) -> Result<(), MigrateError> {
    if route == Route::Direct {
        session::begin_without_limits(worker).await?;
    }
    let lock = session::lock(holder, LOCK).await?;
    // `IF NOT EXISTS` would need the right to create schemas even where an administrator has created this one.
    let exists: bool = sqlx::query_scalar("SELECT to_regnamespace($1) IS NOT NULL")
        .bind(SCHEMA)
        .fetch_one(&mut *worker)
        .await?;
    if !exists {
        sqlx::query("CREATE SCHEMA messenger").execute(&mut *worker).await?;
    }
    migrator(TABLES.iter().cloned()).run_direct(None, worker, false).await?;
    let newest: Option<Vec<u8>> =
        sqlx::query_scalar("SELECT checksum FROM messenger.function_sets ORDER BY applied_at DESC LIMIT 1")
            .fetch_optional(&mut *worker)
            .await?;
    if newest.is_none_or(|newest| newest[..] != functions_checksum()[..]) {
        let mut transaction = worker.begin().await?;
        sqlx::raw_sql(AssertSqlSafe(replace_functions())).execute(&mut *transaction).await?;
        transaction.commit().await?;
        tracing::info!("sql functions replaced");
    }
    lock.rollback().await?;
    Ok(())
}

/// Succeeds if every migration of this build and its set of functions have been applied. A newer version may have applied more.
pub async fn require_current(connection: &mut PgConnection) -> Result<(), SchemaError> {
    let needed = TABLES.iter().count();
    let made = sqlx::query_scalar!(r#"SELECT to_regclass($1) IS NOT NULL AS "made!""#, MIGRATIONS_TABLE)
        .fetch_one(&mut *connection)
        .await?;
    if !made {
        return Err(SchemaError::Stale(0, needed));
    }
    if let Some(version) = connection.dirty_version(MIGRATIONS_TABLE).await? {
        return Err(SchemaError::Altered(version));
    }
    let applied = connection.list_applied_migrations(MIGRATIONS_TABLE).await?;
    let mut found = 0;
    for migration in TABLES.iter() {
        match applied.iter().find(|applied| applied.version == migration.version) {
            Some(applied) if applied.checksum == migration.checksum => found += 1,
            Some(_) => return Err(SchemaError::Altered(migration.version)),
            None => {}
        }
    }
    if found < needed {
        return Err(SchemaError::Stale(found, needed));
    }
    let functions_applied = sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT FROM messenger.function_sets WHERE checksum = $1) AS "applied!""#,
        &functions_checksum()[..],
    )
    .fetch_one(connection)
    .await?;
    if functions_applied { Ok(()) } else { Err(SchemaError::StaleFunctions) }
}

fn migrator(migrations: impl Iterator<Item = Migration>) -> Migrator {
    let mut migrator = Migrator::with_migrations(migrations.collect());
    migrator.dangerous_set_table_name(MIGRATIONS_TABLE);
    migrator.set_locking(false);
    migrator
}

fn replace_functions() -> String {
    let functions = FUNCTIONS.concat();
    let checksum = functions_checksum();
    format!(
        r"{functions}
        INSERT INTO messenger.function_sets (checksum, applied_at) VALUES ('\x{checksum:x}', clock_timestamp())
        ON CONFLICT (checksum) DO UPDATE SET applied_at = excluded.applied_at"
    )
}

fn functions_checksum() -> sha2::digest::Output<Sha256> {
    Sha256::digest(FUNCTIONS.concat())
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    #[test]
    fn every_file_of_functions_is_applied() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("sql");
        let files: Vec<_> = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
        for file in &files {
            let text = fs::read_to_string(file).unwrap();
            let name = file.file_stem().unwrap().to_str().unwrap();
            let [function, view] = [("FUNCTION", "("), ("VIEW", " ")].map(|(kind, next)| {
                text.contains(&format!("CREATE OR REPLACE {kind} messenger.{name}{next}"))
            });
            assert!(function || view, "{name}");
            assert!(FUNCTIONS.contains(&text.as_str()), "{name}.sql is not in FUNCTIONS");
        }
        assert_eq!(files.len(), FUNCTIONS.len());
    }
}
