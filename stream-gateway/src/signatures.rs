//! Verifies the signatures of tokens, many together when many requests come together.
//!
//! In a storm of reconnects the signature is the largest part of what a stream costs, and no cache helps: each token is new to a
//! gateway that takes over another one's streams. Sixteen signatures verified together take a quarter of the time. Nobody waits for
//! others: a batch is what came before the worker threads had read the requests that were there already.

use std::{
    mem,
    sync::{Arc, Mutex, PoisonError},
};

use ed25519_zebra::batch::{Item, Verifier};
use tokio::{sync::oneshot, task::yield_now};

/// More save little, and a worker thread does nothing else meanwhile: half a millisecond.
const BATCH: usize = 32;

type Waiting = (Item, oneshot::Sender<bool>);

#[derive(Clone, Default)]
pub struct Signatures(Arc<Mutex<Vec<Waiting>>>);

/// The task that verifies died.
#[derive(Debug)]
pub struct NotVerified;

impl Signatures {
    #[expect(clippy::disallowed_methods, reason = "one batch, whose end is noticed by those who wait for it")]
    pub async fn verify(&self, item: Item) -> Result<bool, NotVerified> {
        let (sender, verified) = oneshot::channel();
        let (full, first) = {
            let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.push((item, sender));
            let full = (waiting.len() >= BATCH).then(|| mem::take(&mut *waiting));
            (full, waiting.len() == 1)
        };
        if let Some(batch) = full {
            verify_batch(batch);
        } else if first {
            // A task of its own, which continues if this request is cancelled.
            let signatures = self.clone();
            tokio::spawn(async move {
                // The tasks that are ready now run first.
                yield_now().await;
                verify_batch(signatures.take());
            });
        }
        verified.await.map_err(|_| NotVerified)
    }

    fn take(&self) -> Vec<Waiting> {
        mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn verify_batch(batch: Vec<Waiting>) {
    let mut together = Verifier::new();
    if batch.len() > 1 {
        batch.iter().for_each(|(item, _)| together.queue(item.clone()));
    }
    let all = batch.len() > 1 && together.verify(rand::rng()).is_ok();
    for (item, sender) in batch {
        // If not all are genuine, each is verified alone. Then a batch costs a quarter more than without any.
        let _ = sender.send(all || item.verify_single().is_ok());
    }
}

#[cfg(test)]
mod tests {
    use ed25519_zebra::{SigningKey, VerificationKeyBytes};
    use futures_util::future::join_all;

    use super::*;

    fn item(key: u8, text: &str, signed: &str) -> Item {
        let key = SigningKey::from([key; 32]);
        Item::from((VerificationKeyBytes::from(&key), key.sign(signed.as_bytes()), text))
    }

    async fn verify(items: impl IntoIterator<Item = Item>) -> Vec<bool> {
        let signatures = Signatures::default();
        let verified = join_all(items.into_iter().map(|item| signatures.verify(item))).await;
        assert!(signatures.take().is_empty());
        verified.into_iter().map(Result::unwrap).collect()
    }

    #[tokio::test]
    async fn each_signature_of_a_batch_is_judged() {
        for count in [1, 2, BATCH - 1, BATCH, 3 * BATCH + 1] {
            assert!(
                verify((0..count).map(|n| item(n as u8 % 3, "x", "x"))).await.iter().all(|genuine| *genuine)
            );
            let forged = count / 2;
            let items = (0..count).map(|n| item(n as u8 % 3, "x", if n == forged { "y" } else { "x" }));
            let verified = verify(items).await;
            assert!(
                verified.iter().enumerate().all(|(n, genuine)| *genuine == (n != forged)),
                "{verified:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_cancelled_request_does_not_hold_up_the_others() {
        let signatures = Signatures::default();
        let mut first = Box::pin(signatures.verify(item(1, "x", "x")));
        assert!(futures_util::poll!(first.as_mut()).is_pending());
        let second = signatures.verify(item(1, "y", "y"));
        drop(first);
        assert!(second.await.unwrap());
    }
}
