//! Sessions that are known here to have ended. A token outlives its session by up to 14 days, and whoever still has one can
//! come again and again: they shall be turned away before anything is counted or read in their user's name.
//!
//! A session that has ended never lives again, so what is remembered stays true. Best effort: what was forgotten is found out
//! anew, as at the first time.

use std::time::Duration;

use moka::sync::Cache;

use protocol::ids::{SessionId, UserId};

/// At some 100 bytes each, and only of those whose tokens were used after the end.
const REMEMBERED: u64 = 100_000;
/// The longest life of a token.
const REMEMBERED_FOR: Duration = Duration::from_secs(14 * 24 * 60 * 60);

/// Shared by its clones.
#[derive(Clone)]
pub struct EndedSessions(Cache<(UserId, SessionId), ()>);

impl Default for EndedSessions {
    fn default() -> Self {
        Self(Cache::builder().max_capacity(REMEMBERED).time_to_live(REMEMBERED_FOR).build())
    }
}

impl EndedSessions {
    /// With its user: a number alone could be given again, to somebody else, by a database that was restored to an earlier
    /// point.
    pub fn note(&self, user: UserId, session: SessionId) {
        self.0.insert((user, session), ());
    }

    pub fn contains(&self, user: UserId, session: SessionId) -> bool {
        self.0.contains_key(&(user, session))
    }
}
