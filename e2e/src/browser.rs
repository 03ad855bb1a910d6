//! A real Chromium: contexts (each with cookies of its own), their pages, and what these reported. `browser/driver.mjs` drives it
//! and calls Playwright by name, so that tests can call what has no method here.
//!
//! Errors, exceptions, dialogs and policy violations of a page fail the test at its end, unless the test expects
//! them. A failed test leaves screenshots of its pages in `target/screenshots/failed`.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fmt,
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    net::IpAddr,
    path::{Path, PathBuf},
    process::{ChildStdin, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::{PATIENCE, node, process::Process, programs, usage, user::TestUser};
use tokio::{runtime::Handle, sync::oneshot, task::block_in_place};

/// Browsers at the same time, over all test processes; each one is a dozen processes.
const AT_ONCE: usize = 2;

/// Milliseconds that an action waits for its element.
const ACTION_PATIENCE: u64 = 20_000;

/// Between two looks at a page.
pub const POLL: Duration = Duration::from_millis(30);

const END_WITHIN: Duration = Duration::from_secs(5);

#[derive(Debug, Clone)]
pub struct PageReport {
    page: u64,
    pub kind: String,
    pub text: String,
    /// Where it happened; of a response and a failed request: its URL.
    pub url: String,
}

impl PageReport {
    fn is_problem(&self) -> bool {
        matches!(self.kind.as_str(), "console.error" | "exception" | "dialog")
    }
}

impl fmt::Display for PageReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.kind, self.text, self.url)
    }
}

type Waiting = oneshot::Sender<Result<Value, String>>;

struct Driver {
    /// None once it is closing.
    stdin: Mutex<Option<ChildStdin>>,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, Waiting>>,
    happenings: Mutex<Vec<PageReport>>,
    complaints: Mutex<Vec<String>>,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Driver {
    async fn call(&self, on: u64, chain: Value) -> Result<Value, String> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (waiting, answered) = oneshot::channel();
        held(&self.waiting).insert(id, waiting);
        let line = format!("{}\n", json!({ "id": id, "on": on, "chain": chain }));
        let written = held(&self.stdin).as_mut().map(|stdin| stdin.write_all(line.as_bytes()));
        if !matches!(written, Some(Ok(()))) {
            held(&self.waiting).remove(&id);
        }
        match tokio::time::timeout(PATIENCE, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(format!("the driver ended: {:#?}", held(&self.complaints))),
            Err(_) => Err(format!("no answer within {PATIENCE:?}")),
        }
    }

    /// For `drop`, which cannot await.
    fn call_blocking(&self, on: u64, chain: Value) -> Result<Value, String> {
        block_in_place(|| Handle::current().block_on(self.call(on, chain)))
    }

    fn read(&self, line: &str) {
        let Ok(line) = serde_json::from_str::<Value>(line) else { return };
        let text = |name: &str| line[name].as_str().unwrap_or_default().to_owned();
        if let Some(page) = line["page"].as_u64() {
            let happening = PageReport { page, kind: text("kind"), text: text("text"), url: text("url") };
            held(&self.happenings).push(happening);
        } else if let Some(waiting) = line["id"].as_u64().and_then(|id| held(&self.waiting).remove(&id)) {
            let result = if line["error"].is_string() { Err(text("error")) } else { Ok(line["ok"].clone()) };
            let _ = waiting.send(result);
        }
    }
}

pub struct Browser {
    driver: Arc<Driver>,
    process: Process,
    reader: Option<JoinHandle<()>>,
    /// Closed when the driver's output ends.
    silent: Receiver<()>,
    _folder: TempDir,
    _slot: File,
}

