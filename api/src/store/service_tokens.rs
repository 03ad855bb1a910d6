//! Tokens of other back ends, by the hash of the token.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::identities::Hash;
use crate::domain::service_token::{Scope, ServiceName};

#[derive(Debug, Clone)]
pub struct Service {
    pub id: i64,
    pub name: String,
    pub scopes: Vec<Scope>,
}

#[derive(Debug)]
pub struct ListedService {
    pub name: String,
    pub scopes: Vec<String>,
    pub created_at: DateTime<Utc>,
    pub last_used_at: Option<DateTime<Utc>>,
}

/// `false`: the name is taken.
pub async fn create(
    connection: &mut PgConnection,
    name: &ServiceName,
    token: &Hash,
    scopes: &[Scope],
) -> sqlx::Result<bool> {
    let scopes: Vec<String> = scopes.iter().map(|scope| scope.as_str().to_owned()).collect();
    let done = sqlx::query!(
        "INSERT INTO messenger.service_tokens (name, token_hash, scopes) VALUES ($1, $2, $3)
         ON CONFLICT ON CONSTRAINT service_tokens_name DO NOTHING",
        name.as_str(),
        token,
        &scopes,
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected() == 1)
}

pub async fn list(connection: &mut PgConnection) -> sqlx::Result<Vec<ListedService>> {
    sqlx::query_as!(
        ListedService,
        "SELECT name, scopes, created_at, last_used_at FROM messenger.service_tokens ORDER BY name"
    )
    .fetch_all(connection)
    .await
}

/// `false`: there is none of this name.
pub async fn revoke(connection: &mut PgConnection, name: &str) -> sqlx::Result<bool> {
    let done = sqlx::query!("DELETE FROM messenger.service_tokens WHERE name = $1", name);
    Ok(done.execute(connection).await?.rows_affected() == 1)
}

/// The service of a token, which counts as used now.
pub async fn find(connection: &mut PgConnection, token: &Hash) -> sqlx::Result<Option<Service>> {
    let found = sqlx::query!(
        "WITH used AS (
             UPDATE messenger.service_tokens SET last_used_at = now()
             WHERE token_hash = $1 AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute')
         )
         SELECT id, name, scopes FROM messenger.service_tokens WHERE token_hash = $1",
        token,
    )
    .fetch_optional(connection)
    .await?;
    Ok(found.map(|row| Service {
        id: row.id,
        name: row.name,
        scopes: row.scopes.iter().filter_map(|scope| Scope::stored(scope)).collect(),
    }))
}
