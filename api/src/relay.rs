//! The relay: appends what other back ends have staged to the feeds, in its order, and publishes it. One replica at a time does; the others
//! look now and then whether its lease has expired. Why, and how: `docs/decisions/0035-published-events-are-staged.md`.
//!
//! A turn is one transaction, so a replica that dies in it leaves everything as it was.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    publisher::Publisher,
    store::{
        Database, StoreError,
        relay::{self, Looked, RelayOutcome, TurnBounds},
    },
};

/// A turn takes some hundred ms at most, and what it publishes fits into the queue for Redis.
const BOUNDS: TurnBounds = TurnBounds { events: 2_000, receivers: 4_000, bytes: 16 << 20 };
/// Well within the lease of 1.2 s (SQL `relay_events()`).
const RENEW_AFTER: Duration = Duration::from_millis(500);
/// Nothing is missed without it, as far as we know.
const LOOK_AT_ALL_EVERY: Duration = Duration::from_mins(1);
/// Between two looks that find nothing.
const IDLE: Duration = Duration::from_millis(25);
/// After a look that found all there was: what comes meanwhile shares the next turn.
const BUSY: Duration = Duration::from_millis(5);
/// Of a replica that does not relay: with the lease, less than the two seconds in which it must take over.
const PASSIVE: Duration = Duration::from_millis(600);
const FAILED: Duration = Duration::from_millis(250);

pub struct Relay {
    database: Database,
    publisher: Publisher,
    /// `EXTERNAL_ISSUER`.
    issuer: Option<String>,
    metrics: Metrics,
    /// Names this process in the lease.
    me: i64,
    is_active: bool,
    /// `None`: the next turn looks at everything. Forgotten with every failure: behind it may be another server, whose transactions have
    /// other numbers.
    looked: Option<Looked>,
    looked_at_all: Instant,
    renewed: Option<Instant>,
}

/// What a turn did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Another replica relays.
    Passive,
    Idle,
    /// `events`: counted per receiver.
    Relayed {
        events: usize,
        more: bool,
    },
}

impl Relay {
    pub fn new(database: Database, publisher: Publisher, issuer: Option<String>, metrics: Metrics) -> Self {
        Self {
            database,
            publisher,
            issuer,
            metrics,
            me: rand::random(),
            is_active: false,
            looked: None,
            looked_at_all: Instant::now(),
            renewed: None,
        }
    }

    pub async fn turn(&mut self) -> Result<Turn, StoreError> {
        let renew = self.renewed.is_none_or(|renewed| renewed.elapsed() >= RENEW_AFTER);
        if self.looked_at_all.elapsed() >= LOOK_AT_ALL_EVERY {
            self.looked = None;
        }
        if self.looked.is_none() {
            self.looked_at_all = Instant::now();
        }
        let (me, issuer, looked) = (self.me, self.issuer.as_deref(), self.looked.take());
        let began = Instant::now();
        let turn = async |connection: &mut _| {
            relay::relay_events(connection, me, renew, issuer, looked.as_ref(), BOUNDS).await
        };
        let outcome = self.database.run(turn).await.inspect_err(|_| {
            (self.renewed, self.is_active) = (None, false);
            self.metrics.relay_failures.inc();
            self.metrics.relay_active.set(0);
        })?;
        let is_active = !matches!(outcome, RelayOutcome::Passive);
        if self.is_active != is_active {
            self.is_active = is_active;
            self.metrics.relay_active.set(i64::from(is_active));
            if is_active {
                tracing::info!("relay started: this replica appends what other back ends publish");
            } else {
                tracing::info!("relay stopped: another replica appends what other back ends publish");
            }
        }
        match outcome {
            RelayOutcome::Passive => {
                self.renewed = None;
                self.metrics.relay_behind.set(0);
                Ok(Turn::Passive)
            }
            RelayOutcome::Looked { looked, taken, more, events } => {
                if renew {
                    self.renewed = Some(began);
                }
                self.looked = Some(looked);
                self.metrics.relay_behind.set(i64::from(more));
                self.metrics.relayed_events.inc_by(events.len() as u64);
                let count = events.len();
                self.publisher.publish(events);
                Ok(if taken == 0 { Turn::Idle } else { Turn::Relayed { events: count, more } })
            }
        }
    }

    /// So that another replica continues at once.
    pub async fn resign(&mut self) -> Result<(), StoreError> {
        self.metrics.relay_active.set(0);
        let me = self.me;
        self.database.run(async |connection| relay::resign(connection, me).await).await
    }
}

/// `staged`: this process has staged something itself.
pub async fn run(mut relay: Relay, staged: Arc<Notify>, stop: CancellationToken) {
    let mut failed = false;
    while !stop.is_cancelled() {
        let turn = relay.turn().await;
        if let Err(error) = &turn
            && !failed
        {
            tracing::warn!(%error, "relaying published events failed; it is retried");
        }
        failed = turn.is_err();
        match turn {
            Ok(Turn::Relayed { more: true, .. }) => {}
            Ok(Turn::Relayed { more: false, .. }) => pause(BUSY, &stop).await,
            Ok(Turn::Idle) => {
                tokio::select! {
                    () = staged.notified() => {}
                    () = pause(IDLE, &stop) => {}
                }
            }
            Ok(Turn::Passive) => pause(PASSIVE.mul_f64(rand::random_range(0.5..1.0)), &stop).await,
            Err(_) => pause(FAILED, &stop).await,
        }
    }
    if relay.is_active
        && let Err(error) = relay.resign().await
    {
        tracing::debug!(%error, "the lease of the relay was not given back");
    }
}

async fn pause(pause: Duration, stop: &CancellationToken) {
    stop.run_until_cancelled(sleep(pause)).await;
}
