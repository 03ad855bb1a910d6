//! The last use of each session, within some minutes. Requests note it in memory; a task writes many notes in one statement,
//! for each session at most once in [`COARSE`]. REST requests and open streams, of which gateways report the sessions, count
//! as use.
//!
//! Best effort: the next use repeats a note that found no room or was lost with the process.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use protocol::feed::Login;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::store::{Database, StoreError, sessions};

/// A written time is moved only when it is older than this.
pub const COARSE: Duration = Duration::from_mins(10);
const PAUSE: Duration = Duration::from_secs(30);
/// A written session is not written again for this long.
const AFTER: Duration = Duration::from_mins(2);
const BATCH: usize = 1_000;
/// Sessions with a note. Further ones are not noted until some are forgotten.
const REMEMBERED: usize = 100_000;

/// Notes of use. Clones share them.
#[derive(Clone, Default)]
pub struct LastUsed {
    noted: Arc<Mutex<HashMap<Login, Note>>>,
}

struct Note {
    at: Instant,
    written: bool,
}

impl LastUsed {
    /// The session may have ended; that is checked when the note is written.
    pub fn note(&self, login: Login) {
        let mut noted = self.noted();
        if noted.len() < REMEMBERED {
            noted.entry(login).or_insert(Note { at: Instant::now(), written: false });
        }
    }

    /// Writes new notes and forgets old ones. How many times were moved.
    pub async fn write(&self, database: &Database) -> Result<u64, StoreError> {
        let unwritten: Vec<Login> = {
            let mut noted = self.noted();
            noted.retain(|_, note| !note.written || note.at.elapsed() < AFTER);
            noted.iter().filter(|(_, note)| !note.written).map(|(login, _)| *login).collect()
        };
        let mut moved = 0;
        for batch in unwritten.chunks(BATCH) {
            moved +=
                database.run(async |connection| sessions::touch(connection, batch, COARSE).await).await?;
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

pub async fn run(used: LastUsed, database: Database, stop: CancellationToken) {
    loop {
        let last = tokio::select! {
            () = tokio::time::sleep(PAUSE) => false,
            () = stop.cancelled() => true,
        };
        if let Err(error) = used.write(&database).await {
            tracing::warn!(%error, "last use of sessions could not be written; it is retried");
        }
        if last {
            return;
        }
    }
}
