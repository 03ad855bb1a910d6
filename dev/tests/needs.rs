//! All programs that are missing are listed together, before anything is built.

use std::fs;
use std::process::{Command, Output};

/// `cargo dev test` in a workspace of its own, on a machine that has nothing on PATH and so cannot install anything.
fn test_on_a_bare_machine(args: &[&str]) -> Output {
    let root = std::env::temp_dir().join(format!("needs-{}-{}", std::process::id(), args.len()));
    fs::create_dir_all(root.join("dev")).expect("a temporary folder");
    let mut dev = Command::new(env!("CARGO_BIN_EXE_dev"));
    dev.arg("test").args(args).env_clear().env("PATH", root.join("nothing"));
    // URLs that are never used, so that no server is started.
    dev.envs([("DATABASE_URL", "postgres://127.0.0.1:1/none"), ("REDIS_URL", "redis://127.0.0.1:1")]);
    let output = dev.env("CARGO_MANIFEST_DIR", root.join("dev")).output().expect("the runner starts");
    fs::remove_dir_all(&root).expect("the folder is ours");
    output
}

const NEEDED: [&str; 7] =
    ["Node.js 20", "npm", "Chromium", "Prometheus", "Python 3.10", "rotel", "schemathesis"];

#[test]
fn missing_programs_are_listed_before_the_build() {
    let output = test_on_a_bare_machine(&[]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    let (before, list) = said
        .split_once("error: the tests need programs that are missing")
        .unwrap_or_else(|| panic!("{said}"));
    assert!(!before.contains("Starting") && !before.contains("Testing"), "{before}");
    for needed in NEEDED {
        assert_eq!(list.matches(&format!("\n  - {needed}")).count(), 1, "{needed} in {list}");
    }
    assert!(list.contains("apt install chromium"), "{list}");
}

#[test]
fn named_tests_run_although_programs_are_missing() {
    let output = test_on_a_bare_machine(&["some_test"]);
    let said = String::from_utf8_lossy(&output.stderr);
    for needed in NEEDED {
        assert!(said.contains(&format!("\n  - {needed}")), "{needed} in {said}");
    }
    assert!(!said.contains("error: the tests need"), "{said}");
}