impl Browser {
    /// Waits for a free slot first: launch the browser before anything else, and drop it last.
    pub async fn launch() -> Self {
        let program = programs::program("DEV_CHROMIUM", "Chromium", "Debian: apt install chromium");
        let slot = slot().await;
        let folder = tempfile::Builder::new().prefix("test-browser-").tempdir().expect("a temporary folder");
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("browser");
        let mut command = node::script(&scripts, "driver.mjs");
        command.arg(program).env("TMPDIR", folder.path()).stderr(Stdio::piped());
        let mut process = Process::start(&mut command).expect("node starts: install Node.js 20 or later");
        let stdin = process.child().stdin.take().expect("stdin is piped");
        let stdout = process.child().stdout.take().expect("stdout is piped");
        let stderr = process.child().stderr.take().expect("stderr is piped");
        let driver = Arc::new(Driver {
            stdin: Mutex::new(Some(stdin)),
            next: AtomicU64::new(0),
            waiting: Mutex::default(),
            happenings: Mutex::default(),
            complaints: Mutex::default(),
        });
        let (speaking, silent) = sync_channel(0);
        let reader = std::thread::spawn({
            let driver = driver.clone();
            move || {
                let _speaking = speaking;
                BufReader::new(stdout).lines().map_while(Result::ok).for_each(|line| driver.read(&line));
                // Pending calls fail.
                held(&driver.waiting).clear();
            }
        });
        std::thread::spawn({
            let driver = driver.clone();
            move || {
                let lines = BufReader::new(stderr).lines().map_while(Result::ok);
                lines.for_each(|line| held(&driver.complaints).push(line));
            }
        });
        let browser = Self { driver, process, reader: Some(reader), silent, _folder: folder, _slot: slot };
        if let Err(error) = browser.driver.call(0, json!([["version"]])).await {
            panic!("the browser does not start: {error}");
        }
        browser
    }

