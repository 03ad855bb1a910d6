//! What the suite is told by its surroundings.

use std::path::PathBuf;

/// Where Postgres and Redis are. `cargo dev test` sets both.
pub(crate) fn server(name: &str) -> String {
    let value = setting(name);
    assert!(
        !value.is_empty(),
        "{name} is not set: run the suite by `cargo dev test`, which starts the servers it needs"
    );
    value
}

/// A program that the suite starts itself. `cargo dev test` finds or installs it.
pub fn program(name: &str, what: &str, how: &str) -> PathBuf {
    let value = setting(name);
    assert!(
        !value.is_empty(),
        "{name} is not set: install {what} ({how}) and run the suite by `cargo dev test`"
    );
    value.into()
}

#[expect(clippy::disallowed_methods, reason = "this file is where the suite reads its settings")]
fn setting(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

/// `target/<profile>`: the folder above the test's own program.
pub(crate) fn build_folder() -> PathBuf {
    let own = std::env::current_exe().expect("a running program has a path");
    own.ancestors().nth(2).expect("a test runs in target/<profile>/deps").to_owned()
}

/// The services under test, where the same build puts them.
pub(crate) fn binary(name: &str) -> PathBuf {
    let path = build_folder().join(name);
    assert!(
        path.exists(),
        "{} is not built: run `cargo build -p api -p stream-gateway` first",
        path.display()
    );
    path
}
