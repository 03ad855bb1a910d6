//! Every task that a service starts is watched by `service_kit::tasks`, or listed here with the reason why its end is noticed.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Files that start tasks which are not watched.
const NOT_WATCHED: [(&str, &str); 6] = [
    ("api/src/commands/mod.rs", "one command, awaited by its request"),
    ("api/src/publisher/lane.rs", "one connection attempt, awaited by its lane"),
    ("shared/service-kit/src/lifecycle.rs", "cancels the process's stop token when it ends"),
    ("shared/service-kit/src/server.rs", "one connection"),
    ("stream-gateway/src/backfill.rs", "one request; its panic becomes the delivery thread's"),
    ("stream-gateway/src/http/stream.rs", "one connection"),
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("the folder is in the workspace") {
        let path = entry.expect("it can be read").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests.rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_long_lived_task_of_a_service_is_watched() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = Vec::new();
    ["api/src", "shared/protocol/src", "shared/service-kit/src", "stream-gateway/src"]
        .iter()
        .for_each(|folder| sources(&workspace.join(folder), &mut files));
    let mut found = Vec::new();
    for path in files {
        let text = fs::read_to_string(&path).expect("sources are text");
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let starts =
            code.lines().filter(|line| line.contains("spawn(") && !line.trim_start().starts_with("//"));
        let watched =
            ["fn spawn(", "tasks.spawn(\"", ".watch(", "thread.spawn(move || runtime.block_on(run))"];
        if starts.filter(|line| !watched.iter().any(|form| line.contains(form))).count() > 0 {
            found.push(path.strip_prefix(&workspace).expect("it is below").display().to_string());
        }
    }
    found.sort();
    let allowed = NOT_WATCHED.map(|(file, _)| file);
    assert_eq!(found, allowed, "watch it by `Tasks`, or list it with a reason");
}
