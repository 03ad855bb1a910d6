//! `docs/security.md` says which test shows what. Each of these exists, and so does each file that it points to.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The names of all test functions below a folder.
fn tests_in(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).expect("the folder is in the workspace") {
        let path = entry.expect("it can be read").path();
        if path.is_dir() {
            tests_in(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("sources are text");
            let mut is_test = false;
            for line in text.lines().map(str::trim) {
                let function = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ");
                match function.and_then(|rest| rest.split_once('(')) {
                    Some((name, _)) if is_test => _ = found.insert(name.to_owned()),
                    _ => {}
                }
                is_test = line.starts_with("#[test]")
                    || line.starts_with("#[tokio::test")
                    || line.starts_with("#[sqlx::test")
                    || is_test && line.starts_with("#[");
            }
        }
    }
}

fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

#[test]
fn every_threat_is_met_somewhere_and_shown_by_tests_that_exist() {
    let mut tests = BTreeSet::new();
    for member in
        ["api", "shared/protocol", "shared/service-kit", "shared/testkit", "stream-gateway", "e2e", "dev"]
    {
        for folder in ["src", "tests"].map(|folder| workspace().join(member).join(folder)) {
            if folder.exists() {
                tests_in(&folder, &mut tests);
            }
        }
    }
    assert!(tests.len() > 200, "tests are written in another way: {}", tests.len());
    let text =
        fs::read_to_string(workspace().join("docs/security.md")).expect("the file is in the workspace");
    let (_, threats) = text.split_once("\n## Threats\n").expect("there is a table of threats");
    let (threats, _) = threats.split_once("\n## ").expect("and something behind it");
    let rows: Vec<Vec<_>> = threats
        .lines()
        .filter(|line| line.starts_with("| "))
        .skip(1)
        .map(|row| row.trim_matches('|').split('|').collect())
        .collect();
    assert!(rows.len() > 20, "the table is written in another way");
    for row in rows {
        let [threat, _, places, shown] = &row[..] else { panic!("a row has four cells: {row:?}") };
        assert!(quoted(places).count() > 0 && quoted(shown).count() > 0, "{threat}");
        for place in quoted(places) {
            assert!(workspace().join(place).exists(), "{threat}: there is no {place}");
        }
        for test in quoted(shown) {
            assert!(tests.contains(test), "{threat}: there is no test {test}");
        }
    }
}
