//! One-off work on the database, each a command of the binary; and the wait for Postgres at start-up.

use std::{fmt::Write, time::Duration};

use anyhow::Context as _;
use chrono::{DateTime, SecondsFormat, Utc};
use prometheus_client::metrics::counter::Counter;
use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use tokio::time::timeout;

use crate::{
    config::{Keep, NewService, ServiceTokenCommand},
    domain::service_token::{Scope, ServiceName, ServiceToken},
    pruner::{self, Pruned},
    store::{
        self, Database, feed, schema, service_tokens,
        session::{self, Route, UnusableDatabase},
    },
};

const START_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

pub async fn migrate(postgres: PgConnectOptions) -> anyhow::Result<()> {
    let (mut connections, route) = connect(&postgres).await?;
    schema::migrate(&mut connections, route).await.context("cannot migrate")?;
    tracing::info!("schema is current");
    close(connections).await;
    Ok(())
}

/// Gives every user's feed a new epoch: for a database that was restored to an earlier point, before it is served again.
pub async fn new_epoch(postgres: PgConnectOptions) -> anyhow::Result<()> {
    let (mut connections, _) = connect(&postgres).await?;
    schema::require_current(&mut connections[0]).await?;
    let feeds = feed::redraw_epochs(&mut connections[0]).await.context("cannot draw new epochs")?;
    tracing::info!(feeds, "every feed has a new epoch; clients resync");
    close(connections).await;
    Ok(())
}

/// An error if the database cannot be used; `false` if it does not answer.
pub async fn check_database(postgres: &PgConnectOptions) -> anyhow::Result<bool> {
    match timeout(CONNECT_TIMEOUT, session::connect(postgres)).await {
        Ok(Ok((connections, _))) => {
            close(connections).await;
            Ok(true)
        }
        Ok(Err(UnusableDatabase::Store(error))) if store::is_transient(&error) => Ok(false),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Ok(false),
    }
}

/// Deletes all expired rows in the same small steps as a server, without its pauses.
pub async fn prune(postgres: PgConnectOptions, keep: Keep) -> anyhow::Result<()> {
    let (mut connections, _) = connect(&postgres).await?;
    schema::require_current(&mut connections[0]).await?;
    close(connections).await;
    let database = Database::new(postgres, 1, Counter::default());
    let pruned = pruner::prune_all(&database, keep).await.context("cannot prune")?;
    let Pruned { events, bodies, sessions, keys, codes, texts, messages } = pruned;
    tracing::info!(events, bodies, sessions, keys, codes, texts, messages, "pruned expired rows");
    database.close().await;
    Ok(())
}

/// Returns what to print.
pub async fn service_tokens(
    postgres: PgConnectOptions,
    command: ServiceTokenCommand,
) -> anyhow::Result<String> {
    let (mut connections, _) = connect(&postgres).await?;
    let connection = &mut connections[0];
    schema::require_current(connection).await?;
    let mut said = String::new();
    match command {
        ServiceTokenCommand::Create(NewService { name, scopes }) => {
            let name: ServiceName = name.parse()?;
            let scopes: Vec<Scope> = scopes.iter().filter_map(|scope| Scope::stored(scope)).collect();
            let token = ServiceToken::random();
            let created = service_tokens::create(connection, &name, &token.hash(), &scopes).await?;
            anyhow::ensure!(created, "there is a service token {}; revoke it first", name.as_str());
            writeln!(said, "{}", token.secret())?;
        }
        ServiceTokenCommand::List => {
            let minute = |at: DateTime<Utc>| at.to_rfc3339_opts(SecondsFormat::Secs, true);
            for service in service_tokens::list(connection).await? {
                let used = service.last_used_at.map_or_else(|| "never".into(), minute);
                let (name, scopes) = (service.name, service.scopes.join(","));
                writeln!(said, "{name}\t{scopes}\tcreated {}\tused {used}", minute(service.created_at))?;
            }
        }
        ServiceTokenCommand::Revoke { name } => {
            let revoked = service_tokens::revoke(connection, &name).await?;
            anyhow::ensure!(revoked, "there is no service token {name}");
        }
    }
    close(connections).await;
    Ok(said)
}

/// Waits until Postgres answers, then checks that its schema is current. Returns how its connections can be used.
pub async fn wait_until_usable(postgres: &PgConnectOptions) -> anyhow::Result<Route> {
    let (mut connections, route) = connect(postgres).await?;
    schema::require_current(&mut connections[0]).await?;
    close(connections).await;
    Ok(route)
}

/// Retries for [`START_TIMEOUT`], because Postgres may start later than this process.
async fn connect(postgres: &PgConnectOptions) -> anyhow::Result<([PgConnection; 2], Route)> {
    let patient = async {
        loop {
            match timeout(CONNECT_TIMEOUT, session::connect(postgres)).await {
                Ok(Ok(connected)) => return Ok(connected),
                Ok(Err(UnusableDatabase::Store(error))) if store::is_transient(&error) => {
                    tracing::warn!(%error, "postgres is unreachable; retrying");
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => tracing::warn!("postgres does not answer; retrying"),
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    match timeout(START_TIMEOUT, patient).await {
        Ok(result) => result.context("cannot use Postgres"),
        Err(_) => anyhow::bail!(
            "Postgres was unreachable for {} seconds; check DATABASE_URL",
            START_TIMEOUT.as_secs()
        ),
    }
}

/// Closes in order; a connection that cannot be closed so is dropped.
async fn close(connections: [PgConnection; 2]) {
    for connection in connections {
        let _ = connection.close().await;
    }
}
