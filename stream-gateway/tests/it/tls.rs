//! Redis over TLS (`rediss://`): the real binary and real certificates.

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
};

use testkit::{
    http::Client,
    panics,
    process::Process,
    servers::Redis,
    tls::{Authority, Door},
    until,
};

use crate::{
    api::{FakeApi, SECRET},
    support::{ORIGIN, keys},
};

fn gateway(api: &FakeApi, redis_port: u16, root: PathBuf) -> (Process, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stream-gateway"));
    command
        .env_clear()
        .args(["--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0", "--max-streams=100", "--log-format=json"])
        .args([format!("--origin={ORIGIN}"), format!("--api-internal-url=http://{}", api.address)])
        .env("REDIS_URL", format!("rediss://localhost:{redis_port}"))
        .env("INTERNAL_SECRET", SECRET)
        .env("SSL_CERT_FILE", root)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut process = Process::start(&mut command).unwrap();
    panics::watch_child(process.child().stderr.take().unwrap());
    let mut lines = BufReader::new(process.child().stdout.take().unwrap()).lines();
    let ops = loop {
        let line: serde_json::Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        if line["message"] == "listening" && line["name"] == "ops" {
            break line["address"].as_str().unwrap().to_owned();
        }
    };
    // Read the log, or the process blocks on a full pipe.
    std::thread::spawn(move || lines.for_each(drop));
    (process, ops)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_over_tls_needs_a_trusted_certificate() {
    let authority = Authority::new();
    let (redis, api) = (Redis::start(), FakeApi::start(keys().jwks().clone()));
    let door = Door::start(redis.address(), &authority).await;
    let (_trusting, trusts) = gateway(&api, door.port(), authority.root());
    let (_suspicious, trusts_not) = gateway(&api, door.port(), Authority::new().root());
    let metrics = async |ops: &str| {
        let answer = Client::default().get(format!("http://{ops}/metrics")).send().await;
        answer.map(|answer| answer.text()).unwrap_or_default()
    };
    // By then a loopback probe has returned too, over a connection of its own.
    until("Redis is trusted to bring events", || async {
        let metrics = metrics(&trusts).await;
        metrics.contains("messenger_gateway_redis_connected 1\n")
            && metrics.contains("messenger_gateway_redis_degraded 0\n")
    })
    .await;
    let metrics = metrics(&trusts_not).await;
    assert!(
        metrics.contains("messenger_gateway_redis_connected 0\n")
            && metrics.contains("messenger_gateway_redis_connections_opened_total 0\n"),
        "{metrics}"
    );
    panics::assert_none();
}
