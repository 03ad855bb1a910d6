//! What the suite is told by its surroundings.

use std::path::PathBuf;

/// Where Postgres and Redis are. `cargo dev test` sets both.
pub(crate) fn server(name: &str) -> String {
    #[expect(clippy::disallowed_methods, reason = "this file is where the suite reads its settings")]
    let value = std::env::var(name).unwrap_or_default();
    assert!(
        !value.is_empty(),
        "{name} is not set: run the suite by `cargo dev test`, which starts the servers it needs"
    );
    value
}

/// The services under test: in the folder above the test's own program, where the same build puts them.
pub(crate) fn binary(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a running program has a path");
    let folder = own.ancestors().nth(2).expect("a test runs in target/<profile>/deps");
    let path = folder.join(name);
    assert!(
        path.exists(),
        "{} is not built: run `cargo build -p api -p stream-gateway` first",
        path.display()
    );
    path
}
