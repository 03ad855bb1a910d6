//! The rules. Each reports what is wrong with an installation.

mod network;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use network::flows;

use crate::{Findings, Installation, Object, address, at, each, selects, text, texts};

pub type ManifestRule = fn(&Installation, &mut Findings);

macro_rules! all {
    ($($rule:ident)*) => { pub const ALL: &[(&str, ManifestRule)] = &[$((stringify!($rule), $rule)),*]; };
}
all!(product selectors ports listeners references settings agreement secrets shutdown replicas spread routes flows);

/// Connections of Postgres by default, without those for its owner.
const POSTGRES_CONNECTIONS: u64 = 97;
/// Time for the parts of a shutdown that no setting names, and for the kubelet.
const SHUTDOWN_MARGIN: u64 = 20;

/// Other rules find the services by image and look at one container: a set in which they see nothing must not pass.
/// The API server enforces the `restricted` profile because of the namespace's label.
fn product(set: &Installation, out: &mut Findings) {
    for name in set.services.keys() {
        out.must(name, set.serving().any(|(pod, _)| pod.program() == *name), "no container runs it");
    }
    let migrates = set.ours().any(|(pod, _)| pod.container["args"] == json!(["migrate"]));
    out.must("api migrate", migrates, "no container runs it");
    let namespace = set.of("Namespace").next();
    let label = "metadata/labels/pod-security.kubernetes.io~1enforce";
    let restricted = namespace.is_some_and(|namespace| namespace.at(label) == "restricted");
    out.must("Namespace", restricted, "pod-security.kubernetes.io/enforce must be restricted");
    for pod in set.pods() {
        let containers = each(pod.spec, "containers/*").len() + each(pod.spec, "initContainers/*").len();
        out.must(pod.id(), containers == 1, "the rules look at one container only");
        let links = pod.spec["enableServiceLinks"] == false;
        out.must(pod.id(), links, "enableServiceLinks must be false: variables are for settings");
    }
    let mut images = BTreeMap::new();
    for (pod, _) in set.ours() {
        let image = &pod.container["image"];
        let same = *images.entry(pod.program()).or_insert(image) == image;
        out.must(pod.id(), same, "api and its migration must run the same image");
    }
}

fn selectors(set: &Installation, out: &mut Findings) {
    for object in &set.objects {
        let (id, selector) = (&object.id, object.at("spec/selector"));
        let count = |selector| set.pods().filter(|pod| selects(selector, pod.labels)).count();
        match object.kind.as_str() {
            "Deployment" | "StatefulSet" => {
                let own = selects(selector, object.at("spec/template/metadata/labels"));
                out.must(id, own && count(selector) == 1, "its selector must select its own pods only");
            }
            "Service" => out.must(id, set.behind(object).len() == 1, "its selector must select one workload"),
            "NetworkPolicy" => {
                out.must(id, count(object.at("spec/podSelector")) > 0, "its podSelector selects no pod");
            }
            _ => {}
        }
    }
}

fn ports(set: &Installation, out: &mut Findings) {
    for service in set.of("Service") {
        for port in each(&service.body, "spec/ports/*") {
            let exists = !set.targets(&service.name, &port["port"]).is_empty();
            let target = &port["targetPort"];
            out.must(&service.id, exists, format!("targetPort {target} is no port of its pods"));
        }
    }
    for pod in set.pods() {
        let scraped = pod.owner.at("spec/template/metadata/annotations/prometheus.io~1port").as_str();
        let exists = scraped.is_none_or(|port| pod.port(&json!(port.parse::<u64>().ok())).is_some());
        out.must(pod.id(), exists, "prometheus.io/port is none of its ports");
    }
}

/// Ports, listeners and probes of the services agree. Liveness must not depend on other servers.
fn listeners(set: &Installation, out: &mut Findings) {
    for (pod, settings) in set.serving() {
        let listeners = settings.keys().filter(|name| *name == "LISTEN" || name.ends_with("_LISTEN"));
        let mut open = BTreeSet::new();
        for name in listeners {
            let public = pod.value(name).is_some_and(|it| it.starts_with("0.0.0.0:"));
            out.must(pod.id(), public, format!("{name} must be reachable from outside the pod"));
            open.extend(pod.listens(name));
        }
        let ports = each(pod.container, "ports/*/containerPort").into_iter().filter_map(Value::as_u64);
        let ports: BTreeSet<_> = ports.collect();
        out.must(pod.id(), open == ports, format!("it listens on {open:?}, but its ports are {ports:?}"));
        for (probe, path) in [("startup", "livez"), ("liveness", "livez"), ("readiness", "readyz")] {
            let get = at(pod.container, &format!("{probe}Probe/httpGet"));
            let right =
                get["path"] == format!("/{path}") && pod.port(&get["port"]) == pod.listens("OPS_LISTEN");
            out.must(pod.id(), right, format!("{probe}Probe must get /{path} from the port of OPS_LISTEN"));
        }
        if let Some(url) = pod.value("API_INTERNAL_URL") {
            let (_, host, port) = address(url).unwrap_or_default();
            let mut targets = set.targets(host, &port.into()).into_iter();
            let internal = targets.any(|(api, port)| api.listens("INTERNAL_LISTEN") == Some(port));
            out.must(pod.id(), internal, "API_INTERNAL_URL must lead to the internal listener of api");
        }
    }
}

