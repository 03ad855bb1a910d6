//! The real binary: its configuration, its commands and its shutdown.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};
use sqlx::PgPool;
use tempfile::NamedTempFile;
use testkit::{
    http::Client,
    panics,
    process::{Process, Signal},
    soon, until,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    raw,
    support::{PEM, SECRET, add_users, channel_prefix, execute, number, options, redis_url, text},
};

/// The soft limit of [`command`]'s process, less than the machine's hard limit.
const FEW_OPEN_FILES: f64 = 256.0;

pub(crate) fn command() -> Command {
    let mut command = Command::new("/bin/sh");
    command.env_clear();
    command.args([
        "-c",
        &format!(r#"ulimit -Sn {FEW_OPEN_FILES}; exec "$0" "$@""#),
        env!("CARGO_BIN_EXE_api"),
    ]);
    command
}

pub(crate) fn run(arguments: &[&str], variables: &[(&str, &str)]) -> (bool, String) {
    let Output { status, stdout, stderr } =
        command().args(arguments).envs(variables.iter().copied()).output().unwrap();
    let text = String::from_utf8(stdout).unwrap() + &String::from_utf8(stderr).unwrap();
    (status.success(), text)
}

#[track_caller]
pub(crate) fn assert_says(said: &str, parts: &[&str]) {
    for part in parts {
        assert!(said.contains(part), "{part} is missing in {said}");
    }
}

#[test]
fn all_configuration_problems_are_reported_together() {
    let invalid = [
        ("LISTEN", "here"),
        ("DATABASE_URL", "mysql://me:hunter2@db/x"),
        ("REDIS_URL", "hunter2"),
        ("INTERNAL_SECRET", "hunter2"),
        ("STATE_SECRET", "hunter2"),
        ("DATABASE_POOL_SIZE", "0"),
        ("TOKEN_LIFETIME_SECONDS", "1209601"),
        ("DEV_LOGIN", "true"),
        ("FEED_KEEP_DAYS", "-1"),
        ("LOG_FORMAT", "xml"),
        ("GITHUB_URL", "http://hunter2.example"),
        ("CALLBACK_TOKEN_IN_QUERY", "hunter2"),
    ];
    let incomplete = [
        ("ORIGIN", "https://chat.example"),
        ("GITHUB_CLIENT_SECRET", "hunter2"),
        ("OIDC_ISSUER", "https://hunter2.example"),
    ];
    let (success, said) = run(&[], &[&invalid[..], &incomplete].concat());
    assert!(!success && said.contains("16 problem(s)") && !said.contains("hunter2"), "{said}");
    assert_says(&said, &invalid.map(|(name, _)| name));
    for missing in ["SIGNING_KEY_FILES", "GITHUB_CLIENT_ID", "OIDC_CLIENT_ID", "OIDC_CLIENT_SECRET"] {
        assert_says(&said, &[&format!("{missing} is not set")]);
    }
}

#[test]
fn service_without_keys_or_secrets_does_not_start() {
    let (success, said) = run(&["serve"], &[]);
    assert!(!success);
    for name in ["DATABASE_URL", "REDIS_URL", "SIGNING_KEY_FILES", "INTERNAL_SECRET"] {
        assert_says(&said, &[&format!("{name} is not set")]);
    }
}

#[test]
fn secrets_are_read_from_files() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("{content}\n")).unwrap();
        path.display().to_string()
    };
    let missing = folder.path().join("missing").display().to_string();
    let files = [
        ("DATABASE_URL_FILE", file("database", "postgres://me:hunter2@db/x")),
        ("REDIS_URL_FILE", file("redis", "redis://:hunter2@redis")),
        ("INTERNAL_SECRET_FILE", file("internal", SECRET)),
        ("SIGNING_KEY_FILES", file("key", &PEM)),
        ("OIDC_ISSUER", "https://id.example".to_owned()),
        ("OIDC_CLIENT_ID", "messenger".to_owned()),
        ("OIDC_CLIENT_SECRET_FILE", file("oidc", "hunter2")),
        ("STATE_SECRET_FILE", file("state", SECRET)),
    ];
    let check = |more: &[(&str, &str)]| {
        let given = files.iter().map(|(name, value)| (*name, value.as_str()));
        run(&["check-config"], &given.chain(more.iter().copied()).collect::<Vec<_>>())
    };
    let (success, said) = check(&[]);
    assert!(success, "{said}");
    let (success, said) = check(&[
        ("DATABASE_URL", "postgres://me:hunter2@db/x"),
        ("INTERNAL_SECRET_FILE", &missing),
        ("OIDC_CLIENT_SECRET_FILE", &missing),
        ("OTEL_EXPORTER_OTLP_HEADERS_FILE", &missing),
        ("REDIS_SENTINELS_FILE", &missing),
    ]);
    assert!(!success && !said.contains("hunter2"), "{said}");
    assert_says(&said, &["5 problem(s)", "DATABASE_URL and DATABASE_URL_FILE are both set"]);
    for name in ["INTERNAL_SECRET", "OIDC_CLIENT_SECRET", "OTEL_EXPORTER_OTLP_HEADERS", "REDIS_SENTINELS"] {
        assert_says(&said, &[&format!("{name}_FILE: /")]);
    }
}

