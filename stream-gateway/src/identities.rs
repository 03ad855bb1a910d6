//! Which users the subjects of a external issuer are here: asked of `api`, many in one request, and remembered for a while.
//!
//! Fifty thousand of them who reconnect at once are a hundred requests. Who cannot be told in time is told to come back.

use std::time::Duration;

use moka::sync::Cache;
use protocol::{
    external::ExternalClaims,
    feed::{IDENTITY_PATH, Identity, IdentityAnswer, IdentityRequest, MAX_PAIRS},
    ids::UserId,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::api_client::ApiClient;

/// Subjects that are remembered, at some 200 bytes each.
const REMEMBERED: u64 = 100_000;
/// A user who was deleted and comes back is another one.
const REMEMBERED_FOR: Duration = Duration::from_mins(5);
/// Subjects that wait for `api`; more are told to come back.
const QUEUE: usize = 16_384;
/// How long a stream waits to learn whose it is.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

pub struct Identities {
    known: Cache<String, UserId>,
    lookups: mpsc::Sender<PendingLookup>,
}

struct PendingLookup {
    identity: Identity,
    answer: oneshot::Sender<UserId>,
}

/// The task that asks.
pub struct Worker {
    api: ApiClient,
    known: Cache<String, UserId>,
    lookups: mpsc::Receiver<PendingLookup>,
}

pub fn identities(api: ApiClient) -> (Identities, Worker) {
    let known = Cache::builder().max_capacity(REMEMBERED).time_to_live(REMEMBERED_FOR).build();
    let (sender, lookups) = mpsc::channel(QUEUE);
    (Identities { known: known.clone(), lookups: sender }, Worker { api, known, lookups })
}

impl Identities {
    /// Without asking.
    pub fn known(&self, claims: &ExternalClaims) -> Option<UserId> {
        self.known.get(&claims.sub)
    }

    /// `None`: it cannot be told now.
    pub async fn user_of(&self, claims: &ExternalClaims) -> Option<UserId> {
        let (answer, told) = oneshot::channel();
        self.lookups.try_send(PendingLookup { identity: claims.into(), answer }).ok()?;
        timeout(LOOKUP_TIMEOUT, told).await.ok()?.ok()
    }
}

impl Worker {
    pub async fn run(mut self, stop: CancellationToken) {
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                count = self.lookups.recv_many(&mut batch, MAX_PAIRS) => if count == 0 { return },
                () = stop.cancelled() => return,
            }
            // Nobody waits any more for some of these.
            batch.retain(|lookup| !lookup.answer.is_closed());
            if batch.is_empty() {
                continue;
            }
            let identities: Vec<_> = batch.iter().map(|lookup| lookup.identity.clone()).collect();
            let answer =
                self.api.post::<IdentityAnswer>(IDENTITY_PATH, &IdentityRequest { identities }).await;
            match answer.and_then(|answer| {
                anyhow::ensure!(
                    answer.users.len() == batch.len(),
                    "api answered other identities than requested"
                );
                Ok(answer.users)
            }) {
                Ok(users) => {
                    for (PendingLookup { identity, answer }, user) in batch.drain(..).zip(users) {
                        self.known.insert(identity.subject, user);
                        let _ = answer.send(user); // Or its stream has gone.
                    }
                }
                Err(error) => {
                    let streams = batch.len();
                    tracing::warn!(
                        error = format!("{error:#}"),
                        streams,
                        "looking up external identities failed; their streams are rejected and retry later"
                    );
                    batch.clear();
                }
            }
        }
    }
}
