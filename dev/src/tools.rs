//! The programs that only tests need: a real browser, nginx in front of the services, Prometheus. Found on the machine, else
//! installed with apt. Who cannot have them can still run everything else: the tests that need them say so.

use std::path::PathBuf;

use crate::{find, install, terminal};

struct Tool {
    what: &'static str,
    /// How tests learn where it is; a person may set it too.
    variable: &'static str,
    names: &'static [&'static str],
    debian_packages: &'static [&'static str],
}

const TOOLS: [Tool; 4] = [
    Tool {
        what: "Chromium",
        variable: "DEV_CHROMIUM",
        names: &["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"],
        // The font is for people who look at the screenshots.
        debian_packages: &["chromium", "fonts-noto-color-emoji"],
    },
    Tool { what: "nginx", variable: "DEV_NGINX", names: &["nginx"], debian_packages: &["nginx"] },
    Tool {
        what: "Prometheus",
        variable: "DEV_PROMETHEUS",
        names: &["prometheus"],
        debian_packages: &["prometheus"],
    },
    Tool {
        what: "promtool",
        variable: "DEV_PROMTOOL",
        names: &["promtool"],
        debian_packages: &["prometheus"],
    },
];

/// Where tests find them: those that are there now.
pub(crate) async fn env() -> Vec<(&'static str, PathBuf)> {
    let mut found = Vec::new();
    for tool in TOOLS {
        match tool.program().await {
            Ok(program) => found.push((tool.variable, program)),
            Err(error) => terminal::warn(format_args!("tests that need {} will fail: {error:#}", tool.what)),
        }
    }
    found
}

impl Tool {
    async fn program(&self) -> anyhow::Result<PathBuf> {
        if let Some(given) = std::env::var_os(self.variable).filter(|given| !given.is_empty()) {
            return Ok(given.into());
        }
        // An account that is not root often has no `sbin` on its PATH, where nginx is.
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::split_paths(&path).chain(["/usr/sbin".into()]);
        let path = std::env::join_paths(path)?;
        let look = || find::program(&path, self.names);
        if let Some(program) = look() {
            return Ok(program);
        }
        install::install_with_apt(self.what, self.debian_packages).await?;
        look().ok_or_else(|| anyhow::anyhow!("it was installed, but is not on PATH: set {}", self.variable))
    }
}
