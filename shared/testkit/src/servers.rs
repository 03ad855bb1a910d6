//! Private Redis and Postgres servers that a test may kill, wipe, freeze and start again on the same port.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::{
    PATIENCE,
    ports::free_port,
    postmaster,
    process::{Account, Process, Signal},
    programs,
    tls::Authority,
};

/// Keeps nothing on disk: a restart is a wipe, except of a cluster's or a sentinel's own state.
pub struct Redis {
    port: u16,
    folder: TempDir,
    arguments: Vec<String>,
    login: Option<(String, String)>,
    process: Process,
}

impl Redis {
    pub fn start() -> Self {
        Self::start_with(|_| Vec::new())
    }

    pub(crate) fn start_with(arguments: impl Fn(&Path) -> Vec<String>) -> Self {
        // The port may be taken in between.
        for _ in 0..5 {
            let (port, folder) = (free_port(), folder("redis"));
            let arguments = arguments(folder.path());
            if let Some(process) = start_redis(port, folder.path(), &arguments) {
                return Self { port, folder, arguments, login: None, process };
            }
        }
        panic!("the Redis server does not start");
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }

    pub fn restart(&mut self) {
        self.process.kill();
        self.process = start_redis(self.port, self.folder.path(), &self.arguments)
            .expect("the Redis server starts again");
    }

    pub fn freeze(&mut self) {
        self.process.signal(Signal::SIGSTOP);
    }

    pub fn thaw(&mut self) {
        self.process.signal(Signal::SIGCONT);
    }

    /// It cannot save any more, and answers `MISCONF` to every write and PING.
    pub async fn lose_disk(&self) {
        self.tell(&["CONFIG", "SET", "save", "3600 1"]);
        fs::remove_dir_all(self.folder.path()).expect("it is ours");
        let saving = self.command(&["BGSAVE"]).expect("the server answers");
        assert!(saving.starts_with("+Background saving started"), "{saving}");
        crate::until("Redis notices that it cannot save", || async {
            self.command(&["PING"]).is_ok_and(|answer| answer.starts_with("-MISCONF"))
        })
        .await;
    }

    pub fn log_in(&mut self, user: &str, password: &str) {
        self.login = Some((user.to_owned(), password.to_owned()));
    }

    /// The first line of the answer, or the content of a string.
    pub fn command(&self, words: &[&str]) -> io::Result<String> {
        let login = self.login.as_ref().map(|(user, password)| ["AUTH", user, password]);
        let commands = login.iter().map(|login| &login[..]).chain([words]);
        command_redis(self.port, commands)
    }

    /// Everything that it holds: its keys in its own format, uncompressed, the commands that it recorded, and what it knows of clients.
    pub fn dump(&self) -> String {
        self.tell(&["CONFIG", "SET", "rdbcompression", "no"]);
        self.tell(&["SAVE"]);
        let file = fs::read(self.folder.path().join("dump.rdb")).expect("it was saved just now");
        let mut all = String::from_utf8_lossy(&file).into_owned();
        for words in [&["SLOWLOG", "GET", "-1"][..], &["CLIENT", "LIST"], &["INFO", "ALL"], &["ACL", "LOG"]] {
            all.push_str(&answer_of_redis(self.port, words).expect("the server answers"));
        }
        all
    }

    pub fn tell(&self, words: &[&str]) {
        let answer = self.command(words).expect("the server answers");
        assert_eq!(answer, "+OK", "{words:?}");
    }
}

fn start_redis(port: u16, folder: &Path, arguments: &[String]) -> Option<Process> {
    let program = programs::redis();
    let mut command = Command::new(&program);
    // A sentinel's configuration file comes first.
    let (file, options): (Vec<_>, Vec<_>) =
        arguments.iter().partition(|argument| argument.ends_with(".conf"));
    command
        .args(file)
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .args(["--dir", &folder.display().to_string()])
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut process = Process::start(&mut command)
        .unwrap_or_else(|error| panic!("no Redis server: {} cannot be started ({error})", program.display()));
    let up = || {
        let ping: &[&str] = &["PING"];
        command_redis(port, [ping]).is_ok_and(|answer| answer == "+PONG" || answer.starts_with("-NOAUTH"))
    };
    wait_for(&mut process, up).then_some(process)
}

/// `false`: the process ended instead.
fn wait_for(process: &mut Process, up: impl Fn() -> bool) -> bool {
    let mut is_up = false;
    wait("the server is up", || {
        is_up = up();
        is_up || process.ended().is_some()
    });
    is_up
}

