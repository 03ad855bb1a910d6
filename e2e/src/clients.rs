//! Programs that read the stream with common libraries: the blocks of `docs/clients.md`, unchanged, and the
//! programs of `e2e/clients`. Their packages are installed under `target/clients`, in the versions that `e2e/clients` pins.
//! Each prints one line per event: id, name, data.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use testkit::{node, process::Process, programs, service::Log, sse::Event};

#[derive(Debug, Clone, Copy)]
pub enum Language {
    /// The library, as the section's heading names it.
    Node(&'static str),
    Python,
    Shell,
    Go,
    Java,
}

impl Language {
    fn heading(self) -> String {
        match self {
            Self::Node(library) => format!("Node.js with `{library}`"),
            Self::Python => "Python with `httpx-sse`".into(),
            Self::Shell => "Shell with curl".into(),
            Self::Go => "Go with `launchdarkly/eventsource`".into(),
            Self::Java => "Java with `okhttp-eventsource`".into(),
        }
    }

    /// Programs that must be on the machine, besides Node.js.
    fn tools(self) -> &'static [&'static str] {
        match self {
            Self::Node(_) => &[],
            Self::Python => &["python3 -m pip --version"],
            Self::Shell => &["bash --version", "curl --version"],
            Self::Go => &["go version"],
            Self::Java => &["javac -version", "mvn --version"],
        }
    }

    /// The command that runs its block; `None`, with a line on stderr, if a tool is missing.
    pub fn prepare(self) -> Option<Command> {
        let heading = self.heading();
        if let Some(missing) = self.tools().iter().find(|tool| !works(tool)) {
            // Not by a macro: the test runner would show it only if the test fails.
            let _ = writeln!(io::stderr(), "skipped: {heading} in docs/clients.md: no `{missing}` here");
            return None;
        }
        Some(match self {
            Self::Node(library) => {
                let folder = folder("node", &["package.json"]);
                let name = format!("{library}.mjs");
                write(&folder.join(&name), &block(&heading));
                node::script(&folder, &name)
            }
            Self::Python => {
                let folder = folder("python", &["requirements.txt"]);
                python(&folder, "client.py", &block(&heading))
            }
            Self::Shell => run("bash", &folder("shell", &[]), "client.sh", &block(&heading)),
            Self::Go => {
                let folder = folder("go", &["go.mod", "go.sum"]);
                write(&folder.join("main.go"), &block(&heading));
                let mut go = Command::new("go");
                finish(go.args(["build", "-o", "client", "."]).env("GOTOOLCHAIN", "local"), &folder);
                Command::new(folder.join("client"))
            }
            Self::Java => {
                let folder = folder("java", &["pom.xml"]);
                once(&folder, "pom.xml", || {
                    let mut maven = Command::new("mvn");
                    maven.args("-q -B dependency:copy-dependencies -DoutputDirectory=packages".split(' '));
                    maven
                });
                write(&folder.join("Client.java"), &block(&heading));
                let mut java = Command::new("java");
                java.args(
                    "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xmx64m -cp packages/* Client.java".split(' '),
                );
                java.current_dir(folder);
                java
            }
        })
    }
}

/// A program of `examples`, which has a `package.json`.
pub fn node_example(name: &str, script: &str) -> Command {
    let folder = example(name, &["package.json", script]);
    node::script(&folder, script)
}

/// The same with a `requirements.txt`; `None`, with a line on stderr, without Python and pip.
pub fn python_example(name: &str, script: &str) -> Option<Command> {
    if !works("python3 -m pip --version") {
        let _ = writeln!(io::stderr(), "skipped: examples/{name}: no `python3 -m pip --version` here");
        return None;
    }
    let folder = example(name, &["requirements.txt"]);
    Some(python(&folder, script, &ours(&format!("../examples/{name}/{script}"))))
}

fn example(name: &str, files: &[&str]) -> PathBuf {
    let folder = folder(name, &[]);
    for file in files {
        write(&folder.join(file), &ours(&format!("../examples/{name}/{file}")));
    }
    folder
}

fn python(folder: &Path, script: &str, text: &str) -> Command {
    once(folder, "requirements.txt", || {
        let mut pip = Command::new("python3");
        pip.args("-m pip install --quiet --disable-pip-version-check --no-deps --upgrade".split(' ')).args([
            "--requirement",
            "requirements.txt",
            "--target",
            "packages",
        ]);
        pip
    });
    let mut python = run("python3", folder, script, text);
    python.env("PYTHONPATH", folder.join("packages"));
    python
}

pub fn strict(library: &str) -> Command {
    let name = format!("{library}.mjs");
    let folder = folder("node", &["package.json", &name]);
    node::script(&folder, &name)
}

pub fn block(heading: &str) -> String {
    let document = ours("../docs/clients.md");
    let (_, section) = document.split_once(&format!("\n## {heading}\n")).expect("it has this heading");
    let (_, block) = section.split_once("\n```").expect("there is a block under it");
    let (_, block) = block.split_once('\n').expect("a block has lines");
    let (block, _) = block.split_once("```").expect("a block has an end");
    block.to_owned()
}

