//! When a session was last used, within some minutes, at no cost to requests: they leave a note here in memory, and a task
//! looks after many sessions at once, and writes for each at most once in [`COARSE`]. Reads and writes by REST count as use,
//! and so do open streams, which gateways ask about.
//!
//! Best effort: a note that finds no room or dies with the process is made again by the next use.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use protocol::feed::Login;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::store::{Database, StoreError, sessions};

/// What was written is moved only when it is older than this.
pub const COARSE: Duration = Duration::from_mins(10);
/// Between two rounds.
const PAUSE: Duration = Duration::from_secs(30);
/// A session that was looked after is not looked at again for this long.
const AFTER: Duration = Duration::from_mins(2);
/// Sessions of one statement.
const BATCH: usize = 1_000;
/// Sessions that are remembered. Further ones are not noted until some are forgotten.
const REMEMBERED: usize = 100_000;

/// Where uses are noted.
#[derive(Clone, Default)]
pub struct LastUsed {
    noted: Arc<Mutex<HashMap<Login, Note>>>,
}

struct Note {
    at: Instant,
    written: bool,
}

impl LastUsed {
    /// Whether the session lives is not known yet, and is looked at when it is written.
    pub fn note(&self, login: Login) {
        let mut noted = self.noted();
        if noted.len() < REMEMBERED {
            noted.entry(login).or_insert(Note { at: Instant::now(), written: false });
        }
    }

    /// One round: writes what was noted since the last one, and forgets what was noted long ago. How many sessions had not
    /// been known to be in use.
    pub async fn write(&self, database: &Database) -> Result<u64, StoreError> {
        let unwritten: Vec<Login> = {
            let mut noted = self.noted();
            noted.retain(|_, note| !note.written || note.at.elapsed() < AFTER);
            noted.iter().filter(|(_, note)| !note.written).map(|(login, _)| *login).collect()
        };
        let mut moved = 0;
        for batch in unwritten.chunks(BATCH) {
            moved += database.run(async |connection| sessions::used(connection, batch, COARSE).await).await?;
            let mut noted = self.noted();
            for login in batch {
                if let Some(note) = noted.get_mut(login) {
                    note.written = true;
                }
            }
        }
        Ok(moved)
    }

    fn noted(&self) -> MutexGuard<'_, HashMap<Login, Note>> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes from time to time, and once more when told to stop.
pub async fn run(used: LastUsed, database: Database, stop: CancellationToken) {
    loop {
        let last = tokio::select! {
            () = tokio::time::sleep(PAUSE) => false,
            () = stop.cancelled() => true,
        };
        if let Err(error) = used.write(&database).await {
            tracing::warn!(%error, "cannot note which sessions are in use now");
        }
        if last {
            return;
        }
    }
}
