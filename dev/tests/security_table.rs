//! docs/security.md names the files that meet each threat and the tests that show it. Each file exists; that each test does
//! is checked by `.ci/run threats`.

use std::{fs, path::Path};

fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

#[test]
fn every_threat_names_existing_files_and_its_tests() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = fs::read_to_string(workspace.join("docs/security.md")).expect("the file is in the workspace");
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
            assert!(workspace.join(place).exists(), "{threat}: there is no {place}");
        }
    }
}
