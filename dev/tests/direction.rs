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

/// The modules of each crate; each imports only modules before it.
const MODULES: [(&str, &str); 3] = [
    (
        "shared/service-kit",
        "backoff client_address ended_sessions healthcheck outbound process_metrics quality_values redis_topology secrets settings \
         tasks telemetry keyring lifecycle metrics limiter traces config cookies origins http server ops explain",
    ),
    (
        "api",
        "config metrics request_context domain store publisher commands oauth last_used relay presence erasing pruner maintenance readiness explain \
         external http app cli",
    ),
    (
        "stream-gateway",
        "descriptors config metrics memory frame trace event core api_client keys limits identities presence backfill subscriber engine explain http \
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

/// The code of a file without comments and without its `mod tests`, which ends at the first `}` that is not indented. Other code
/// that is compiled for tests alone counts. `depth` is the number of modules around the code.
fn counted(code: &str, depth: usize) -> String {
    let (mut counted, mut lines) = (String::new(), code.lines().peekable());
    while let Some(line) = lines.next() {
        if line == "#[cfg(test)]" && lines.peek().is_some_and(|next| next.ends_with("mod tests {")) {
            lines.by_ref().find(|line| *line == "}");
        } else if !line.trim_start().starts_with("//") {
            counted.extend([line, "\n"]);
        }
    }
    // Another name of the crate's root.
    counted.replace(&"super::".repeat(depth), "crate::")
}

/// The modules that code names after `crate::`, also in `crate::{a, b::{c, d}}`.
fn imports(code: &str) -> BTreeSet<&str> {
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

/// The imports of a file that are not below its module; the modules of its crate from the bottom to the top.
fn violations(modules: &str, file: &Path, code: &str) -> Vec<(String, String)> {
    let names = file.with_extension("");
    let names: Vec<_> = names.iter().filter_map(OsStr::to_str).filter(|name| *name != "mod").collect();
    let (module, code) = (names[0], counted(code, names.len()));
    let position = |name: &str| modules.split_whitespace().position(|each| each == name);
    let used = imports(&code).into_iter().filter(|used| *used != module);
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
    for (member, modules) in MODULES {
        let (folder, mut files) = (workspace().join(member).join("src"), Vec::new());
        sources(&folder, &mut files);
        for file in files {
            let code = fs::read_to_string(&file).expect("text");
            let file = file.strip_prefix(&folder).expect("below");
            if !["lib.rs", "main.rs"].iter().any(|root| file == Path::new(root)) {
                found.extend(violations(modules, file, &code));
            }
        }
    }
    assert_eq!(found, []);
}

#[test]
fn import_against_the_direction_is_found() {
    let code = "use crate::{\n    config,\n    store::{feed::Keep, http},\n    commands::Commands,\n};";
    let found = |modules: usize, file: &str, code: &str| -> Vec<_> {
        let found = violations(MODULES[modules].1, Path::new(file), code);
        found.into_iter().map(|(_, used)| used).collect()
    };
    let [kit, api] = [0, 1];
    assert_eq!(found(api, "domain/name.rs", code), ["commands", "store"]);
    assert_eq!(found(api, "http/mod.rs", code), [""; 0]);
    assert_eq!(found(api, "commands/mod.rs", "crate::http::routes()"), ["http"]);
    assert_eq!(found(kit, "cookies.rs", "use crate::server::Limits;"), ["server"]);

    // After code that is compiled for tests alone.
    let tests = "#[cfg(test)]\npub(crate) mod tests {\n    use crate::app;\n}\n";
    assert_eq!(found(api, "store/mod.rs", tests), [""; 0]);
    for before in ["#[cfg(test)]\nmod simulation;\n", "#[cfg(test)]\nfn count() {}\n", tests] {
        assert_eq!(found(api, "store/mod.rs", &format!("{before}use crate::http;")), ["http"], "{before}");
    }

    // By `super`.
    assert_eq!(found(api, "store/pool.rs", "use super::super::http;"), ["http"]);
    assert_eq!(found(api, "store/mod.rs", "use super::{http, domain};"), ["http"]);
    assert_eq!(found(api, "store/pool.rs", "use super::http;"), [""; 0], "a module of its own");
    assert_eq!(found(api, "store/mod.rs", "/// [`crate::http`]"), [""; 0], "a link");
}