fn references(set: &Installation, out: &mut Findings) {
    // The requiring workload, and kind/name/key; without a key, all of it.
    let mut found: Vec<(&str, &str, &str, &str)> = Vec::new();
    for pod in set.pods() {
        let maps = texts(pod.container, "envFrom/*/configMapRef/name").into_iter();
        found.extend(maps.map(|name| (pod.id(), "ConfigMap", name, "")));
        let keys = each(pod.container, "env/*/valueFrom/secretKeyRef").into_iter();
        found.extend(keys.map(|from| (pod.id(), "Secret", text(&from["name"]), text(&from["key"]))));
        for (kind, of, key) in [("ConfigMap", "configMap", "name"), ("Secret", "secret", "secretName")] {
            for source in each(pod.spec, &format!("volumes/*/{of}")) {
                let items = texts(source, "items/*/key").into_iter().chain([""]);
                found.extend(items.map(|item| (pod.id(), kind, text(&source[key]), item)));
            }
        }
        let account = text(&pod.spec["serviceAccountName"]);
        let needless = account.is_empty() && !set.services.contains_key(pod.program());
        let exists = needless || set.find("ServiceAccount", account).is_some();
        out.must(pod.id(), exists, format!("ServiceAccount {account:?} does not exist"));
    }
    for ingress in set.of("Ingress") {
        for name in texts(&ingress.body, "spec/tls/*/secretName") {
            found.extend(["tls.crt", "tls.key"].map(|key| (&*ingress.id, "Secret", name, key)));
        }
    }
    for (id, kind, name, key) in &found {
        let keys = set.keys(kind, name);
        let exists = keys.contains(key) || (key.is_empty() && !keys.is_empty());
        out.must(id, exists, format!("{kind}/{name}/{key} is neither in the set nor in provided.list"));
    }
    for line in &set.provided {
        let used = found.iter().any(|(_, kind, name, key)| line.starts_with(&format!("{kind}/{name}/{key}")));
        out.must("provided.list", used, format!("nothing refers to {line}"));
    }
}

fn settings(set: &Installation, out: &mut Findings) {
    for (pod, settings) in set.ours() {
        let (mut defined, mut used) = (BTreeSet::new(), BTreeSet::new());
        for variable in each(pod.container, "env/*") {
            for part in text(&variable["value"]).split("$(").skip(1) {
                let name = part.split(')').next().unwrap_or_default();
                out.must(pod.id(), defined.contains(name), format!("$({name}) is used before it is defined"));
                used.insert(name);
            }
            defined.insert(text(&variable["name"]));
        }
        let environment = pod.environment();
        for name in environment.keys() {
            let known = settings.contains_key(*name) || name.starts_with("SSL_CERT_") || used.contains(name);
            out.must(pod.id(), known, format!("{name} is no setting of {}", pod.program()));
        }
        let given = |name: &str| environment.get(name).is_some_and(|value| *value != Some(""));
        for (name, default) in settings {
            let optional = default.is_some() || !(pod.serves() || name == "DATABASE_URL");
            let set = optional || given(name) || given(&format!("{name}_FILE"));
            out.must(pod.id(), set, format!("{name} must be set"));
        }
    }
}

const SHARED: &str = "ORIGIN ALLOWED_ORIGINS TRUSTED_PROXIES CHANNEL_PREFIX RATE_LIMITS REDIS_URL REDIS_TOPOLOGY REDIS_SENTINELS";

/// Settings that both services must share, and TLS to servers outside the cluster.
fn agreement(set: &Installation, out: &mut Findings) {
    for name in SHARED.split(' ') {
        let values = set.serving().map(|(pod, _)| {
            let urls = pod.value(name).unwrap_or_default().split(',');
            urls.map(|url| address(url).map_or(url.to_owned(), |it| format!("{it:?}"))).collect::<Vec<_>>()
        });
        let values: BTreeSet<_> = values.collect();
        out.must(name, values.len() < 2, format!("api and stream-gateway must have the same: {values:?}"));
    }
    for (pod, _) in set.ours() {
        for (name, tls) in [("DATABASE_URL", "sslmode=verify-full"), ("REDIS_URL", "rediss://")] {
            for url in pod.value(name).into_iter().flat_map(|urls| urls.split(',')) {
                let inside = address(url).is_some_and(|(_, host, _)| set.find("Service", host).is_some());
                out.must(pod.id(), inside || url.contains(tls), format!("{name} needs TLS ({tls})"));
            }
        }
    }
}

