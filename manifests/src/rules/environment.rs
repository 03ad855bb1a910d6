//! The environment of our containers against the settings that their binaries have.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    Installation,
    set::{Container, Pod, Variable, address, entries, list, text},
};

/// What the TLS library reads by itself.
const TRUST: [&str; 2] = ["SSL_CERT_FILE", "SSL_CERT_DIR"];

/// The names that `$(NAME)` in a value refers to.
fn referred(value: &str) -> impl Iterator<Item = &str> {
    value.split("$(").skip(1).filter_map(|rest| rest.split_once(')')).map(|(name, _)| name)
}

pub fn variables_are_settings(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    for (container, service) in installation.ours() {
        let id = container.id();
        let mut before = BTreeSet::new();
        let mut used = BTreeSet::new();
        for variable in list(&container.body["env"]) {
            let name = text(&variable["name"]);
            for other in referred(text(&variable["value"])) {
                used.insert(other);
                if !before.contains(other) {
                    findings.push(format!("{id}: {name} refers to $({other}), which is not set before it"));
                }
            }
            if !before.insert(name) {
                findings.push(format!("{id}: {name} is set twice"));
            }
        }
        for name in container.environment().keys() {
            let known = service.settings.contains_key(name) || TRUST.contains(&name.as_str());
            if !known && !used.contains(name.as_str()) {
                findings.push(format!("{id}: {name} is no setting of {}", container.program()));
            }
        }
    }
    findings
}

pub fn what_must_be_set_is_set(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    for (container, service) in installation.ours() {
        let environment = container.environment();
        let required = |name: &&String| container.command() == "serve" || *name == "DATABASE_URL";
        let given =
            |name: &str| environment.get(name).is_some_and(|value| *value != Variable::Text(String::new()));
        for name in service.required.iter().filter(required) {
            // A secret may be in a file.
            let in_file = format!("{name}_FILE");
            let is_set = given(name) || service.settings.contains_key(&in_file) && given(&in_file);
            if !is_set {
                findings.push(format!("{}: {name} must be set", container.id()));
            }
        }
    }
    findings
}

/// Each service may have a user of its own at the same server.
fn without_users(urls: &str) -> String {
    let url = |url: &str| match url.split_once("://") {
        Some((scheme, rest)) => {
            format!("{scheme}://{}", rest.rsplit_once('@').map_or(rest, |(_, rest)| rest))
        }
        None => url.to_owned(),
    };
    urls.split(',').map(url).collect::<Vec<_>>().join(",")
}

/// Numbers, switches, and what holds between settings; the binaries say the rest by `check-config`.
pub fn values_can_be_read(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    let mut shared: BTreeMap<String, (String, String)> = BTreeMap::new();
    for (container, service) in installation.ours() {
        let id = container.id();
        for (name, value) in container.environment() {
            let Variable::Text(value) = value else { continue };
            let default = service.settings.get(&name).and_then(Option::as_deref).unwrap_or_default();
            if default.parse::<u64>().is_ok() && value.parse::<u64>().is_err() {
                findings.push(format!("{id}: {name} is {value:?}, and must be a number"));
            }
            if default.parse::<bool>().is_ok() && value.parse::<bool>().is_err() {
                findings.push(format!("{id}: {name} is {value:?}, and must be true or false"));
            }
            if name == "DEV_LOGIN" && value == "true" && !is_loopback(&container) {
                findings.push(format!("{id}: DEV_LOGIN lets anybody in, and ORIGIN is not a loopback host"));
            }
            // Both services must agree on these, and one who reads only one of them would not see it.
            if [
                "ORIGIN",
                "ALLOWED_ORIGINS",
                "TRUSTED_PROXIES",
                "CHANNEL_PREFIX",
                "RATE_LIMITS",
                "REDIS_URL",
                "REDIS_TOPOLOGY",
                "REDIS_SENTINELS",
            ]
            .contains(&name.as_str())
            {
                let value = without_users(&value);
                let first = shared.entry(name.clone()).or_insert_with(|| (id.clone(), value.clone()));
                if first.1 != value {
                    findings.push(format!("{id}: {name} is not what it is for {}", first.0));
                }
            }
        }
        for (name, plain, safe) in
            [("DATABASE_URL", "postgres", "sslmode=verify-full"), ("REDIS_URL", "redis", "rediss://")]
        {
            let Some(urls) = container.value(name) else { continue };
            let by_sentinels = container.value("REDIS_TOPOLOGY").is_some_and(|kind| kind == "sentinel");
            for url in urls.split(',') {
                // What sentinels call the server has no port.
                let port = if name == "REDIS_URL" && by_sentinels { ":0" } else { "" };
                let url = format!("{}{port}", url.trim());
                let Some((_, host, _)) = address(&url).filter(|(scheme, ..)| scheme.starts_with(plain))
                else {
                    findings.push(format!("{id}: {name} must have the form {plain}://…@host:port…"));
                    continue;
                };
                if installation.set.find("Service", host).is_none() && !url.contains(safe) {
                    findings.push(format!("{id}: {name} leads out of the cluster without TLS ({safe})"));
                }
            }
        }
    }
    findings
}

fn is_loopback(container: &Container) -> bool {
    let origin = container.value("ORIGIN").unwrap_or_default();
    ["http://localhost", "http://127.0.0.1"]
        .iter()
        .any(|start| origin.strip_prefix(start).is_some_and(|rest| rest.is_empty() || rest.starts_with(':')))
}

/// By its name. Headers for a collector hold its key, mostly.
fn is_secret(name: &str) -> bool {
    ["_SECRET", "_PASSWORD", "_TOKEN", "_OTLP_HEADERS"].iter().any(|end| name.ends_with(end))
}

pub fn secrets_are_referred_to(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    let containers = installation.set.pods().into_iter().flat_map(Pod::containers);
    for container in containers {
        for (name, value) in container.environment() {
            let Variable::Text(value) = value else { continue };
            if is_secret(&name) {
                findings
                    .push(format!("{}: {name} is written out, and must come from a Secret", container.id()));
            }
            let userinfo = value.split_once("://").and_then(|(_, rest)| rest.split_once('@'));
            let password = userinfo.and_then(|(userinfo, _)| userinfo.split_once(':'));
            if password.is_some_and(|(_, password)| !password.starts_with("$(")) {
                findings.push(format!("{}: {name} has a password written out", container.id()));
            }
        }
    }
    for map in installation.set.of("ConfigMap") {
        for (name, _) in entries(&map.body["data"]) {
            if is_secret(name) {
                findings.push(format!("{}: {name} is a secret, and a ConfigMap is none", map.id()));
            }
        }
    }
    findings
}
