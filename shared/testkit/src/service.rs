//! One of our services as a real process on ports of its own: settings by environment, addresses from its log, signals
//! from outside.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Read},
    net::SocketAddr,
    path::PathBuf,
    process::{Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use serde_json::Value;

use crate::{
    http::{Answer, Client},
    process::{Process, Signal},
    soon,
    sse::StreamRequest,
    until,
    usage::{Cpu, Memory},
    user::TestUser,
};

/// Lines kept of one service.
const LOG_LINES: usize = 200_000;

pub struct Log {
    pub name: String,
    lines: Mutex<Vec<String>>,
}

impl Log {
    pub fn of(name: String) -> Self {
        Self { name, lines: Mutex::default() }
    }

    pub fn lines(&self) -> MutexGuard<'_, Vec<String>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Warnings and errors, and lines that are not from the logger: a panic, or a failed start.
    pub fn complaints(&self) -> Vec<String> {
        let complaint = |line: &String| {
            let parsed = serde_json::from_str::<Value>(line).unwrap_or_default();
            match parsed["level"].as_str() {
                None => Some(line.clone()),
                Some("WARN" | "ERROR") => Some(parsed["message"].as_str()?.lines().next()?.to_owned()),
                Some(_) => None,
            }
        };
        self.lines().iter().filter_map(complaint).collect()
    }

    pub fn follow(self: &Arc<Self>, pipe: impl Read + Send + 'static) -> JoinHandle<()> {
        let log = self.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                let mut lines = log.lines();
                if lines.len() < LOG_LINES {
                    lines.push(line);
                }
            }
        })
    }
}

#[derive(Clone)]
pub struct Plan {
    pub(crate) binary: PathBuf,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) log: Arc<Log>,
}

impl Plan {
    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.env.insert(name.into(), value.to_string());
        self
    }

    /// Another build of the same program.
    pub fn binary(mut self, path: PathBuf) -> Self {
        self.binary = path;
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.env.remove(name);
        self
    }

    /// Returns when it accepts connections, which is before it is ready.
    pub async fn start(self) -> Service {
        let before = self.log.lines().len();
        let (process, readers) = self.spawn(&[]);
        let mut service =
            Service { process, readers, plan: self, addresses: BTreeMap::new(), client: Client::default() };
        soon("the service logs its addresses", service.listening(before)).await;
        service
    }

    pub async fn ready(self) -> Service {
        let service = self.start().await;
        service.until_ready().await;
        service
    }

    pub async fn run(&self, arguments: &[&str]) {
        let (mut process, readers) = self.spawn(arguments);
        let status = soon("the command ends", process.wait()).await;
        readers.into_iter().for_each(|reader| reader.join().expect("a reader does not panic"));
        assert!(status.success(), "{} {arguments:?}: {status}: {:#?}", self.log.name, self.log.lines());
    }

    /// The process, and the threads that read its output to the end.
    fn spawn(&self, arguments: &[&str]) -> (Process, Vec<JoinHandle<()>>) {
        let mut command = Command::new(&self.binary);
        command.args(arguments).env_clear().envs(&self.env);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Process::start(&mut command).expect("the binary can be started");
        let stdout = process.child().stdout.take().expect("stdout is piped");
        let stderr = process.child().stderr.take().expect("stderr is piped");
        (process, vec![self.log.follow(stdout), self.log.follow(stderr)])
    }
}

pub struct Service {
    process: Process,
    readers: Vec<JoinHandle<()>>,
    plan: Plan,
    addresses: BTreeMap<String, SocketAddr>,
    client: Client,
}

impl Service {
    pub fn public(&self) -> SocketAddr {
        self.addresses["public"]
    }

    pub fn internal(&self) -> SocketAddr {
        self.addresses["internal"]
    }

    pub fn ops(&self) -> SocketAddr {
        self.addresses["ops"]
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.public())
    }

    pub fn stream(&self, user: &TestUser) -> StreamRequest {
        self.anonymous_stream().bearer(&user.token)
    }

    pub fn anonymous_stream(&self) -> StreamRequest {
        StreamRequest::new(self.url("/api/messages"))
    }

    pub fn log(&self) -> &Log {
        &self.plan.log
    }

    pub async fn is_ready(&self) -> bool {
        self.readiness().await.is_some_and(|(status, _)| status == 200)
    }

    pub async fn until_ready(&self) {
        until(&format!("{} is ready", self.plan.log.name), || self.is_ready()).await;
    }

    pub async fn readiness(&self) -> Option<(u16, String)> {
        self.get_ops("/readyz").await.map(|answer| (answer.status, answer.text()))
    }

    async fn get_ops(&self, path: &str) -> Option<Answer> {
        // On a new connection: an idle one may have been closed.
        let call = self.client.get(format!("http://{}{path}", self.ops())).header("connection", "close");
        call.send().await.ok()
    }

    /// As [`Answer::metric`]; 0 if there is no such series.
    pub async fn metric(&self, series: &str) -> f64 {
        self.get_ops("/metrics").await.expect("the ops listener answers").metric(series).unwrap_or_default()
    }

    pub async fn metric_where(&self, name: &str, label: &str) -> f64 {
        self.metric(&format!("{name}{{{label}}}")).await
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }

    pub fn terminate(&mut self) {
        self.process.signal(Signal::SIGTERM);
    }

    pub fn freeze(&mut self) {
        self.process.signal(Signal::SIGSTOP);
    }

    pub fn thaw(&mut self) {
        self.process.signal(Signal::SIGCONT);
    }

    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.ended()
    }

    pub async fn wait(&mut self) -> ExitStatus {
        soon(&format!("{} ends", self.plan.log.name), self.process.wait()).await
    }

    /// Kills it and starts it at the same addresses, as a supervisor does.
    pub async fn restart(&mut self) {
        self.kill();
        let mut plan = self.plan.clone();
        for (name, address) in &self.addresses {
            let setting = match name.as_str() {
                "public" => "LISTEN".to_owned(),
                other => format!("{}_LISTEN", other.to_uppercase()),
            };
            plan.env.insert(setting, address.to_string());
        }
        *self = plan.start().await;
    }

    /// Stops it in order and starts it at the same addresses with another setting, as a deploy does.
    pub async fn redeploy(&mut self, name: &str, value: impl ToString) {
        self.plan.env.insert(name.into(), value.to_string());
        self.terminate();
        self.wait().await;
        self.restart().await;
        self.until_ready().await;
    }

    pub fn memory(&self) -> io::Result<Memory> {
        Memory::of(self.process.id())
    }

    pub fn cpu(&self) -> io::Result<Cpu> {
        Cpu::of(self.process.id())
    }

    async fn listening(&mut self, before: usize) {
        let wanted: &[&str] = match self.plan.log.name.split('-').next() {
            Some("api") => &["public", "internal", "ops"],
            _ => &["public", "ops"],
        };
        while !wanted.iter().all(|name| self.addresses.contains_key(*name)) {
            if let Some(status) = self.process.ended() {
                // Its last lines may still be in the pipes.
                self.readers.drain(..).for_each(|reader| reader.join().expect("a reader does not panic"));
                let Log { name, .. } = &*self.plan.log;
                panic!("{name} ended with {status} at its start: {:#?}", self.plan.log.lines());
            }
            for line in self.plan.log.lines().iter().skip(before) {
                let Ok(line) = serde_json::from_str::<Value>(line) else { continue };
                if line["message"] == "listening"
                    && let (Some(name), Some(address)) = (line["name"].as_str(), line["address"].as_str())
                {
                    self.addresses.insert(name.into(), address.parse().expect("the log names an address"));
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.process.kill();
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}