fn secrets(set: &Installation, out: &mut Findings) {
    let secret = ["_SECRET", "_PASSWORD", "_TOKEN", "_OTLP_HEADERS"];
    for pod in set.pods() {
        for (name, value) in pod.environment() {
            let value = value.unwrap_or_default();
            let plain = !value.is_empty() && secret.iter().any(|end| name.ends_with(end));
            out.must(pod.id(), !plain, format!("{name} must be in a Secret"));
            let user =
                value.split_once("://").and_then(|(_, rest)| rest.split_once('@')).unwrap_or_default().0;
            let password = user.split_once(':').map_or("$(", |(_, password)| password);
            out.must(pod.id(), password.starts_with("$("), format!("{name} contains a password"));
        }
    }
    for object in &set.objects {
        out.must(&object.id, object.kind != "Secret", "list it in provided.list instead");
        let key = object.body.to_string().contains("PRIVATE KEY-----");
        out.must(&object.id, !key, "it contains a private key");
    }
}

/// A shutdown fits the grace period, and a rollout replaces one pod after the other.
fn shutdown(set: &Installation, out: &mut Findings) {
    for (pod, settings) in set.serving() {
        let gateway = pod.program() == "stream-gateway";
        let number = |name: &str| pod.number(settings, name);
        let end = number("SHUTDOWN_WAIT_SECONDS") + number("SHUTDOWN_GRACE_SECONDS");
        let end = end + number("DRAIN_WAIT_SECONDS") + number("DRAIN_WINDOW_SECONDS");
        let grace = pod.spec["terminationGracePeriodSeconds"].as_u64().unwrap_or(30);
        let fits = end > 0 && end + SHUTDOWN_MARGIN <= grace;
        out.must(pod.id(), fits, format!("shutdown needs {end} + {SHUTDOWN_MARGIN} s and has {grace} s"));
        let same = number("TERMINATION_GRACE_SECONDS") == grace;
        out.must(pod.id(), same, format!("TERMINATION_GRACE_SECONDS must be {grace}"));
        let hook = &pod.container["lifecycle"];
        out.must(pod.id(), hook.is_null(), "a lifecycle hook would delay the shutdown");
        let rollout = pod.owner.at("spec/strategy/rollingUpdate");
        let one = rollout["maxUnavailable"] == 0 && rollout["maxSurge"] == 1;
        out.must(pod.id(), one, "a rollout must start one new pod before it stops an old one");
        let ready = pod.owner.at("spec/minReadySeconds").as_u64().unwrap_or_default();
        let covers = !gateway || ready >= end;
        out.must(pod.id(), covers, format!("minReadySeconds must cover a drain of {end} s"));
    }
}

fn replicas(set: &Installation, out: &mut Findings) {
    for scaler in set.of("HorizontalPodAutoscaler") {
        let target = set.find("Deployment", text(scaler.at("spec/scaleTargetRef/name")));
        let free = target.is_some_and(|target| target.at("spec/replicas").is_null());
        out.must(&scaler.id, free, "its target must exist and have no replicas of its own");
        let bound = |name: &str| scaler.at(&format!("spec/{name}")).as_u64().unwrap_or_default();
        let bounded = (2..=bound("maxReplicas")).contains(&bound("minReplicas"));
        out.must(&scaler.id, bounded, "minReplicas must be 2 to maxReplicas");
        let down = scaler.at("spec/behavior/scaleDown");
        let slow = down["stabilizationWindowSeconds"].as_u64() >= Some(300)
            && each(down, "policies/*").iter().any(|it| it["type"] == "Pods" && it["value"] == 1);
        out.must(&scaler.id, slow, "it must scale down one pod at a time, after 300 s or more");
        for name in texts(&scaler.body, "spec/metrics/*/pods/metric/name") {
            let offered = set.adapted.iter().any(|(_, adapted)| adapted == name);
            out.must(&scaler.id, offered, format!("prometheus-adapter does not offer {name}"));
        }
    }
    for (series, _) in &set.adapted {
        let exists = set.metrics.contains(&format!("| `{series}` |"));
        out.must("prometheus-adapter", exists, format!("no service has the metric {series}"));
    }
    for (pod, settings) in set.serving() {
        let mut scalers = set.of("HorizontalPodAutoscaler");
        let scaler = scalers.find(|it| it.at("spec/scaleTargetRef/name") == pod.owner.name.as_str());
        let most = scaler.map_or(pod.owner.at("spec/replicas"), |it| it.at("spec/maxReplicas"));
        let most = most.as_u64().unwrap_or(1);
        out.must(pod.id(), most > 1, "it needs two replicas or more");
        // One pod more during a rollout, and one connection more of each for its readiness.
        let pool = pod.number(settings, "DATABASE_POOL_SIZE");
        let fits = pool == 0 || (most + 1) * (pool + 1) <= POSTGRES_CONNECTIONS;
        let problem = format!("{most} replicas with a pool of {pool} exceed Postgres's connections");
        out.must(pod.id(), fits, problem);
        if let (Some(scaler), "stream-gateway") = (scaler, pod.program()) {
            let mut metrics = each(&scaler.body, "spec/metrics/*/pods").into_iter();
            let streams = metrics.find(|it| at(it, "metric/name") == "messenger_gateway_streams");
            let target = streams.and_then(|it| text(at(it, "target/averageValue")).parse::<u64>().ok());
            let least = scaler.at("spec/minReplicas").as_u64().unwrap_or_default();
            let room = pod.number(settings, "MAX_STREAMS") * least.saturating_sub(1);
            let fits = target.is_some_and(|target| target * least <= room);
            out.must(pod.id(), fits, "it must scale by streams, and leave room for those of one pod");
        }
    }
}

