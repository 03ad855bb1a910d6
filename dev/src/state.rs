//! The state of a running `cargo dev up` for other commands: that it runs (a lock, which the kernel gives back whatever
//! happens) and what runs under it (a text file, true only while the lock is held).

use std::fs::{self, File, TryLockError};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RunState {
    pub(crate) runner: u32,
    /// Empty until everything is ready.
    pub(crate) address: String,
    pub(crate) processes: Vec<ProcessEntry>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ProcessEntry {
    pub(crate) name: String,
    pub(crate) pid: i32,
    pub(crate) address: SocketAddr,
}

impl RunState {
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>> {
        if Lock::is_free(dir)? {
            return Ok(None);
        }
        let text =
            fs::read_to_string(dir.join("state")).context("cannot read the state of `cargo dev up`")?;
        Self::parse(&text).context("`.dev/up/state` cannot be read").map(Some)
    }

    fn to_text(&self) -> String {
        let mut text = format!("{} {}\n", self.runner, self.address);
        for ProcessEntry { name, pid, address } in &self.processes {
            text += &format!("{name} {pid} {address}\n");
        }
        text
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let (runner, address) = lines.next()?.split_once(' ')?;
        let process = |line: &str| {
            let mut words = line.split(' ');
            let name = words.next()?.to_owned();
            Some(ProcessEntry {
                name,
                pid: words.next()?.parse().ok()?,
                address: words.next()?.parse().ok()?,
            })
        };
        let processes = lines.map(process).collect::<Option<_>>()?;
        Some(Self { runner: runner.parse().ok()?, address: address.to_owned(), processes })
    }
}

pub(crate) struct Lock {
    dir: PathBuf,
    _file: File,
}

impl Lock {
    pub(crate) fn take(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let file = File::create(dir.join("lock"))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { dir: dir.to_owned(), _file: file }),
            Err(TryLockError::WouldBlock) => {
                let state =
                    fs::read_to_string(dir.join("state")).ok().and_then(|text| RunState::parse(&text));
                let Some(state) = state else { bail!("another `cargo dev up` is starting") };
                bail!(
                    "`cargo dev up` is already running (process {}, {}); stop it with `cargo dev down`",
                    state.runner,
                    if state.address.is_empty() { "starting" } else { &state.address }
                );
            }
            Err(TryLockError::Error(error)) => Err(error.into()),
        }
    }

    pub(crate) fn is_free(dir: &Path) -> Result<bool> {
        match File::open(dir.join("lock")) {
            Ok(file) => Ok(file.try_lock().is_ok()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) fn write(&self, state: &RunState) -> Result<()> {
        let begun = self.dir.join("state.unfinished");
        fs::write(&begun, state.to_text())?;
        Ok(fs::rename(begun, self.dir.join("state"))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> RunState {
        let process =
            |name: &str, pid| ProcessEntry { name: name.into(), pid, address: ([127, 0, 0, 1], 80).into() };
        RunState {
            runner: 7,
            address: "http://localhost:3000".into(),
            processes: vec![process("api", 8), process("gateway-1", 9)],
        }
    }

    #[test]
    fn a_state_is_read_as_it_was_written() {
        let starting = RunState { address: String::new(), processes: vec![], ..state() };
        for state in [state(), starting] {
            assert_eq!(RunState::parse(&state.to_text()), Some(state));
        }
        assert_eq!(RunState::parse(""), None);
        assert_eq!(RunState::parse("7 here\napi eight 127.0.0.1:80\n"), None);
    }

    #[test]
    fn only_one_runs_and_its_state_is_gone_with_it() {
        let dir = std::env::temp_dir().join(format!("state-{}", std::process::id()));
        let lock = Lock::take(&dir).unwrap();
        lock.write(&state()).unwrap();
        let second = Lock::take(&dir).err().map(|error| error.to_string());
        let seen = RunState::read(&dir).unwrap();
        drop(lock);
        let after = RunState::read(&dir).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        assert!(second.unwrap().contains("process 7, http://localhost:3000"));
        assert_eq!(seen, Some(state()));
        assert_eq!(after, None);
    }
}