/// As [`crate::until`], without a runtime.
pub(crate) fn wait(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn command_redis<'a>(port: u16, commands: impl IntoIterator<Item = &'a [&'a str]>) -> io::Result<String> {
    let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut answers = BufReader::new(socket.try_clone()?);
    let mut answer = String::new();
    for words in commands {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        socket.write_all(request.as_bytes())?;
        answer.clear();
        if answers.read_line(&mut answer)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(length) = answer.strip_prefix('$').and_then(|length| length.trim_end().parse().ok()) {
            let mut text = vec![0; length];
            answers.read_exact(&mut text)?;
            answers.read_line(&mut String::new())?;
            answer = String::from_utf8_lossy(&text).into_owned();
        }
    }
    Ok(answer.trim_end().to_owned())
}

/// The whole answer, as it is on the wire.
fn answer_of_redis(port: u16, words: &[&str]) -> io::Result<String> {
    let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    socket.set_read_timeout(Some(Duration::from_secs(30)))?;
    for words in [words, &["QUIT"]] {
        socket.write_all(format!("*{}\r\n", words.len()).as_bytes())?;
        for word in words {
            socket.write_all(format!("${}\r\n{word}\r\n", word.len()).as_bytes())?;
        }
    }
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// One superuser `postgres`, trusted on loopback. Syncs to disk: a kill must lose nothing that was committed.
pub struct Postgres {
    port: u16,
    folder: TempDir,
    settings: Vec<String>,
    process: Process,
}

impl Postgres {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    pub fn start_with(settings: &[&str]) -> Self {
        Self::start_in(folder("postgres"), settings.iter().map(|&setting| setting.to_owned()).collect())
    }

    pub fn start_with_tls(authority: &Authority) -> Self {
        let folder = folder("postgres");
        let mut settings = vec!["ssl=on".to_owned()];
        for (setting, source) in
            [("ssl_cert_file", authority.server_certificate()), ("ssl_key_file", authority.server_key())]
        {
            let own = folder.path().join(setting);
            fs::copy(source, &own).expect("the authority's files can be read");
            // Postgres requires a key that only its owner can read.
            fs::set_permissions(&own, fs::Permissions::from_mode(0o600)).expect("the copy is ours");
            give_away(&own);
            settings.push(format!("{setting}={}", own.display()));
        }
        Self::start_in(folder, settings)
    }

    fn start_in(folder: TempDir, settings: Vec<String>) -> Self {
        give_away(folder.path());
        let output = command_in(folder.path(), "initdb")
            .args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "-D"])
            .arg(folder.path().join("data"))
            .output()
            .unwrap_or_else(|error| panic!("no Postgres server: initdb cannot be started ({error})"));
        assert!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
        for _ in 0..5 {
            let port = free_port();
            if let Some(process) = start_postgres(port, folder.path(), &settings) {
                return Self { port, folder, settings, process };
            }
        }
        panic!("the Postgres server does not start: {}", log_of(folder.path()));
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    pub fn log(&self) -> String {
        log_of(self.folder.path())
    }

    /// `pg_dump` of a database of this server.
    pub fn dump(&self, url: &str) -> String {
        let output =
            command_in(self.folder.path(), "pg_dump").arg(url).output().expect("pg_dump can be started");
        assert!(output.status.success(), "pg_dump: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("a dump is UTF-8, as its database")
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// A crash: no checkpoint, no goodbye to clients. Returns when the port is closed: a child that the server has just
    /// forked still listens, too.
    pub fn kill(&mut self) {
        self.process.kill();
        wait("the port of a killed Postgres is closed", || TcpStream::connect(self.address()).is_err());
    }

    /// On the same port, with everything that was committed.
    pub fn restart(&mut self) {
        self.kill();
        // The children of a killed server hold its memory for a moment.
        let mut started = None;
        wait("a killed Postgres starts again", || {
            started = start_postgres(self.port, self.folder.path(), &self.settings);
            started.is_some()
        });
        self.process = started.expect("it was waited for");
    }
}

fn start_postgres(port: u16, folder: &Path, settings: &[String]) -> Option<Process> {
    let log = fs::OpenOptions::new().create(true).append(true).open(folder.join("log")).expect("a log file");
    let mut command = command_in(folder, "postgres");
    command
        .arg("-D")
        .arg(folder.join("data"))
        .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-c", "unix_socket_directories="])
        .args(["-c", "max_connections=100", "-c", "shared_buffers=32MB"])
        .args(settings.iter().flat_map(|setting| ["-c", setting]))
        .stdout(Stdio::null())
        .stderr(log);
    let mut process = Process::start(&mut command).expect("initdb ran, so its server can be started");
    let id = process.id();
    let ready = || postmaster::ready(&folder.join("data")).is_some_and(|server| server == (id, port));
    wait_for(&mut process, ready).then_some(process)
}

fn command_in(folder: &Path, name: &str) -> Command {
    let mut command = Command::new(programs::postgres().join(name));
    account_of(folder).run(&mut command);
    command.current_dir(folder).stdin(Stdio::null());
    command
}

fn account_of(folder: &Path) -> Account {
    Account::for_data(folder).expect("an account for Postgres")
}

fn give_away(path: &Path) {
    account_of(path).own(path).expect("root may give anything away");
}

fn log_of(folder: &Path) -> String {
    fs::read_to_string(folder.join("log")).unwrap_or_default()
}

fn folder(kind: &str) -> TempDir {
    tempfile::Builder::new().prefix(&format!("test-{kind}-")).tempdir().expect("a temporary folder")
}