    pub fn peers(&self) -> BTreeSet<IpAddr> {
        let mut family = vec![self.process.id()];
        let mut inodes = HashSet::new();
        while let Some(pid) = family.pop() {
            family.extend(usage::children(pid).unwrap_or_default());
            let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            inodes.extend(files.filter_map(|file| {
                let target = fs::read_link(file.path()).ok()?;
                Some(target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
            }));
        }
        let tables = ["tcp", "tcp6", "udp", "udp6"]
            .map(|table| fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default());
        let lines = tables.iter().flat_map(|table| table.lines());
        let lines = lines.map(|line| line.split_whitespace().collect::<Vec<_>>());
        let ours = lines.filter(|fields| fields.get(9).is_some_and(|inode| inodes.contains(*inode)));
        ours.map(|fields| peer(fields[2]).expect("the kernel's own notation").to_canonical()).collect()
    }

    /// A browser profile of its own, at this origin.
    pub async fn context(&self, who: &str, origin: &str) -> BrowserContext {
        self.context_with(who, origin, json!({})).await
    }

    /// With options of Playwright's `newContext`: a window's size, a theme, a language.
    pub async fn context_with(&self, who: &str, origin: &str, mut options: Value) -> BrowserContext {
        options["baseURL"] = origin.into();
        // The tests' certificates are self-signed.
        options["ignoreHTTPSErrors"] = true.into();
        let made = self.driver.call(0, json!([["newContext", options]])).await;
        let number = number(made.unwrap_or_else(|error| panic!("{who}: {error}")));
        let context = BrowserContext(Arc::new(Inner {
            driver: self.driver.clone(),
            number,
            who: who.to_owned(),
            origin: origin.to_owned(),
            pages: Mutex::default(),
            expected: Mutex::default(),
        }));
        context.call(json!([["setDefaultTimeout", ACTION_PATIENCE]])).await;
        context
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        drop(held(&self.driver.stdin).take());
        // Its output ends when it has shut down in order.
        let _ = self.silent.recv_timeout(END_WITHIN);
        self.process.kill();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// Reads `0100007F:1F90`: 32-bit words in native byte order, and a port.
fn peer(address: &str) -> Option<IpAddr> {
    let (words, _) = address.split_once(':')?;
    let words = words.as_bytes().chunks(8).map(|word| {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        Some(word.to_ne_bytes())
    });
    let bytes = words.collect::<Option<Vec<_>>>()?.concat();
    match <[u8; 4]>::try_from(&bytes[..]) {
        Ok(bytes) => Some(bytes.into()),
        Err(_) => Some(<[u8; 16]>::try_from(bytes).ok()?.into()),
    }
}

async fn slot() -> File {
    let folder = programs::build_folder();
    let files = (0..AT_ONCE).map(|number| {
        let path = folder.join(format!("browser-{number}.lock"));
        File::options().create(true).append(true).open(path).expect("a file beside the tests' programs")
    });
    let mut files: Vec<_> = files.collect();
    // Unbounded, because each test that holds a slot is bounded.
    loop {
        if let Some(free) = files.iter().position(|file| file.try_lock().is_ok()) {
            return files.swap_remove(free);
        }
        tokio::time::sleep(POLL).await;
    }
}

fn number(made: Value) -> u64 {
    made["$"].as_u64().unwrap_or_else(|| panic!("an object was expected, not {made}"))
}

/// Pages that share cookies and storage. Dropped, it closes them and fails the test if they had problems.
pub struct BrowserContext(Arc<Inner>);

struct Inner {
    driver: Arc<Driver>,
    number: u64,
    who: String,
    origin: String,
    pages: Mutex<Vec<u64>>,
    expected: Mutex<Vec<String>>,
}

impl BrowserContext {
    /// Anything that Playwright's `BrowserContext` can do.
    pub async fn call(&self, chain: Value) -> Value {
        let called = self.0.driver.call(self.0.number, chain.clone()).await;
        called.unwrap_or_else(|error| panic!("{}: {chain}: {error}", self.0.who))
    }

    pub async fn page(&self) -> WebPage {
        let number = number(self.call(json!([["newPage"]])).await);
        held(&self.0.pages).push(number);
        WebPage { context: self.0.clone(), number }
    }

    pub async fn open(&self, path: &str) -> WebPage {
        let page = self.page().await;
        page.goto(path).await;
        page
    }

    pub async fn sign_in(&self, user: &TestUser) {
        let (name, value) = user.cookie.split_once('=').expect("a cookie is name=value");
        let cookie = json!({
            "name": name, "value": value, "url": self.0.origin, "httpOnly": true, "sameSite": "Lax",
            "secure": self.0.origin.starts_with("https:"),
        });
        self.call(json!([["addCookies", [cookie]]])).await;
    }

    pub async fn set_offline(&self, offline: bool) {
        self.call(json!([["setOffline", offline]])).await;
    }

    pub fn expect(&self, part: &str) {
        held(&self.0.expected).push(part.to_owned());
    }
}

impl Inner {
    fn happenings(&self) -> Vec<PageReport> {
        let pages = held(&self.pages);
        let all = held(&self.driver.happenings);
        all.iter().filter(|happening| pages.contains(&happening.page)).cloned().collect()
    }

    fn problems(&self) -> Vec<PageReport> {
        let expected = held(&self.expected);
        let mut problems = self.happenings();
        problems.retain(|problem| {
            let line = problem.to_string();
            problem.is_problem() && !expected.iter().any(|part| line.contains(part))
        });
        problems
    }

    #[expect(clippy::print_stdout, reason = "the test runner shows it under the failed test's name")]
    fn describe(&self) {
        let happenings = self.happenings();
        println!("--- {}: the last of {} happenings", self.who, happenings.len());
        happenings.iter().skip(happenings.len().saturating_sub(60)).for_each(|line| println!("{line}"));
        let folder = screenshots().join("failed");
        let test = std::thread::current().name().unwrap_or("test").replace("::", "-");
        for (tab, page) in held(&self.pages).iter().enumerate() {
            let path = folder.join(format!("{test}-{}-{tab}.png", self.who));
            let options = json!({ "path": path, "timeout": 3_000 });
            if self.driver.call_blocking(*page, json!([["screenshot", options]])).is_ok() {
                println!("tab {tab}: {}", path.display());
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.describe();
        }
        // Afterwards its pages report nothing more, and services may end.
        let _ = self.driver.call_blocking(self.number, json!([["close"]]));
        let problems = self.problems();
        if !std::thread::panicking() && !problems.is_empty() {
            let lines: Vec<_> = problems.iter().map(PageReport::to_string).collect();
            panic!("{} had unexpected problems:\n{}", self.who, lines.join("\n"));
        }
    }
}

pub fn screenshots() -> PathBuf {
    programs::build_folder().parent().expect("target/<profile> lies in target").join("screenshots")
}

pub struct WebPage {
    context: Arc<Inner>,
    number: u64,
}

impl WebPage {
    /// Anything that Playwright's `Page` can do, step by step: `[["locator", "li"], ["first"], ["click"]]`.
    pub async fn call(&self, chain: Value) -> Value {
        let called = self.try_call(chain.clone()).await;
        called.unwrap_or_else(|error| panic!("{}: {chain}: {error}", self.context.who))
    }

    pub async fn try_call(&self, chain: Value) -> Result<Value, String> {
        self.context.driver.call(self.number, chain).await
    }

    pub async fn goto(&self, path: &str) {
        self.call(json!([["goto", path]])).await;
    }

    pub async fn reload(&self) {
        self.call(json!([["reload"]])).await;
    }

    /// The back button. A page from the back-forward cache is not loaded again, so this waits for nothing.
    pub async fn back(&self) {
        self.call(json!([["evaluate", "setTimeout(() => history.back())"]])).await;
    }

    pub async fn evaluate(&self, expression: &str) -> Value {
        self.call(json!([["evaluate", expression]])).await
    }

    /// Waits until the expression is true, also over reloads.
    pub async fn wait_for(&self, what: &str, expression: &str) {
        let deadline = Instant::now() + PATIENCE;
        let mut last = Err(String::new());
        while Instant::now() < deadline {
            last = self.try_call(json!([["evaluate", format!("Boolean({expression})")]])).await;
            if last == Ok(Value::Bool(true)) {
                return;
            }
            tokio::time::sleep(POLL).await;
        }
        panic!("{}: waited {PATIENCE:?} in vain: {what} ({expression}: {last:?})", self.context.who);
    }

    pub fn css(&self, selector: &str) -> Locator<'_> {
        self.locator(json!(["locator", selector]))
    }

    pub fn role(&self, role: &str, name: &str) -> Locator<'_> {
        self.locator(json!(["getByRole", role, { "name": name, "exact": true }]))
    }

    pub fn text(&self, text: &str) -> Locator<'_> {
        self.locator(json!(["getByText", text, { "exact": true }]))
    }

    fn locator(&self, step: Value) -> Locator<'_> {
        Locator { page: self, chain: vec![step] }
    }

