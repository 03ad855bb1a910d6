//! Sessions that are known to have ended. A token outlives its session by up to 14 days; a request with such a token is rejected
//! before it counts against the user's limits or reads the database.
//!
//! An ended session never becomes valid again, so an entry stays true. An evicted entry is found again by the session check.

use std::time::Duration;

use moka::sync::Cache;

use protocol::ids::{SessionId, UserId};

/// About 100 bytes each.
const CAPACITY: u64 = 100_000;
const TTL: Duration = Duration::from_secs(14 * 24 * 60 * 60);

/// Clones share the entries.
#[derive(Clone)]
pub struct EndedSessions(Cache<(UserId, SessionId), ()>);

impl Default for EndedSessions {
    fn default() -> Self {
        Self(Cache::builder().max_capacity(CAPACITY).time_to_live(TTL).build())
    }
}

impl EndedSessions {
    /// With the user, because a database that was restored to an earlier point may assign a session id again.
    pub fn note(&self, user: UserId, session: SessionId) {
        self.0.insert((user, session), ());
    }

    pub fn contains(&self, user: UserId, session: SessionId) -> bool {
        self.0.contains_key(&(user, session))
    }
}
