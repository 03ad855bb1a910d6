//! The folders of the runner: `.dev` in the workspace, or a link to a place that the account of the servers can enter.

use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::unistd::geteuid;

use crate::terminal;

pub(crate) struct Folders {
    pub(crate) root: PathBuf,
    /// `.dev`, with symbolic links resolved.
    home: PathBuf,
}

impl Folders {
    pub(crate) fn open() -> Result<Self> {
        // Set by cargo at run time too, and right even when a clone was moved with its target folder.
        let crate_dir = std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = crate_dir.parent().context("the dev crate lies inside the workspace")?.to_owned();
        let dev = root.join(".dev");
        match fs::read_link(&dev) {
            // The target may have been deleted with other temporary files.
            Ok(target) => fs::create_dir_all(target)?,
            Err(_) if !dev.exists() && geteuid().is_root() && !open_to_others(&root) => {
                move_out(&root, &dev)?;
            }
            Err(_) => fs::create_dir_all(&dev).with_context(|| format!("cannot create {}", dev.display()))?,
        }
        let home = dev.canonicalize()?;
        if home.metadata()?.uid() != geteuid().as_raw() && !geteuid().is_root() {
            bail!("{} belongs to another user: run this as that user, or remove it", dev.display());
        }
        Ok(Self { root, home })
    }

    pub(crate) fn up(&self) -> PathBuf {
        self.home.join("up")
    }

    pub(crate) fn shared(&self) -> PathBuf {
        self.home.join("test")
    }

    pub(crate) fn tools(&self) -> PathBuf {
        self.home.join("tools")
    }

    /// A folder for this run only. Removes what earlier runs left behind.
    pub(crate) fn scratch(&self) -> Result<Scratch> {
        let runs = self.home.join("runs");
        fs::create_dir_all(&runs)?;
        let own = std::process::id().to_string();
        for entry in fs::read_dir(&runs)? {
            let entry = entry?;
            if entry.file_name() == *own || !Path::new("/proc").join(entry.file_name()).exists() {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let dir = runs.join(own);
        fs::create_dir_all(&dir)?;
        Ok(Scratch(dir))
    }
}

pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn open_to_others(dir: &Path) -> bool {
    dir.ancestors().all(|dir| dir.metadata().is_ok_and(|meta| meta.permissions().mode() & 0o001 != 0))
}

/// Postgres refuses to run as root, and its account cannot enter a private home: `.dev` becomes a link to a place that it can
/// enter.
fn move_out(root: &Path, dev: &Path) -> Result<()> {
    let mut hasher = DefaultHasher::new();
    root.hash(&mut hasher);
    let target = PathBuf::from(format!("/var/tmp/messenger-dev-{:016x}", hasher.finish()));
    if fs::create_dir(&target).is_err() {
        let meta =
            fs::symlink_metadata(&target).with_context(|| format!("cannot create {}", target.display()))?;
        if !meta.is_dir() || meta.uid() != 0 {
            bail!("{} is in the way: remove it", target.display());
        }
    }
    symlink(&target, dev)?;
    terminal::step(
        "Keeping",
        format_args!("data in {}: servers cannot enter {}", target.display(), root.display()),
    );
    Ok(())
}

/// Whether the process `pid` lives in `dir`, as both database servers do in their data folder.
pub(crate) fn works_in(pid: u32, dir: &Path) -> bool {
    let cwd = fs::read_link(format!("/proc/{pid}/cwd"));
    cwd.is_ok_and(|cwd| dir.canonicalize().is_ok_and(|dir| dir.as_os_str() == OsStr::new(&cwd)))
}
