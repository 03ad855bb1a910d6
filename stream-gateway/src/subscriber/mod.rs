//! Redis: listens to the channels of the users who have a stream here.
//!
//! One supervised connection of its own, rebuilt for ever with capped, jittered back-off. Which channels are wanted is
//! shared state, changed by the hub at any time; which are confirmed is known only here, and only after Redis has said so.
//! Every queue is bounded: a message that finds the queue full is dropped and reported as a doubt, which a reconcile heals.
//! A beat through Redis and back, published over a connection made anew, finds a server that is silently dead, demoted, or no
//! longer where the address points.

mod listener;
mod wishes;

use std::{sync::Arc, time::Duration};

use rand::RngExt;
use shared::{
    channels::Channels,
    ids::{SessionId, UserId},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

pub use self::wishes::Wishes;
use crate::{frame::Event, metrics::Metrics};

/// Messages from Redis that the engine has not taken yet.
pub const QUEUE: usize = 16_384;
const BACKOFF: std::ops::Range<f64> = 0.05..2.0;

/// What the engine hears from Redis, and about it.
#[derive(Debug)]
pub enum News {
    Event(UserId, Event),
    /// A session of this user has ended.
    Revoked(UserId, SessionId),
    /// Something was said about this user that cannot be read.
    Doubted(UserId),
    /// From here on, what is published for these users arrives.
    Confirmed(Vec<UserId>),
    /// The connection is gone: nothing is confirmed any more.
    Lost,
    /// Whether Redis is trusted to bring what is published.
    Trusted(bool),
    /// Something may have been missed.
    Missed,
}

pub struct Subscriber {
    pub redis: redis::Client,
    pub channels: Channels,
    pub wishes: Wishes,
    pub news: mpsc::Sender<News>,
    pub metrics: Arc<Metrics>,
}

impl Subscriber {
    /// Listens until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = self.supervise() => {}
            () = stop.cancelled() => {}
        }
    }

    async fn supervise(&self) {
        let mut failures = 0;
        loop {
            let began = Instant::now();
            let error = match self.listen().await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            self.wishes.start_over(false);
            self.metrics.redis_up.set(0);
            self.metrics.subscriptions.set(0);
            self.trust(false).await;
            if self.news.send(News::Lost).await.is_err() {
                return;
            }
            failures = if began.elapsed() > Duration::from_secs(10) { 0 } else { failures + 1 };
            let longest = (BACKOFF.start * f64::from(1 << failures.min(10))).min(BACKOFF.end);
            let wait = Duration::from_secs_f64(rand::rng().random_range(longest / 2.0..longest));
            tracing::warn!(
                error = format!("{error:#}"),
                failures,
                ?wait,
                "Redis is away; events arrive by reconcile, a little later"
            );
            sleep(wait).await;
        }
    }

    async fn trust(&self, trusted: bool) {
        let _ = self.news.send(News::Trusted(trusted)).await;
    }
}
