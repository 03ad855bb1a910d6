//! One of our services as a process: settings by environment, addresses from its log, its metrics, its CPU and memory.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::{Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde_json::Value;
use testkit::process::{Process, Signal};

use crate::{
    http,
    usage::{Cpu, Memory},
};

const START_WITHIN: Duration = Duration::from_secs(30);
/// Complaints kept of one process.
const COMPLAINTS: usize = 1_000;

#[derive(Clone)]
pub struct Plan {
    pub name: &'static str,
    pub binary: PathBuf,
    pub env: BTreeMap<String, String>,
}

impl Plan {
    /// Sets or replaces a setting.
    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.env.insert(name.into(), value.to_string());
        self
    }

    /// Runs a subcommand to its end.
    pub fn run(&self, argument: &str) -> anyhow::Result<()> {
        let output = self.command().arg(argument).output().context("the service cannot be started")?;
        let said = String::from_utf8_lossy(&output.stdout);
        anyhow::ensure!(output.status.success(), "{} {argument}: {}: {said}", self.name, output.status);
        Ok(())
    }

    /// Returns when `/readyz` says yes.
    pub fn start(self) -> anyhow::Result<Service> {
        let mut process = Process::start(self.command().stdout(Stdio::piped()))
            .with_context(|| format!("{} cannot be started", self.name))?;
        let log = Arc::new(Mutex::new(Log::default()));
        let stdout = process.child().stdout.take().context("stdout is piped")?;
        let into = log.clone();
        thread::spawn(move || {
            // To the end, so that a service that logs a lot is never kept waiting.
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                into.lock().unwrap_or_else(PoisonError::into_inner).read(&line);
            }
        });
        let mut service = Service { plan: self, process, log };
        let deadline = Instant::now() + START_WITHIN;
        while !service.is_ready() {
            let complaints = || service.log().complaints.join("\n");
            anyhow::ensure!(
                Instant::now() < deadline,
                "{} is not ready: {}",
                service.plan.name,
                complaints()
            );
            if let Some(status) = service.process.ended() {
                thread::sleep(Duration::from_millis(100)); // Its last words are on the way.
                let complaints = service.log().complaints.join("\n");
                anyhow::bail!("{} ended with {status}: {complaints}", service.plan.name);
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(service)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.env_clear().envs(&self.env).stdin(Stdio::null());
        command
    }
}

/// What is of interest in a log.
#[derive(Default)]
struct Log {
    addresses: BTreeMap<String, SocketAddr>,
    complaints: Vec<String>,
}

impl Log {
    fn read(&mut self, line: &str) {
        let parsed = serde_json::from_str::<Value>(line).unwrap_or_default();
        if parsed["message"] == "listening"
            && let (Some(name), Some(address)) = (parsed["name"].as_str(), parsed["address"].as_str())
            && let Ok(address) = address.parse()
        {
            self.addresses.insert(name.into(), address);
        }
        // What is no line of the log is a panic, or a refusal to start.
        let complaint = match parsed["level"].as_str() {
            None => line,
            Some("WARN" | "ERROR") => {
                parsed["message"].as_str().unwrap_or(line).split('\n').next().unwrap_or_default()
            }
            Some(_) => return,
        };
        if self.complaints.len() < COMPLAINTS {
            self.complaints.push(complaint.to_owned());
        }
    }
}

pub struct Service {
    plan: Plan,
    process: Process,
    log: Arc<Mutex<Log>>,
}

impl Service {
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    pub fn public(&self) -> anyhow::Result<SocketAddr> {
        self.address("public")
    }

    pub fn internal(&self) -> anyhow::Result<SocketAddr> {
        self.address("internal")
    }

    /// The address of its own that its public listener has.
    pub fn host(&self) -> anyhow::Result<Ipv4Addr> {
        match self.public()? {
            SocketAddr::V4(address) => Ok(*address.ip()),
            SocketAddr::V6(address) => anyhow::bail!("{address} is not of this bench"),
        }
    }

    pub fn cpu(&self) -> anyhow::Result<Cpu> {
        Cpu::of(self.id())
    }

    pub fn memory(&self) -> anyhow::Result<Memory> {
        Memory::of(self.id())
    }

    /// The sum over all lines of `/metrics` that begin so and hold `label`.
    pub fn metric(&self, name: &str, label: &str) -> anyhow::Result<u64> {
        let answer = http::get(self.address("ops")?, "/metrics")?;
        let of_this = |line: &&str| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])) && line.contains(label)
        };
        let lines = answer.body.lines().filter(of_this);
        Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64)
    }

    /// Warnings and errors it has logged, the first few.
    pub fn complaints(&self) -> Vec<String> {
        self.log().complaints.clone()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// SIGTERM.
    pub fn terminate(&mut self) {
        self.process.signal(Signal::SIGTERM);
    }

    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.ended()
    }

    /// The same again at the same addresses, as a supervisor does it.
    pub fn start_again(&self) -> anyhow::Result<Self> {
        let addresses = self.log().addresses.clone();
        let mut plan = self.plan.clone();
        for (name, address) in addresses {
            let setting =
                if name == "public" { "LISTEN".into() } else { format!("{}_LISTEN", name.to_uppercase()) };
            plan = plan.env(&setting, address);
        }
        plan.start()
    }

    fn address(&self, name: &str) -> anyhow::Result<SocketAddr> {
        let address = self.log().addresses.get(name).copied();
        address.with_context(|| format!("{} has no listener {name}", self.plan.name))
    }

    fn is_ready(&self) -> bool {
        self.address("ops").and_then(|ops| http::get(ops, "/readyz")).is_ok_and(|answer| answer.status == 200)
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
