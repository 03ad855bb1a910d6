//! The service tokens of requests: looked up in Postgres, and remembered for a moment, because a host sends many requests.

use std::{sync::Arc, time::Duration};

use moka::sync::Cache;
use tokio::time::Instant;

use crate::{
    domain::service_token::ServiceToken,
    store::{
        Database, StoreError,
        service_tokens::{self, Service},
    },
};

/// A token that is revoked is accepted for so long, at most.
const REMEMBERED_FOR: Duration = Duration::from_secs(1);
const REMEMBERED: u64 = 10_000;

pub(super) struct Services {
    database: Database,
    found: Cache<[u8; 32], Found>,
}

#[derive(Clone)]
struct Found {
    service: Arc<Service>,
    /// Before it was looked up: a revocation may have been committed since.
    at: Instant,
}

impl Services {
    pub(super) fn new(database: Database) -> Self {
        let found = Cache::builder().max_capacity(REMEMBERED).time_to_live(REMEMBERED_FOR).build();
        Self { database, found }
    }

    /// `None`: unknown, or revoked.
    pub(super) async fn find(&self, token: &ServiceToken) -> Result<Option<Arc<Service>>, StoreError> {
        let hash = token.hash();
        if let Some(found) = self.found.get(&hash).filter(|found| found.at.elapsed() < REMEMBERED_FOR) {
            return Ok(Some(found.service));
        }
        let at = Instant::now();
        let find = async |connection: &mut _| service_tokens::find(connection, &hash).await;
        let service = self.database.run(find).await?.map(Arc::new);
        if let Some(service) = &service {
            self.found.insert(hash, Found { service: service.clone(), at });
        }
        Ok(service)
    }
}
