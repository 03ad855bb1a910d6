//! `manifests FILE…`: judges rendered overlays, each in a file that is named as the overlay is.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use manifests::{Installation, root};

fn main() -> anyhow::Result<ExitCode> {
    let files: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    anyhow::ensure!(
        !files.is_empty(),
        "usage: manifests FILE…, where a file is an overlay rendered by kubectl kustomize"
    );
    let mut sound = true;
    for file in files {
        let overlay = file.file_stem().and_then(|stem| stem.to_str()).context("a file has a name")?;
        let rendered =
            fs::read_to_string(&file).with_context(|| format!("{} cannot be read", file.display()))?;
        let installation = Installation::read(root(), overlay, &rendered)?;
        let findings = installation.findings();
        for finding in &findings {
            eprintln!("{overlay}: {finding}");
        }
        eprintln!("{overlay}: {} objects, {} problem(s)", installation.set.objects.len(), findings.len());
        sound &= findings.is_empty();
    }
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