    /// `Enter`, `Shift+Tab`
    pub async fn press(&self, key: &str) {
        self.call(json!([["keyboard"], ["press", key]])).await;
    }

    pub async fn type_text(&self, text: &str) {
        self.call(json!([["keyboard"], ["type", text]])).await;
    }

    pub async fn screenshot(&self, name: &str) {
        let path = screenshots().join(format!("{name}.png"));
        self.call(json!([["screenshot", { "path": path }]])).await;
    }

    pub async fn cdp(&self, method: &str, parameters: Value) -> Value {
        let page = json!({ "$": self.number });
        let chain = json!([["context"], ["newCDPSession", page], ["send", method, parameters]]);
        self.call(chain).await
    }

    /// Hides the tab and puts it to sleep: none of its scripts runs any more.
    pub async fn freeze(&self) {
        self.believe_to_be_looked_at(false).await;
        self.window("minimized").await;
        self.cdp("Page.setWebLifecycleState", json!({ "state": "frozen" })).await;
        self.wait_for("it is hidden", "document.visibilityState === 'hidden'").await;
    }

    pub async fn thaw(&self) {
        self.cdp("Page.setWebLifecycleState", json!({ "state": "active" })).await;
        self.window("normal").await;
        self.believe_to_be_looked_at(true).await;
        self.wait_for("it is seen", "document.visibilityState === 'visible'").await;
    }

