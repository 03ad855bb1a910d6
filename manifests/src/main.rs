//! `manifests FILE…`: checks overlays that kubectl rendered, each in a file named after it, and then that every rule
//! finds the defects that planted.list names.

use std::{collections::BTreeSet, fs, path::PathBuf};

use anyhow::{Context as _, ensure};
use manifests::{Findings, Installation, planted, rules};

fn main() -> anyhow::Result<()> {
    let (mut problems, mut found, mut planted) = (0, BTreeSet::new(), 0);
    for file in std::env::args_os().skip(1).map(PathBuf::from) {
        let overlay = file.file_stem().and_then(|stem| stem.to_str()).context("a file has a name")?;
        let rendered =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let set = Installation::read(overlay, &rendered)?;
        let mut findings = Findings::default();
        rules::ALL.iter().for_each(|(_, rule)| rule(&set, &mut findings));
        findings.0.iter().for_each(|finding| eprintln!("{overlay}: {finding}"));
        eprintln!("{overlay}: {} objects, {} problems", set.objects.len(), findings.0.len());
        problems += findings.0.len();
        for line in planted::of(overlay) {
            found.insert(planted::found(&set, line).with_context(|| format!("planted.list: {line}"))?);
            planted += 1;
        }
    }
    ensure!(problems == 0, "{problems} problems");
    for (rule, _) in rules::ALL {
        ensure!(found.contains(rule), "planted.list has no defect for the rule {rule}");
    }
    eprintln!("{planted} planted defects, each found");
    Ok(())
}
