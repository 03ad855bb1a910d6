//! Finding server programs on the machine; pure but for looking at the file system.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The first folder of `path` that holds all of `names` as executables.
pub(crate) fn dir_with(path: &OsStr, names: &[&str]) -> Option<PathBuf> {
    std::env::split_paths(path).find(|dir| dir.is_absolute() && holds(dir, names))
}

/// The first of `names`, in this order, that is an executable in a folder of `path`.
pub(crate) fn program(path: &OsStr, names: &[&str]) -> Option<PathBuf> {
    names.iter().find_map(|name| dir_with(path, &[name]).map(|dir| dir.join(name)))
}

/// The folders `<base>/<version>/bin` that hold all of `names`, newest version first: where Debian keeps Postgres.
pub(crate) fn versioned_dirs(base: &Path, names: &[&str]) -> Vec<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir(base)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .filter(|(_, dir)| holds(dir, names))
        .collect();
    found.sort_by(|a, b| b.cmp(a));
    found.into_iter().map(|(_, dir)| dir).collect()
}

pub(crate) fn holds(dir: &Path, names: &[&str]) -> bool {
    names.iter().all(|name| is_executable(&dir.join(name)))
}

fn is_executable(file: &Path) -> bool {
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Machine(PathBuf);

    impl Machine {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("find-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }

        fn file(&self, path: &str, mode: u32) -> PathBuf {
            let file = self.0.join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, "").unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            file
        }

        fn path(&self, dirs: &[&str]) -> std::ffi::OsString {
            std::env::join_paths(dirs.iter().map(|dir| self.0.join(dir))).unwrap()
        }
    }

    impl Drop for Machine {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn both_programs_must_be_in_the_same_folder() {
        let machine = Machine::new("same");
        machine.file("a/initdb", 0o755);
        machine.file("b/postgres", 0o755);
        let path = machine.path(&["a", "b", "missing"]);
        assert_eq!(dir_with(&path, &["initdb", "postgres"]), None);
        machine.file("b/initdb", 0o755);
        assert_eq!(dir_with(&path, &["initdb", "postgres"]), Some(machine.0.join("b")));
    }

    #[test]
    fn a_file_that_cannot_be_executed_is_not_a_program() {
        let machine = Machine::new("mode");
        machine.file("a/redis-server", 0o644);
        machine.file("b/valkey-server", 0o755);
        let path = machine.path(&["a", "b"]);
        assert_eq!(
            program(&path, &["redis-server", "valkey-server"]),
            Some(machine.0.join("b/valkey-server"))
        );
    }

    #[test]
    fn the_preferred_name_wins_over_the_earlier_folder() {
        let machine = Machine::new("order");
        machine.file("a/valkey-server", 0o755);
        let redis = machine.file("b/redis-server", 0o755);
        let path = machine.path(&["a", "b"]);
        assert_eq!(program(&path, &["redis-server", "valkey-server"]), Some(redis));
    }

    #[test]
    fn an_empty_path_entry_does_not_mean_the_current_folder() {
        assert_eq!(program(OsStr::new("::"), &["Cargo.toml"]), None);
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        let machine = Machine::new("versions");
        for version in ["9", "15", "17", "notes"] {
            machine.file(&format!("{version}/bin/initdb"), 0o755);
        }
        fs::create_dir_all(machine.0.join("18/bin")).unwrap();
        let expected: Vec<_> = ["17", "15", "9"].iter().map(|v| machine.0.join(v).join("bin")).collect();
        assert_eq!(versioned_dirs(&machine.0, &["initdb"]), expected);
    }
}