fn ours(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn folder(name: &str, files: &[&str]) -> PathBuf {
    let folder = programs::build_folder().parent().expect("target/<profile> lies in target").join("clients");
    let folder = folder.join(name);
    fs::create_dir_all(&folder).expect("a folder in target");
    for file in files {
        write(&folder.join(file), &ours(&format!("clients/{file}")));
    }
    folder
}

/// An unchanged file keeps its time, so that nothing is built again.
fn write(path: &Path, text: &str) {
    if fs::read_to_string(path).is_ok_and(|found| found == text) {
        return;
    }
    fs::write(path, text).expect("a file in target");
}

fn run(program: &str, folder: &Path, script: &str, text: &str) -> Command {
    write(&folder.join(script), text);
    let mut command = Command::new(program);
    command.arg(script).current_dir(folder);
    command
}

fn works(command: &str) -> bool {
    let mut words = command.split(' ');
    let mut command = Command::new(words.next().expect("a command has a name"));
    command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn once(folder: &Path, list: &str, install: impl FnOnce() -> Command) {
    let wanted = fs::read_to_string(folder.join(list)).expect("it was written a moment ago");
    let installed = folder.join("installed");
    if fs::read_to_string(&installed).is_ok_and(|found| found == wanted) {
        return;
    }
    let packages = folder.join("packages");
    if packages.exists() {
        fs::remove_dir_all(packages).expect("a folder of ours can be removed");
    }
    finish(&mut install(), folder);
    write(&installed, &wanted);
}

fn finish(command: &mut Command, folder: &Path) {
    let output = command.current_dir(folder).stdin(Stdio::null()).output().expect("it works, as was seen");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&said));
}

pub struct ClientProgram {
    pub name: &'static str,
    process: Process,
    printed: Arc<Log>,
    troubles: Arc<Log>,
}

impl ClientProgram {
    pub fn start(name: &'static str, mut command: Command, url: &str, token_file: &Path) -> Self {
        command.env("STREAM_URL", url).env("TOKEN_FILE", token_file);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Process::start(&mut command).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (printed, troubles) = (Log::of(name.into()), Log::of(name.into()));
        let (printed, troubles) = (Arc::new(printed), Arc::new(troubles));
        printed.follow(process.child().stdout.take().expect("stdout is piped"));
        troubles.follow(process.child().stderr.take().expect("stderr is piped"));
        Self { name, process, printed, troubles }
    }

    pub fn events(&self) -> Vec<Event> {
        self.printed.lines().iter().map(|line| event(line)).collect()
    }

    pub fn has(&self, id: &str) -> bool {
        self.printed.lines().iter().rev().any(|line| line.split(' ').next() == Some(id))
    }

    pub fn reported(&self, status: &str) -> bool {
        let number = |line: &String| line.split(|c: char| !c.is_ascii_digit()).any(|number| number == status);
        self.troubles.lines().iter().any(number)
    }

    pub fn describe(&mut self) -> String {
        let troubles = self.troubles.lines();
        let last = troubles.iter().skip(troubles.len().saturating_sub(10));
        format!(
            "{}: ended: {:?}, its last troubles: {:#?}",
            self.name,
            self.process.ended(),
            last.collect::<Vec<_>>()
        )
    }
}

/// Parses `id name data`. Some libraries call an event without a name `message`.
pub fn event(line: &str) -> Event {
    let mut parts = line.splitn(3, ' ').map(str::to_owned);
    let mut part = || parts.next().unwrap_or_default();
    let (id, name, data) = (part(), part(), part());
    Event {
        id: Some(id).filter(|id| !id.is_empty()),
        name: Some(name).filter(|name| !name.is_empty() && name != "message"),
        data,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::ours;

    fn behind<'a>(text: &'a str, word: &str) -> Vec<&'a str> {
        text.lines().filter_map(|line| line.trim().strip_prefix(word)).map(str::trim).collect()
    }

    #[test]
    fn documented_versions_are_the_tested_ones() {
        let package: Value = serde_json::from_str(&ours("clients/package.json")).expect("JSON");
        let node = ["eventsource", "eventsource-parser"].map(|name| {
            format!("{name}@{}", package["dependencies"][name].as_str().expect("a pinned version"))
        });
        let python = ours("clients/requirements.txt");
        let python = python.lines().filter(|line| line.starts_with("httpx")).map(str::to_owned);
        let go = ours("clients/go.mod");
        let go = behind(&go, "require").into_iter().map(|module| module.replace(' ', "@"));
        let lock = ours("../Cargo.lock");
        let (_, rust) = lock.split_once("name = \"reqwest-eventsource\"\n").expect("it is locked");
        let rust = behind(rust, "version =")[0].trim_matches('"');
        let rust = format!("reqwest-eventsource@{rust}");
        let pom = ours("clients/pom.xml");
        let (_, pom) = pom.split_once("<dependency>").expect("a dependency");
        let tag = |name: &str| {
            let (_, begun) = pom.split_once(&format!("<{name}>")).expect("a dependency has it");
            begun.split('<').next().unwrap_or_default()
        };
        let java = ["groupId", "artifactId", "version"].map(tag).join(":");

        let document = ours("../docs/clients.md");
        for version in node.into_iter().chain(python).chain(go).chain([rust, java]) {
            assert!(document.contains(&format!("`{version}`")), "docs/clients.md does not name {version}");
        }
    }
}
