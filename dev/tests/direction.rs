//! Dependencies point one way: protocol ← service-kit ← services, and in each service from the edge to the rules.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// The crates of the workspace that a crate may use, and the ones that only its tests may use.
const CRATES: [(&str, &[&str], &[&str]); 5] = [
    ("protocol", &[], &["testkit"]),
    ("service-kit", &["protocol"], &["testkit"]),
    ("testkit", &["protocol", "service-kit"], &[]),
    ("api", &["protocol", "service-kit"], &["testkit"]),
    ("stream-gateway", &["protocol", "service-kit"], &["testkit"]),
];

/// The modules of each service; each imports only modules before it.
const MODULES: [(&str, &str); 2] = [
    (
        "api",
        "config metrics request_context domain store publisher commands oauth last_used pruner maintenance readiness explain \
         external http app cli",
    ),
    (
        "stream-gateway",
        "descriptors config metrics frame trace event core api_client keys limits identities backfill subscriber engine explain http \
         app cli",
    ),
];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn crates_depend_in_one_direction() {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["metadata", "--no-deps", "--offline", "--format-version", "1"]).current_dir(workspace());
    let metadata: Value = serde_json::from_slice(&cargo.output().expect("cargo runs").stdout).expect("JSON");
    let packages = metadata["packages"].as_array().expect("a list");
    for (name, uses, tests_use) in CRATES {
        let package = packages.iter().find(|package| package["name"] == name).expect("a member");
        for dependency in package["dependencies"].as_array().expect("a list") {
            let used = dependency["name"].as_str().expect("a name");
            let allowed = uses.contains(&used) || dependency["kind"] == "dev" && tests_use.contains(&used);
            assert!(dependency["path"].is_null() || allowed, "{name} must not depend on {used}");
        }
    }
}

/// The modules that code outside of tests names after `crate::`, also in `crate::{a, b::{c, d}}`.
fn imports(code: &str) -> BTreeSet<&str> {
    let code = code.split("#[cfg(test)]").next().unwrap_or_default();
    let mut modules = BTreeSet::new();
    for path in code.split("crate::").skip(1) {
        let (mut depth, mut begins) = (0, true);
        for (at, c) in path.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ if begins && c.is_alphabetic() => {
                    modules.extend(path[at..].split(|c: char| !c.is_alphanumeric() && c != '_').next());
                    begins = false;
                }
                _ => {}
            }
            begins |= c == ',' && depth == 1;
            if depth == 0 && (c == '}' || !path.starts_with('{')) {
                break;
            }
        }
    }
    modules
}

/// The imports of a module that are not below it; the modules of its service from the bottom to the top.
fn violations(modules: &str, module: &str, code: &str) -> Vec<(String, String)> {
    let position = |name: &str| modules.split_whitespace().position(|each| each == name);
    let used = imports(code).into_iter().filter(|used| *used != module);
    let wrong = used.filter(|used| position(module).is_none() || position(used) >= position(module));
    wrong.map(|used| (module.to_owned(), used.to_owned())).collect()
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if !path.ends_with("tests.rs") {
            found.push(path);
        }
    }
}

#[test]
fn modules_import_in_one_direction() {
    let mut found = Vec::new();
    for (service, modules) in MODULES {
        let (folder, mut files) = (workspace().join(service).join("src"), Vec::new());
        sources(&folder, &mut files);
        for file in files {
            let code = fs::read_to_string(&file).expect("text");
            let name = file.strip_prefix(&folder).expect("below").components().next().expect("a name");
            let module = Path::new(&name).file_stem().and_then(OsStr::to_str).expect("a name");
            if !["lib", "main"].contains(&module) {
                found.extend(violations(modules, module, &code));
            }
        }
    }
    assert_eq!(found, []);
}

#[test]
fn import_against_the_direction_is_found() {
    let code = "use crate::{\n    config,\n    store::{feed::Keep, http},\n    commands::Commands,\n};";
    let found = |module: &str, code| violations(MODULES[0].1, module, code).into_iter().map(|(_, used)| used);
    assert_eq!(found("domain", code).collect::<Vec<_>>(), ["commands", "store"]);
    assert_eq!(found("http", code).count(), 0);
    assert_eq!(found("commands", "crate::http::routes()").collect::<Vec<_>>(), ["http"]);
}
