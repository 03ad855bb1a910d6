//! Child processes that never outlive the runner: each in its own process group, with a signal from the kernel if the runner
//! dies, and waited for when it ends.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, setsid};
use testkit::process::tie_to_parent;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::Command;
use tokio::sync::watch;

use crate::terminal::{self, Colour};

const LONGEST_LINE: u64 = 16 * 1024;
const START_DEADLINE: Duration = Duration::from_mins(1);

pub(crate) fn command<A: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = A>,
) -> Command {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    command
}

/// A Ctrl-C in the terminal no longer reaches the command, so the runner decides the order of stopping. If the runner dies, the
/// kernel sends `on_death`.
pub(crate) fn bind_to_runner(command: &mut Command, on_death: Signal) {
    command.process_group(0);
    tie_to_parent(command.as_std_mut(), on_death);
}

pub(crate) fn detach(command: &mut Command) {
    #[expect(
        unsafe_code,
        reason = "the closure runs between fork and exec; it only makes async-signal-safe calls"
    )]
    // SAFETY: setsid is async-signal-safe.
    unsafe {
        command.as_std_mut().pre_exec(|| setsid().map(drop).map_err(io::Error::from));
    }
}

/// Dropped before the end, it interrupts the command's whole group.
pub(crate) async fn run_to_end(mut command: Command, on_death: Signal) -> Result<ExitStatus> {
    struct Interrupt(Option<Pid>);
    impl Drop for Interrupt {
        fn drop(&mut self) {
            if let Some(group) = self.0 {
                let _ = killpg(group, Signal::SIGTERM);
            }
        }
    }
    bind_to_runner(&mut command, on_death);
    let mut child = command.spawn().with_context(|| cannot_start(&command))?;
    let mut interrupt = Interrupt(child.id().map(to_pid));
    let status = child.wait().await?;
    interrupt.0 = None;
    Ok(status)
}

pub(crate) async fn run_quietly(mut command: Command) -> Result<()> {
    bind_to_runner(&mut command, Signal::SIGKILL);
    let output = command.output().await.with_context(|| cannot_start(&command))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        bail!(
            "{} failed ({}):\n{}",
            name_of(&command),
            output.status,
            String::from_utf8_lossy(&said).trim_end()
        );
    }
    Ok(())
}

fn name_of(command: &Command) -> String {
    command.as_std().get_program().to_string_lossy().into_owned()
}

fn cannot_start(command: &Command) -> String {
    format!("cannot start {}", name_of(command))
}

fn to_pid(id: u32) -> Pid {
    Pid::from_raw(id.cast_signed())
}

pub(crate) struct Child {
    pub(crate) name: String,
    pid: Pid,
    exit: watch::Receiver<Option<ExitStatus>>,
}

impl Child {
    /// Its output goes to the terminal, line by line under its name.
    pub(crate) fn follow(name: &str, mut command: Command, colour: Colour) -> Result<Self> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| cannot_start(&command))?;
        let show = |name: String| move |line: &str| terminal::log_line(&name, colour, line);
        if let Some(stdout) = child.stdout.take() {
            tokio::spawn(follow(stdout, show(name.to_owned())));
        }
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(follow(stderr, show(name.to_owned())));
        }
        Self::watch(name, child)
    }

    pub(crate) fn log(name: &str, mut command: Command, file: File) -> Result<Self> {
        command.stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| cannot_start(&command))?;
        Self::watch(name, child)
    }

    fn watch(name: &str, mut child: tokio::process::Child) -> Result<Self> {
        let pid = to_pid(child.id().context("the child was just started")?);
        let (sender, exit) = watch::channel(None);
        tokio::spawn(async move {
            if let Ok(status) = child.wait().await {
                let _ = sender.send(Some(status));
            }
        });
        Ok(Self { name: name.to_owned(), pid, exit })
    }

    pub(crate) fn id(&self) -> i32 {
        self.pid.as_raw()
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.exit.borrow().is_some() || self.exit.has_changed().is_err()
    }

    pub(crate) fn ended(&self) -> impl Future<Output = Option<ExitStatus>> + Send + use<> {
        let mut exit = self.exit.clone();
        async move { exit.wait_for(Option::is_some).await.ok().and_then(|status| *status) }
    }

    /// Polls until it is ready, and fails if it ends before that.
    pub(crate) async fn until_ready(&self, ready: impl AsyncFn() -> bool) -> Result<()> {
        let wait = async {
            while !ready().await {
                if self.has_ended() {
                    bail!("{} ended while starting", self.name);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok(())
        };
        let waited = tokio::time::timeout(START_DEADLINE, wait).await;
        waited.with_context(|| format!("{} did not become ready within {START_DEADLINE:?}", self.name))?
    }

    /// Signals the child, waits for at most `patience`, then kills its group.
    pub(crate) async fn stop(&self, signal: Signal, patience: Duration) {
        self.signal(signal);
        self.wait_or_kill(patience).await;
    }

    pub(crate) fn signal(&self, signal: Signal) {
        // After its end, the pid may belong to another process.
        if !self.has_ended() {
            let _ = kill(self.pid, signal);
        }
    }

    pub(crate) async fn wait_or_kill(&self, patience: Duration) {
        if tokio::time::timeout(patience, self.ended()).await.is_err() {
            terminal::warn(format_args!("{} did not end within {patience:?}; killing it", self.name));
            let _ = killpg(self.pid, Signal::SIGKILL);
            let _ = tokio::time::timeout(patience, self.ended()).await;
        }
    }
}

/// Shows each line, a very long one in parts.
async fn follow(pipe: impl AsyncRead + Unpin, mut show: impl FnMut(&str)) {
    let (mut pipe, mut line) = (BufReader::new(pipe), Vec::new());
    while let Ok(1..) = (&mut pipe).take(LONGEST_LINE).read_until(b'\n', &mut line).await {
        show(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']));
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_line_is_shown_and_a_long_one_in_parts() {
        let mut shown = Vec::new();
        let long = "x".repeat(LONGEST_LINE as usize);
        let text = format!("one\ntwo\r\n\n{long}yyy\nthree");
        follow(text.as_bytes(), |line| shown.push(line.to_owned())).await;
        assert_eq!(shown, ["one", "two", "", &long, "yyy", "three"]);
    }

    #[tokio::test]
    async fn child_that_ignores_its_signal_is_killed() {
        let trapped = std::env::temp_dir().join(format!("trapped-{}", std::process::id()));
        let mut shell = command("sh", ["-c", "trap '' TERM; touch $0; while :; do sleep 0.05; done"]);
        shell.arg(&trapped);
        bind_to_runner(&mut shell, Signal::SIGKILL);
        let child = Child::follow("stubborn", shell, Colour::Red).unwrap();
        child.until_ready(async || trapped.exists()).await.unwrap();
        std::fs::remove_file(trapped).unwrap();
        child.stop(Signal::SIGTERM, Duration::from_millis(300)).await;
        let status = child.ended().await.unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
    }
}