#[test]
fn help_names_every_variable_and_no_secret() {
    let settings: Vec<String> = api::config::rows().into_iter().map(|setting| setting.name).collect();
    assert!(settings.len() > 50);
    let values: Vec<_> = settings.iter().map(|name| (name.as_str(), "hunter2")).collect();
    let (success, said) = run(&["--help"], &values);
    assert!(success && !said.contains("hunter2"), "{said}");
    for name in &settings {
        assert_says(&said, &[&format!("[env: {name}")]);
    }
    assert_says(
        &said,
        &["serve", "migrate", "new-epoch", "prune", "check-config", "service-token", "healthcheck"],
    );
}

pub(crate) fn key_file() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(&file, &*PEM).unwrap();
    file
}

pub(crate) fn database_url(pool: &PgPool) -> String {
    let options = options(pool);
    let base = std::env::var_os("DATABASE_URL").unwrap().into_string().unwrap();
    let (server, _) = base.rsplit_once('/').unwrap();
    format!("{server}/{}", options.get_database().unwrap())
}

pub(crate) struct Server {
    pub(crate) process: Process,
    pub(crate) public: String,
    pub(crate) ops: String,
    log: Option<std::thread::JoinHandle<String>>,
    _key: NamedTempFile,
}

impl Server {
    /// Stops it in order; returns what it logged.
    pub(crate) async fn stop(mut self) -> String {
        self.process.signal(Signal::SIGTERM);
        assert_eq!(soon("the process ends", self.process.wait()).await.code(), Some(0));
        let log = self.log.take().unwrap();
        tokio::task::spawn_blocking(|| log.join().unwrap()).await.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panics::assert_none();
        }
    }
}

/// With more settings.
pub(crate) fn serve(pool: &PgPool, settings: &[(&str, &str)]) -> Server {
    serve_from(&database_url(pool), settings)
}

pub(crate) fn serve_from(url: &str, settings: &[(&str, &str)]) -> Server {
    for _ in 0..2 {
        let (success, said) = run(&["migrate"], &[("DATABASE_URL", url)]);
        assert!(success, "{said}");
    }
    let key = key_file();
    let anywhere = "127.0.0.1:0";
    let mut command = command();
    command
        .args(["serve", "--dev-login", "--log-format", "json", "--log", "debug"])
        .args(["--listen", anywhere, "--internal-listen", anywhere, "--ops-listen", anywhere])
        .envs([("DATABASE_URL", url), ("REDIS_URL", &redis_url()), ("INTERNAL_SECRET", SECRET)])
        .envs([("CHANNEL_PREFIX", &*channel_prefix()), ("SHUTDOWN_WAIT_SECONDS", "0")])
        .env("SIGNING_KEY_FILES", key.path())
        .envs(settings.iter().copied())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut process = Process::start(&mut command).unwrap();
    panics::watch_child(process.child().stderr.take().unwrap());
    let mut lines = BufReader::new(process.child().stdout.take().unwrap()).lines();
    let mut address_of = |name: &str| loop {
        let line: Value =
            serde_json::from_str(&lines.next().expect("there is another line").unwrap()).unwrap();
        if line["message"] == "listening" && line["name"] == name {
            return format!("http://{}", line["address"].as_str().unwrap());
        }
    };
    let (public, _, ops) = (address_of("public"), address_of("internal"), address_of("ops"));
    // The pipe must be read, or the process would block on it.
    let secrets = [SECRET.to_owned(), "eyJ".to_owned(), "said in confidence".to_owned()];
    let log = std::thread::spawn(move || {
        let mut said = String::new();
        for line in lines.map_while(Result::ok) {
            assert!(!secrets.iter().any(|secret| line.contains(secret)), "a secret is in the log: {line}");
            said.push_str(&line);
            said.push('\n');
        }
        said
    });
    Server { process, public, ops, log: Some(log), _key: key }
}

