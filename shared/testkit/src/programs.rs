//! Finds programs and servers: by the variables of `cargo dev test`, else on this machine.

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

pub const POSTGRES: [&str; 2] = ["initdb", "postgres"];
pub const REDIS: [&str; 2] = ["redis-server", "valkey-server"];

/// `None` if the variable is unset or empty.
pub fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

pub fn server(name: &str) -> String {
    let url = variable(name).unwrap_or_else(|| {
        panic!("{name} is not set: run the tests with `cargo dev test`, which starts the servers they need")
    });
    url.into_os_string().into_string().expect("a URL is UTF-8")
}

/// A program that only the variable names; `cargo dev test` finds or installs it.
pub fn program(name: &str, what: &str, how: &str) -> PathBuf {
    variable(name).unwrap_or_else(|| {
        panic!("{name} is not set: install {what} ({how}) and run the tests with `cargo dev test`")
    })
}

pub fn redis() -> PathBuf {
    let found = variable("DEV_REDIS_SERVER").or_else(|| on_path(&path(), &REDIS));
    found.unwrap_or_else(|| panic!("no Redis server: set DEV_REDIS_SERVER, or have one of {REDIS:?} on PATH"))
}

/// Only root's PATH has the folder of nginx on Debian.
pub fn nginx() -> PathBuf {
    let usual = Some(PathBuf::from("/usr/sbin/nginx")).filter(|path| is_executable(path));
    let found = variable("DEV_NGINX").or_else(|| on_path(&path(), &["nginx"])).or(usual);
    found.expect("no nginx: set DEV_NGINX, or install it (Debian: apt install nginx)")
}

/// The folder of one version's programs: the newest of Debian's, which are not on PATH, else the one on PATH.
pub fn postgres() -> PathBuf {
    let debian = || postgres_of_debian().into_iter().next();
    let found = variable("DEV_POSTGRES_BIN_DIR").or_else(debian).or_else(|| dir_with(&path(), &POSTGRES));
    found.expect("no Postgres server: set DEV_POSTGRES_BIN_DIR, or have initdb on PATH")
}

pub fn postgres_of_debian() -> Vec<PathBuf> {
    versioned_dirs(Path::new("/usr/lib/postgresql"), &POSTGRES)
}

/// `target/<profile>`, for tests and for other programs of the workspace.
pub fn build_folder() -> PathBuf {
    let own = std::env::current_exe().expect("a running program has a path");
    let folder = own.parent().expect("a program is in a folder");
    if folder.ends_with("deps") { folder.parent().expect("cargo's layout") } else { folder }.to_owned()
}

pub fn service(name: &str) -> PathBuf {
    let path = build_folder().join(name);
    assert!(path.exists(), "{} is missing: run `cargo build -p api -p stream-gateway`", path.display());
    path
}

fn path() -> std::ffi::OsString {
    std::env::var_os("PATH").unwrap_or_default()
}

pub fn dir_with(path: &OsStr, names: &[&str]) -> Option<PathBuf> {
    std::env::split_paths(path).find(|dir| dir.is_absolute() && holds(dir, names))
}

/// The first of `names`, in this order, that is an executable in a folder of `path`.
pub fn on_path(path: &OsStr, names: &[&str]) -> Option<PathBuf> {
    names.iter().find_map(|name| dir_with(path, &[name]).map(|dir| dir.join(name)))
}

/// The folders `<base>/<version>/bin` that hold all of `names`, newest version first.
fn versioned_dirs(base: &Path, names: &[&str]) -> Vec<PathBuf> {
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

pub fn holds(dir: &Path, names: &[&str]) -> bool {
    names.iter().all(|name| is_executable(&dir.join(name)))
}

fn is_executable(file: &Path) -> bool {
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(dir: &Path, path: &str, mode: u32) {
        let file = dir.join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn programs_are_found_by_folder_name_and_mode() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let path = std::env::join_paths(["a", "b", "missing"].map(|name| dir.join(name))).unwrap();
        file(dir, "a/initdb", 0o755);
        file(dir, "b/postgres", 0o755);
        assert_eq!(dir_with(&path, &POSTGRES), None, "both must be in one folder");
        file(dir, "b/initdb", 0o755);
        assert_eq!(dir_with(&path, &POSTGRES), Some(dir.join("b")));

        file(dir, "a/redis-server", 0o644);
        file(dir, "a/valkey-server", 0o755);
        assert_eq!(on_path(&path, &REDIS), Some(dir.join("a/valkey-server")), "one is not executable");
        file(dir, "b/redis-server", 0o755);
        assert_eq!(on_path(&path, &REDIS), Some(dir.join("b/redis-server")), "the name counts first");
        assert_eq!(on_path(OsStr::new("::"), &["Cargo.toml"]), None, "not the current folder");
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        let folder = tempfile::tempdir().unwrap();
        for version in ["9", "15", "17", "notes"] {
            file(folder.path(), &format!("{version}/bin/initdb"), 0o755);
        }
        fs::create_dir_all(folder.path().join("18/bin")).unwrap();
        let expected = ["17", "15", "9"].map(|version| folder.path().join(version).join("bin"));
        assert_eq!(versioned_dirs(folder.path(), &["initdb"]), expected);
    }
}
