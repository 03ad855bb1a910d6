//! Each alert has its entry in the runbook, and neither alerts nor dashboard speak of metrics that no service has.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path))
        .expect("the file is in the workspace")
}

/// The texts between double quotes that follow this one.
fn quoted_after<'a>(text: &'a str, before: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(before).skip(1).filter_map(|rest| rest.trim_start().strip_prefix('"')?.split('"').next())
}

/// Names without the endings that a metric's type gives them.
fn declared() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let shared = ["limiter.rs", "server/metrics.rs", "traces.rs"]
        .map(|file| read(&format!("shared/service-kit/src/{file}")));
    let shared = shared.concat();
    for (prefix, source) in
        [("api", read("api/src/metrics.rs")), ("gateway", read("stream-gateway/src/metrics.rs"))]
    {
        let own = quoted_after(&source, ".register(");
        names.extend(own.chain(quoted_after(&shared, ".register(")).map(|name| format!("{prefix}_{name}")));
        for (name, call) in
            quoted_after(&source, ".register_with_unit(").zip(source.split(".register_with_unit(").skip(1))
        {
            let unit = call.split("Unit::").nth(1).and_then(|rest| rest.split(',').next()).expect("a unit");
            names.insert(format!("{prefix}_{name}_{}", unit.to_lowercase()));
        }
    }
    let process = read("shared/service-kit/src/process_metrics.rs");
    let quoted = process.split('"').skip(1).step_by(2);
    names.extend(
        quoted
            .filter(|text| text.starts_with("process_") || text.starts_with("messenger_"))
            .map(str::to_owned),
    );
    assert!(names.len() > 40, "metrics are declared in another way: {names:?}");
    names
}

/// Every name in an expression that looks like one of ours.
fn used(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let ours = ["api_", "gateway_", "process_", "messenger_"];
    words.filter(|word| ours.iter().any(|prefix| word.starts_with(prefix))).collect()
}

#[test]
fn alerts_and_dashboard_ask_for_metrics_that_exist() {
    let declared = declared();
    for file in ["monitoring/alerts.yml", "monitoring/alerts.test.yml", "monitoring/dashboard.json"] {
        let text = read(file);
        let names = used(&text);
        assert!(!names.is_empty());
        for name in names {
            let endings = ["", "_total", "_bucket", "_count", "_sum"];
            let known = endings
                .iter()
                .any(|ending| name.strip_suffix(ending).is_some_and(|base| declared.contains(base)));
            assert!(known, "{file} asks for {name}, which no service has");
        }
    }
}

#[test]
fn each_alert_is_in_the_runbook_and_each_one_there_is_an_alert() {
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