fn spread(set: &Installation, out: &mut Findings) {
    for budget in set.of("PodDisruptionBudget") {
        let one = budget.at("spec/maxUnavailable") == 1;
        out.must(&budget.id, one, "a drained node must stop one pod at a time");
    }
    for (pod, _) in set.serving() {
        let budgets = set.of("PodDisruptionBudget").filter(|it| selects(it.at("spec/selector"), pod.labels));
        out.must(pod.id(), budgets.count() == 1, "it needs one PodDisruptionBudget");
        for key in ["topology.kubernetes.io/zone", "kubernetes.io/hostname"] {
            let mut spread = each(pod.spec, "topologySpreadConstraints/*").into_iter();
            let over = spread.any(|it| it["topologyKey"] == key && selects(&it["labelSelector"], pod.labels));
            out.must(pod.id(), over, format!("it is not spread over {key}"));
        }
    }
}

/// Exactly the stream's path leads to gateways, everything else to api, and nothing to other ports.
fn routes(set: &Installation, out: &mut Findings) {
    let origin = set.serving().find_map(|(pod, _)| pod.value("ORIGIN")).unwrap_or_default();
    let host = origin.strip_prefix("https://").map(|rest| rest.split(':').next().unwrap_or_default());
    let mut routed = BTreeSet::new();
    for Object { id, body, .. } in set.of("Ingress") {
        out.must(id, at(body, "spec/ingressClassName") == "nginx", "its ingressClassName must be nginx");
        out.must(id, at(body, "spec/defaultBackend").is_null(), "a defaultBackend gets unnamed hosts");
        for (path, what) in [("spec/tls/*/hosts/*", "TLS"), ("spec/rules/*/host", "a rule")] {
            let hosts = texts(body, path);
            let right = host.is_none_or(|host| !hosts.is_empty() && hosts.iter().all(|it| *it == host));
            out.must(id, right, format!("ORIGIN is {origin}, but it has {what} for {hosts:?}"));
        }
        let annotation =
            |name: &str| text(at(body, &format!("metadata/annotations/nginx.ingress.kubernetes.io~1{name}")));
        out.must(id, annotation("enable-access-log") == "false", "its access log would contain tokens");
        for path in each(body, "spec/rules/*/http/paths/*") {
            let mut targets = set.backends(path).into_iter();
            let Some((pod, _)) = targets.find(|(pod, port)| pod.listens("LISTEN") == Some(*port)) else {
                out.must(id, false, "a path must lead to the public listener of a service");
                continue;
            };
            let gateway = pod.program() == "stream-gateway";
            let route = if gateway { ("/api/messages", "Exact") } else { ("/", "Prefix") };
            let right = (text(&path["path"]), text(&path["pathType"])) == route;
            out.must(id, right, format!("only {route:?} may lead to {}", pod.id()));
            routed.insert(route);
            out.must(id, !gateway || annotation("proxy-buffering") == "off", "proxy-buffering must be off");
            let idle = pod.number(&set.services["stream-gateway"], "PROXY_IDLE_SECONDS");
            let waits = annotation("proxy-read-timeout").parse::<u64>().is_ok_and(|wait| wait >= idle);
            let problem = format!("proxy-read-timeout is below PROXY_IDLE_SECONDS ({idle})");
            out.must(id, !gateway || waits, problem);
        }
    }
    out.must("Ingress", routed.len() == 2, "/api/messages and / must be routed");
}
