//! docs/settings.md, .env.example and docs/metrics.md are made from what the services declare, and everything that reads metrics
//! reads ones that exist.

use std::{
    collections::BTreeSet,
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

use prometheus_client::{encoding::text, registry::Registry};
use service_kit::{
    metrics::Sample,
    settings::{Initial, Setting},
};

const UPDATE: &str = "run: UPDATE_REFERENCE=1 cargo test --workspace --test reference";

fn path(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file)
}

fn read(file: &str) -> String {
    fs::read_to_string(path(file)).expect("the file is in the workspace")
}

struct Metric {
    name: String,
    kind: String,
    labels: String,
    help: String,
}

fn exposed(metrics: &impl Sample, registry: &Registry) -> Vec<Metric> {
    metrics.sample();
    let mut text = String::new();
    text::encode(&mut text, registry).expect("writing to a string does not fail");
    let metric = |block: &str| {
        let mut lines = block.lines();
        let (name, help) = lines.next().and_then(|line| line.split_once(' ')).expect("name and help");
        let kind = lines.next().and_then(|line| line.rsplit(' ').next()).expect("a type");
        let sample = lines.find(|line| !line.starts_with('#')).unwrap_or_default();
        let labels = sample.split_once('{').and_then(|(_, rest)| rest.split_once('}'));
        let labels = labels.map_or("", |(set, _)| set).split(',');
        let labels = labels.filter_map(|label| Some(label.split_once('=')?.0)).filter(|label| *label != "le");
        let suffix = if kind == "counter" { "_total" } else { "" };
        Metric {
            name: format!("{name}{suffix}"),
            kind: kind.to_owned(),
            labels: labels.map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", "),
            help: help.trim_end_matches('.').to_owned(),
        }
    };
    let exposed: Vec<_> = text.split("# HELP ").skip(1).map(metric).collect();
    assert!(exposed.len() > 20, "{text}");
    exposed
}

fn of_api() -> Vec<Metric> {
    let (metrics, registry) = api::metrics::Metrics::of_service();
    exposed(&metrics, &registry)
}

fn of_gateway() -> Vec<Metric> {
    let (metrics, registry) = stream_gateway::metrics::Metrics::of_service();
    exposed(&metrics, &registry)
}

fn of_both() -> impl Iterator<Item = Metric> {
    of_api().into_iter().chain(of_gateway())
}

#[test]
fn metrics_table_is_up_to_date() {
    let mut table = String::from(
        "# Metrics\n\nBoth services expose these at `/metrics` on `OPS_LISTEN`. The table is generated from the code.\n\
         `monitoring/` has alerts and a dashboard for them; [the runbook](runbook.md) says what to do.\n",
    );
    let own = |prefix: &'static str| move |metric: &Metric| metric.name.starts_with(prefix);
    let sections = [
        ("api", of_api().into_iter().filter(own("messenger_api_")).collect::<Vec<_>>()),
        ("stream-gateway", of_gateway().into_iter().filter(own("messenger_gateway_")).collect()),
        ("Both", of_api().into_iter().filter(|m| !own("messenger_api_")(m)).collect()),
    ];
    for (title, metrics) in sections {
        write!(table, "\n## {title}\n\n| Metric | Type | Labels | Meaning |\n|---|---|---|---|\n").unwrap();
        for Metric { name, kind, labels, help } in metrics {
            writeln!(table, "| `{name}` | {kind} | {labels} | {help} |").unwrap();
        }
    }
    assert_generated("docs/metrics.md", &table);
}

fn assert_generated(file: &str, content: &str) {
    if std::env::var_os("UPDATE_REFERENCE").is_some() {
        fs::write(path(file), content).expect("the folder is there");
    }
    assert_eq!(fs::read_to_string(path(file)).unwrap_or_default(), content, "{file}: {UPDATE}");
}

