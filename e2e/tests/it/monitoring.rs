//! Metrics, rules and dashboard: promtool checks the exposition and the rules; a real Prometheus scrapes both services, evaluates
//! every alert, and answers every query of the dashboard.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use e2e::{Service, World, program};
use serde_json::Value;
use testkit::{ports::free_port, process::Process, soon, until};

use crate::support::{ready, start};

fn monitoring(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../monitoring").join(file)
}

fn promtool(arguments: &[&str], input: &str) {
    let mut command = Command::new(program("DEV_PROMTOOL", "promtool", "Debian: apt install prometheus"));
    command.current_dir(monitoring("")).args(arguments);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "promtool {arguments:?}: {said}");
}

#[test]
fn the_alert_rules_are_rules_and_fire_when_they_should() {
    promtool(&["check", "rules", "alerts.yml"], "");
    promtool(&["test", "rules", "alerts.test.yml"], "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_prometheus_understands_all_that_the_services_tell() {
    let (world, api, gateway, two) = start().await;
    let mut stream = ready(gateway.stream(&two.jane)).await;
    world.say(&api, &two.john, two.conversation).await;
    soon("the message arrives", stream.event()).await.unwrap();
    for service in [&api, &gateway] {
        let metrics = world.client.get(format!("http://{}/metrics", service.ops()));
        promtool(&["check", "metrics"], &metrics.expect(200).await.text());
    }

    let prometheus = Prometheus::start(&api, &gateway);
    let delivered = r#"messenger_gateway_events_delivered_total{path="redis"}"#;
    let lag = "sum(messenger_gateway_delivery_lag_seconds_count)";
    for (query, value) in [(delivered, "1"), ("sum(up)", "2"), (lag, "1")] {
        until(query, async || prometheus.query(&world, query).await.is_some_and(|values| values == [value]))
            .await;
    }

    until("each rule was evaluated", async || {
        let answer = world.client.get(prometheus.url("/api/v1/rules")).expect(200).await.json();
        let groups = answer["data"]["groups"].as_array().unwrap();
        let rules: Vec<_> = groups.iter().flat_map(|group| group["rules"].as_array().unwrap()).collect();
        assert!(rules.iter().all(|rule| rule["health"] != "err"), "{rules:?}");
        assert!(rules.iter().all(|rule| rule["state"] != "firing"), "{rules:?}");
        rules.len() > 20 && rules.iter().all(|rule| rule["health"] == "ok")
    })
    .await;

    let dashboard: Value =
        serde_json::from_str(&fs::read_to_string(monitoring("dashboard.json")).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let mut queries = 0;
    for target in targets {
        let query = target["expr"].as_str().unwrap().replace("$__rate_interval", "1m");
        assert!(prometheus.query(&world, &query).await.is_some(), "{query}");
        queries += 1;
    }
    assert!(queries > 30, "{queries}");
    drop(stream);
}

struct Prometheus {
    address: String,
    _process: Process,
    _folder: tempfile::TempDir,
}

impl Prometheus {
    fn start(api: &Service, gateway: &Service) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let job = |name: &str, service: &Service| {
            format!("  - job_name: {name}\n    static_configs: [{{targets: ['{}']}}]\n", service.ops())
        };
        let config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{}']\nscrape_configs:\n{}{}",
            monitoring("alerts.yml").display(),
            job("api", api),
            job("stream-gateway", gateway)
        );
        fs::write(folder.path().join("prometheus.yml"), config).unwrap();
        let address = format!("127.0.0.1:{}", free_port());
        let mut command =
            Command::new(program("DEV_PROMETHEUS", "Prometheus", "Debian: apt install prometheus"));
        command
            .current_dir(folder.path())
            .args(["--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=error"])
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null());
        let process = Process::start(&mut command).unwrap();
        Self { address, _process: process, _folder: folder }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    async fn query(&self, world: &World, query: &str) -> Option<Vec<String>> {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let call = world.client.get(self.url(&format!("/api/v1/query?query={encoded}")));
        let answer = call.send().await.ok().filter(|answer| answer.status == 200)?.json();
        let values = answer["data"]["result"].as_array()?;
        Some(values.iter().map(|value| value["value"][1].as_str().unwrap_or_default().to_owned()).collect())
    }
}
