//! Programs of Node.js that tests talk to: a folder with a script and a `package.json` whose dependencies are pinned, and
//! installed by the first test that needs them.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::{process::Process, programs::variable};

pub struct NodeServer {
    pub said: Value,
    _process: Process,
}

impl NodeServer {
    pub fn start(folder: &Path, name: &str, argument: &str) -> Self {
        let mut node = script(folder, name);
        node.arg(argument).stderr(Stdio::null());
        let mut process = Process::start(&mut node).expect("node starts: install Node.js 20 or later");
        let mut lines = BufReader::new(process.child().stdout.take().expect("stdout is piped")).lines();
        let said = lines
            .find_map(|line| serde_json::from_str(&line.expect("it writes text")).ok())
            .expect("the script says when it is ready");
        // Its output must be read to its end, or it would block.
        std::thread::spawn(move || lines.for_each(drop));
        Self { said, _process: process }
    }
}

pub fn script(folder: &Path, script: &str) -> Command {
    install(folder);
    let mut node = Command::new(variable("DEV_NODE").unwrap_or_else(|| "node".into()));
    node.arg(script).current_dir(folder).env("NO_COLOR", "1");
    node.stdin(Stdio::piped()).stdout(Stdio::piped());
    node
}

/// Locked against concurrent tests; repeated when a pinned version changes.
fn install(folder: &Path) {
    let lock = File::open(folder.join("package.json")).expect("a folder for node has a package.json");
    lock.lock().expect("a file can be locked");
    if is_installed(folder) {
        return;
    }
    let npm = Command::new(variable("DEV_NPM").unwrap_or_else(|| "npm".into()))
        .args(["install", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error"])
        .current_dir(folder)
        .status()
        .expect("npm starts: install Node.js 20 or later with npm");
    assert!(npm.success(), "npm cannot install what {}/package.json lists", folder.display());
    assert!(is_installed(folder), "npm installed other versions than {}/package.json pins", folder.display());
}

fn is_installed(folder: &Path) -> bool {
    let read = |file: &str| -> Option<Value> {
        serde_json::from_slice(&fs::read(folder.join(file)).ok()?).expect("npm writes JSON")
    };
    let package = read("package.json").expect("it was opened a moment ago");
    let pinned = package["dependencies"].as_object().expect("it pins what is needed");
    pinned.iter().all(|(name, version)| {
        let version = version.as_str().and_then(|version| version.rsplit('@').next());
        read(&format!("node_modules/{name}/package.json"))
            .is_some_and(|found| found["version"].as_str() == version)
    })
}
