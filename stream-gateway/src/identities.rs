//! The users behind the subjects of the external issuer: looked up at `api`, many in one request, and cached.
//!
//! Fifty thousand reconnects make a hundred requests. A stream whose user is not found in time is rejected and retries later.

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

/// Cached subjects, about 200 bytes each.
const REMEMBERED: u64 = 100_000;
/// Bounded because a deleted user who returns gets another id.
const REMEMBERED_FOR: Duration = Duration::from_mins(5);
/// Lookups that wait for `api`; more are rejected.
const QUEUE: usize = 16_384;
/// Limit of a stream's wait for its lookup.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

pub struct Identities {
    known: Cache<String, UserId>,
    lookups: mpsc::Sender<PendingLookup>,
}

struct PendingLookup {
    identity: Identity,
    answer: oneshot::Sender<UserId>,
}

/// The task that looks subjects up.
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
    /// From the cache.
    pub fn known(&self, claims: &ExternalClaims) -> Option<UserId> {
        self.known.get(&claims.sub)
    }

    /// `None`: the lookup failed.
    pub async fn user_of(&self, claims: &ExternalClaims) -> Option<UserId> {
        let (answer, user) = oneshot::channel();
        self.lookups.try_send(PendingLookup { identity: claims.into(), answer }).ok()?;
        timeout(LOOKUP_TIMEOUT, user).await.ok()?.ok()
    }
}

impl Worker {
    /// Runs until `stop`. The streams of a lookup in progress are then rejected.
    pub async fn run(self, stop: CancellationToken) {
        stop.run_until_cancelled(self.look_up()).await;
    }

    async fn look_up(mut self) {
        let mut batch = Vec::new();
        while self.lookups.recv_many(&mut batch, MAX_PAIRS).await > 0 {
            // Some streams no longer wait.
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
                        let _ = answer.send(user); // The stream may have closed.
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

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use protocol::jose::Person;

    use super::*;
    use crate::api_client::tests::listen;

    #[tokio::test]
    async fn a_lookup_in_progress_does_not_delay_the_stop() {
        let (listener, api) = listen().await;
        let stop = CancellationToken::new();
        let (identities, worker) = identities(api);
        let mut running = Box::pin(worker.run(stop.clone()));
        let claims = ExternalClaims { sub: "jane".into(), exp: i64::MAX, person: Person::default() };
        let mut lookup = Box::pin(identities.user_of(&claims));
        let _unanswered = tokio::select! {
            () = &mut running => panic!("it ends before its stop"),
            _ = &mut lookup => panic!("nobody answers"),
            socket = listener.accept() => socket,
        };
        stop.cancel();
        assert_eq!(running.now_or_never(), Some(()));
        assert_eq!(lookup.now_or_never(), Some(None), "its stream is rejected");
    }
}