    /// Playwright makes every page believe that it has the focus, and has no public way to change that.
    async fn believe_to_be_looked_at(&self, yes: bool) {
        let page = json!({ "$": self.number });
        let send = json!(["send", "Emulation.setFocusEmulationEnabled", { "enabled": yes }]);
        let session = json!(["_mainFrameSession"]);
        self.call(json!([["_connection"], ["toImpl", page], ["delegate"], session, ["_client"], send])).await;
    }

    async fn window(&self, state: &str) {
        let window = self.cdp("Browser.getWindowForTarget", json!({})).await["windowId"].clone();
        let bounds = json!({ "windowId": window, "bounds": { "windowState": state } });
        self.cdp("Browser.setWindowBounds", bounds).await;
    }

    /// Serious or worse findings of the accessibility engine.
    pub async fn axe(&self) -> Vec<String> {
        if self.evaluate("'axe' in window").await == false {
            let source =
                Path::new(env!("CARGO_MANIFEST_DIR")).join("browser/node_modules/axe-core/axe.min.js");
            let source = fs::read_to_string(source).expect("axe-core is installed with the driver");
            self.evaluate(&format!("{source}; null")).await;
        }
        let run = "axe.run({ resultTypes: ['violations'] }).then(({ violations }) => violations
            .filter(({ impact }) => impact === 'serious' || impact === 'critical')
            .map(({ id, help, nodes }) => `${id}: ${help}: ${nodes.map((node) => `${node.target} ${node.failureSummary}`).join(' | ')}`))";
        let found = self.evaluate(run).await;
        found.as_array().into_iter().flatten().filter_map(|line| Some(line.as_str()?.to_owned())).collect()
    }

    pub fn happenings(&self) -> Vec<PageReport> {
        let all = held(&self.context.driver.happenings);
        all.iter().filter(|happening| happening.page == self.number).cloned().collect()
    }

    pub fn statuses(&self, part: &str) -> Vec<u16> {
        let mut happenings = self.happenings();
        happenings.retain(|happening| happening.kind == "response" && happening.url.contains(part));
        happenings.iter().filter_map(|happening| happening.text.parse().ok()).collect()
    }

    pub async fn close(self) {
        self.call(json!([["close"]])).await;
    }
}

#[derive(Clone)]
pub struct Locator<'a> {
    page: &'a WebPage,
    chain: Vec<Value>,
}

impl Locator<'_> {
    pub fn css(self, selector: &str) -> Self {
        self.step(json!(["locator", selector]))
    }

    pub fn role(self, role: &str, name: &str) -> Self {
        self.step(json!(["getByRole", role, { "name": name, "exact": true }]))
    }

    pub fn first(self) -> Self {
        self.step(json!(["first"]))
    }

    pub fn last(self) -> Self {
        self.step(json!(["last"]))
    }

    pub fn with_text(self, text: &str) -> Self {
        self.step(json!(["filter", { "hasText": text }]))
    }

    fn step(mut self, step: Value) -> Self {
        self.chain.push(step);
        self
    }

    pub async fn call(&self, step: Value) -> Value {
        let mut chain = self.chain.clone();
        chain.push(step);
        self.page.call(Value::Array(chain)).await
    }

    pub async fn click(&self) {
        self.call(json!(["click"])).await;
    }

    pub async fn fill(&self, text: &str) {
        self.call(json!(["fill", text])).await;
    }

    pub async fn press(&self, key: &str) {
        self.call(json!(["press", key])).await;
    }

    pub async fn appears(&self) {
        self.call(json!(["waitFor", { "state": "visible" }])).await;
    }

    pub async fn disappears(&self) {
        self.call(json!(["waitFor", { "state": "hidden" }])).await;
    }

    pub async fn text(&self) -> String {
        string(&self.call(json!(["textContent"])).await)
    }

    pub async fn texts(&self) -> Vec<String> {
        self.call(json!(["allTextContents"])).await.as_array().into_iter().flatten().map(string).collect()
    }

    pub async fn value(&self) -> String {
        string(&self.call(json!(["inputValue"])).await)
    }

    pub async fn count(&self) -> u64 {
        self.call(json!(["count"])).await.as_u64().expect("a number")
    }
}

fn string(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