#[sqlx::test(migrations = false)]
async fn sigterm_stops_the_service_in_order(pool: PgPool) {
    let mut server = serve(&pool, &[("SHUTDOWN_WAIT_SECONDS", "2")]);
    let client = Client::default();
    let ready =
        async || client.get(format!("{}/readyz", server.ops)).send().await.map(|answer| answer.status);
    until("it is ready", || async { matches!(ready().await, Ok(200)) }).await;
    add_users(&pool, ["john", "jane"]).await;
    let post = |path: &str, username: &str| {
        client.post(format!("{}{path}", server.public)).json(&json!({ "username": username }))
    };
    let login = async |username| text(&post("/api/login", username).expect(200).await.json()["token"]);
    let (token, first_used_late) = (login("john").await, login("jane").await);
    execute(&pool, "UPDATE messenger.sessions SET last_used_at = now() - interval '1 hour'").await;
    post("/api/conversations", "jane").bearer(&token).expect(201).await;

    // A request that began before the signal and outlasts the wait.
    let mut slow = raw::connect_to(&server.public).await;
    let body = r#"{"content":"said in confidence"}"#;
    let head = format!(
        "POST /api/conversations/1/messages HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    slow.write_all(head.as_bytes()).await.unwrap();
    slow.write_all(&body.as_bytes()[..5]).await.unwrap();

    server.process.signal(Signal::SIGTERM);
    until("it is unready", || async { matches!(ready().await, Ok(503)) }).await;
    // Still serving, while load balancers notice.
    client.get(format!("{}/api/auth_user", server.public)).bearer(&first_used_late).expect(200).await;
    let address = server.public.strip_prefix("http://").unwrap();
    until("no new connections are taken", || async {
        tokio::net::TcpStream::connect(address).await.is_err()
    })
    .await;
    slow.write_all(&body.as_bytes()[5..]).await.unwrap();
    let answer = raw::read_to_end(&mut slow).await.expect("what was begun is answered");
    assert_eq!(answer.status, 201);
    let status = soon("the process ends", server.process.wait()).await;
    assert_eq!(status.code(), Some(0));
    let used = "SELECT count(*) FROM messenger.sessions JOIN messenger.users ON users.id = user_id
                WHERE username = 'jane' AND last_used_at > now() - interval '30 minutes'";
    assert_eq!(number(&pool, used).await, 1, "the last requests count as use");
}

#[sqlx::test(migrations = false)]
async fn healthcheck_command_reports_liveness_and_readiness(pool: PgPool) {
    let mut server = serve(&pool, &[("SHUTDOWN_WAIT_SECONDS", "2")]);
    let address = server.ops.trim_start_matches("http://").to_owned();
    let healthcheck = |probe| run(&["healthcheck", probe], &[("OPS_LISTEN", &address)]);
    until("it is ready", || async { healthcheck("readyz") == (true, "api: ready\n".into()) }).await;
    server.process.signal(Signal::SIGTERM);
    until("it is stopping", || async { healthcheck("readyz") == (false, "api: stopping\n".into()) }).await;
    assert_eq!(healthcheck("livez"), (true, "api: alive\n".into()));
    soon("the process ends", server.process.wait()).await;
    let (healthy, said) = healthcheck("livez");
    assert!(!healthy && said.contains(&format!("{address} does not answer")), "{said}");
}

#[sqlx::test(migrations = false)]
async fn unfinished_request_does_not_delay_shutdown(pool: PgPool) {
    let server = serve(&pool, &[]);
    let mut idle = raw::connect_to(&server.public).await;
    idle.write_all(b"GET /.well-known/jwks.json HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut half = raw::connect_to(&server.public).await;
    half.write_all(
        b"POST /api/login HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n\
          content-type: application/json\r\ncontent-length: 9\r\n\r\n",
    )
    .await
    .unwrap();
    let mut waits = [0; 25];
    soon("the service waits for the body", half.read_exact(&mut waits)).await.unwrap();
    assert_eq!(&waits, b"HTTP/1.1 100 Continue\r\n\r\n");
    server.stop().await;
}

/// The ops listener stops last, when little of the shutdown's time is left.
#[sqlx::test(migrations = false)]
async fn unfinished_operator_request_does_not_delay_shutdown(pool: PgPool) {
    let server = serve(&pool, &[("SHUTDOWN_GRACE_SECONDS", "600")]);
    let mut half = raw::connect_to(&server.ops).await;
    half.write_all(b"PUT /log HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n")
        .await
        .unwrap();
    let mut waits = [0; 25];
    soon("the service waits for the body", half.read_exact(&mut waits)).await.unwrap();
    assert_eq!(&waits, b"HTTP/1.1 100 Continue\r\n\r\n");
    server.stop().await;
}

#[sqlx::test(migrations = false)]
async fn open_files_are_raised_and_operators_get_few(pool: PgPool) {
    let server = serve(&pool, &[("CONNECTIONS_PER_ADDRESS", "0")]);
    let mut idle = Vec::new();
    for _ in 0..service_kit::ops::CONNECTIONS + 6 {
        let mut connection = raw::connect_to(&server.ops).await;
        connection.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        soon("it is answered", connection.read_exact(&mut [0; 12])).await.unwrap();
        idle.push(connection);
    }
    let metrics = Client::default().get(format!("{}/metrics", server.ops)).expect(200).await.text();
    let value = |name: &str| {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().parse::<f64>().unwrap()
    };
    assert_eq!(value(r#"messenger_api_http_connections{listener="ops"}"#), 64.0);
    assert!(value("process_max_fds ") > FEW_OPEN_FILES, "{metrics}");
    server.stop().await;
}

#[test]
fn check_config_validates_without_serving() {
    let key = key_file();
    let good = [
        // Nothing listens there; the configuration is valid all the same.
        ("DATABASE_URL", "postgres://nobody@127.0.0.1:1/nothing"),
        ("REDIS_URL", "redis://127.0.0.1:1"),
        ("INTERNAL_SECRET", SECRET),
        ("SIGNING_KEY_FILES", key.path().to_str().unwrap()),
        ("TERMINATION_GRACE_SECONDS", "20"),
    ];
    let (success, said) = run(&["check-config"], &good);
    assert!(success && said.ends_with("api: the configuration is valid\n"), "{said}");
    assert!(said.contains("Postgres is unreachable; the database was not checked"), "{said}");
    let (success, said) = run(&["check-config"], &[&good[..], &[("SHUTDOWN_WAIT_SECONDS", "6")]].concat());
    assert!(!success);
    assert!(said.contains("TERMINATION_GRACE_SECONDS is 20") && said.contains("takes up to 21"), "{said}");
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn prune_command_deletes_expired_rows(pool: PgPool) {
    add_users(&pool, ["john", "jane"]).await;
    let rows = "
        INSERT INTO messenger.events (kind, created_at)
        SELECT 'conversation.read', now() - interval '40 days' FROM generate_series(1, 2500);
        INSERT INTO messenger.feed (user_id, seq, event_id) SELECT 1, id, -id FROM messenger.events;
        INSERT INTO messenger.idempotency_keys (sender_id, key_hash, content_hash, made_id, created_at)
        VALUES (1, 'old', '', 1, now() - interval '31 days'), (1, 'new', '', 2, now());
        UPDATE messenger.feed_heads SET head_seq = 2500 WHERE user_id = 1;
        INSERT INTO messenger.sessions (user_id, expires_at)
        VALUES (1, now() - interval '8 days'), (2, now() + interval '1 day')";
    execute(&pool, rows).await;
    let url = database_url(&pool);
    let (success, said) = run(&["prune"], &[("DATABASE_URL", &url), ("LOG_FORMAT", "json")]);
    assert!(success, "{said}");
    let last: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    let counts = ["events", "bodies", "sessions", "keys"].map(|what| last[what].as_i64().unwrap());
    assert_eq!(counts, [2_500, 2_500, 1, 1], "{said}");
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.feed").await, 0);
    assert_eq!(number(&pool, "SELECT sum(user_id)::bigint FROM messenger.sessions").await, 2);
}

#[sqlx::test(migrations = false)]
async fn log_filter_can_be_changed_while_running(pool: PgPool) {
    let server = serve(&pool, &[]);
    let client = Client::default();
    let log = format!("{}/log", server.ops);
    assert_eq!(client.get(&log).expect(200).await.text(), "debug\n");
    let change =
        async |directives: &str| client.call("PUT", &log).body(directives.to_owned()).send().await.unwrap();
    let get = async |path: &str| client.get(format!("{}{path}", server.public)).send().await.unwrap();
    get("/seen-before").await;
    assert_eq!(change("warn").await.text(), "warn\n");
    get("/not-seen").await;
    for bad in ["api=loudly", &"x".repeat(2_000)] {
        assert!((400..500).contains(&change(bad).await.status), "{bad}");
    }
    assert_eq!(client.get(&log).expect(200).await.text(), "warn\n", "as it was");
    assert_eq!(change("info,api=debug\n").await.status, 200);
    get("/seen-again").await;
    let said = server.stop().await;
    for (text, is_there) in [("/seen-before", true), ("/not-seen", false), ("/seen-again", true)] {
        assert_eq!(said.contains(text), is_there, "{text} in {said}");
    }
    assert!(said.contains("log filter changed"));
}