fn settings() -> [(&'static str, Vec<Setting>); 3] {
    let (mut api, mut gateway) = (api::config::rows(), stream_gateway::config::rows());
    let both = api.extract_if(.., |row| gateway.contains(row)).collect::<Vec<_>>();
    gateway.retain(|row| !both.contains(row));
    [("Both services", both), ("api", api), ("stream-gateway", gateway)]
}

#[test]
fn settings_table_is_up_to_date() {
    let mut table = String::from(
        "# Settings\n\nEach is an environment variable and a flag: `LOG_FORMAT` is `--log-format`. An empty value counts as not set.\n\
         `api check-config` and `stream-gateway check-config` report every problem. Generated from the code, as is `.env.example`.\n",
    );
    for (title, rows) in settings() {
        write!(table, "\n## {title}\n\n| Setting | Default | Values | Meaning |\n|---|---|---|---|\n")
            .unwrap();
        for Setting { name, initial, values, help } in rows {
            let initial = match initial {
                Initial::Default("") => String::new(),
                Initial::Default(default) => format!("`{default}`"),
                Initial::Required("") => "required".to_owned(),
                Initial::Required(example) => format!("required: `{example}`"),
            };
            writeln!(table, "| `{name}` | {initial} | {values} | {help} |").unwrap();
        }
    }
    assert_generated("docs/settings.md", &table);
}

#[test]
fn env_example_is_up_to_date() {
    let mut example = String::from(
        "# Every setting of both services, generated from the code. Each is also a flag: LOG_FORMAT is --log-format.\n\
         # A line that is commented out shows the default. `cargo dev up` needs none of this: it creates its own.\n",
    );
    for (title, rows) in settings() {
        write!(example, "\n# --- {title} ---\n\n").unwrap();
        for Setting { name, initial, help, .. } in rows {
            // The file of a secret stands below it.
            if !name.ends_with("_FILE") {
                wrap(&mut example, &help);
            }
            match initial {
                Initial::Default(default) => writeln!(example, "# {name}={default}").unwrap(),
                Initial::Required(given) => writeln!(example, "{name}={given}").unwrap(),
            }
        }
    }
    assert_generated(".env.example", &example);
}

fn wrap(text: &mut String, sentences: &str) {
    let mut column = 121;
    for word in sentences.split(' ') {
        if column + 1 + word.len() > 120 {
            text.push_str(if column > 120 { "#" } else { "\n#" });
            column = 1;
        }
        text.extend([" ", word]);
        column += 1 + word.len();
    }
    text.push('\n');
}

#[test]
fn each_secret_can_be_given_in_a_file() {
    let ends = ["_SECRET", "_PASSWORD", "_TOKEN", "_HEADERS", "_SENTINELS", "DATABASE_URL", "REDIS_URL"];
    for rows in [api::config::rows(), stream_gateway::config::rows()] {
        let names: BTreeSet<_> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names.len(), rows.len(), "a setting is declared twice");
        let secrets: Vec<_> =
            names.iter().filter(|name| ends.iter().any(|end| name.ends_with(end))).collect();
        assert!(secrets.len() > 3, "{secrets:?}");
        for name in secrets {
            assert!(names.contains(format!("{name}_FILE").as_str()), "{name} has no {name}_FILE");
        }
    }
}

fn used(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let ours = ["messenger_api_", "messenger_gateway_", "messenger_build", "process_", "api_", "gateway_"];
    words
        .filter(|word| ours.iter().any(|prefix| word.len() > prefix.len() && word.starts_with(prefix)))
        .collect()
}

#[test]
fn alerts_dashboard_autoscaler_and_docs_use_metrics_that_exist() {
    let mut exist = BTreeSet::new();
    for Metric { name, kind, .. } in of_both() {
        if kind == "histogram" {
            exist.extend(["_bucket", "_count", "_sum"].map(|series| format!("{name}{series}")));
        }
        exist.insert(name);
    }
    for file in [
        "monitoring/alerts.yml",
        "monitoring/alerts.test.yml",
        "monitoring/dashboard.json",
        "k8s/prometheus-adapter/values.yaml",
        "k8s/components/autoscaling/stream-gateway.yaml",
        "docs/runbook.md",
        "docs/deploy.md",
    ] {
        let text = read(file);
        let names = used(&text);
        assert!(!names.is_empty(), "{file}");
        for name in names {
            assert!(exist.contains(name), "{file} uses {name}, which no service exposes");
        }
    }
}

#[test]
fn each_alert_is_tested_and_in_the_runbook() {
    let rules = read("monitoring/alerts.yml");
    let alerts: BTreeSet<_> =
        rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    let runbook = read("docs/runbook.md");
    let explained: BTreeSet<_> = runbook
        .split("**")
        .skip(1)
        .step_by(2)
        .filter(|bold| bold.chars().all(char::is_alphanumeric))
        .collect();
    assert!(alerts.len() > 20);
    assert_eq!(alerts, explained, "alerts on the left, bold names in the runbook on the right");
    let tests = read("monitoring/alerts.test.yml");
    for alert in alerts {
        assert!(tests.contains(&format!("alertname: {alert}\n")), "nothing shows that {alert} fires");
    }
}
