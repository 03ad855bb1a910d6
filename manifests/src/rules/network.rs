//! Network policies against what is needed: every flow that the settings and the ingress call for is let through at both of its
//! ends, and nothing else is.

use std::{collections::BTreeSet, fmt};

use serde_json::Value;

use crate::{
    Installation,
    set::{Container, NAME, Pod, address, at, entries, list, selects, text},
};

// Who is outside of the set, as the policies must name them.
const INGRESS: &str = "app.kubernetes.io/name=ingress-nginx in the namespace ingress-nginx";
const PROMETHEUS: &str = "app.kubernetes.io/name=prometheus in the namespace monitoring";
const COLLECTOR: &str = "app.kubernetes.io/name=opentelemetry-collector in the namespace monitoring";
const DNS: &str = "k8s-app=kube-dns in the namespace kube-system";
const OUTSIDE: &str = "a network outside";
const INTERNET: &str = "the internet";

/// Where the internet is not: other pods and machines, and the metadata service of clouds, which gives away credentials.
const PRIVATE: [&str; 5] =
    ["10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"];

/// Settings that make api call somebody whose address we do not know.
const LOGINS: [&str; 3] = ["GITHUB_CLIENT_ID", "OIDC_ISSUER", "EXTERNAL_JWKS_URL"];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Into,
    OutOf,
}

/// One end of a flow: these pods may be called by, or may call, the other at this port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Flow {
    pod: String,
    way: Way,
    other: String,
    port: String,
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pod, way, other, port } = self;
        match way {
            Way::Into => write!(f, "{other} reach {pod} at {port}"),
            Way::OutOf => write!(f, "{pod} reach {other} at {port}"),
        }
    }
}

pub fn flows_are_those_that_are_needed(installation: &Installation) -> Vec<String> {
    let needed = needed(installation);
    let allowed = allowed(installation);
    let mut findings = Vec::new();
    for flow in &needed {
        if !allowed.iter().any(|(_, allowed)| allowed == flow) {
            let end = if flow.way == Way::Into { "ingress" } else { "egress" };
            findings.push(format!("no NetworkPolicy lets {flow} ({end} of {})", flow.pod));
        }
    }
    for (policy, flow) in &allowed {
        if !needed.contains(flow) {
            findings.push(format!("{policy}: it lets {flow}, which nobody needs"));
        }
    }
    for pod in installation.set.pods() {
        for kind in ["Ingress", "Egress"] {
            let closed = installation.set.of("NetworkPolicy").any(|policy| {
                selects(policy.at("spec/podSelector"), pod.labels)
                    && list(policy.at("spec/policyTypes")).iter().any(|closed| closed == kind)
            });
            if !closed {
                findings.push(format!("{}: no NetworkPolicy closes its {kind}", pod.owner.id()));
            }
        }
    }
    findings
}

fn needed(installation: &Installation) -> BTreeSet<Flow> {
    let mut flows = BTreeSet::new();
    let mut add = |pod: &Pod, way, other: &str, port: &str| {
        flows.insert(Flow {
            pod: pod.name().to_owned(),
            way,
            other: other.to_owned(),
            port: port.to_owned(),
        });
    };
    for (container, _) in installation.ours() {
        let pod = container.pod;
        if let Some(port) = port_of(&container, "OPS_LISTEN") {
            add(&pod, Way::Into, PROMETHEUS, &port);
        }
        for (name, usual) in [
            ("API_INTERNAL_URL", 80),
            ("DATABASE_URL", 5432),
            ("REDIS_URL", 6379),
            ("REDIS_SENTINELS", 26_379),
        ] {
            let urls = container.value(name).filter(|urls| !urls.is_empty());
            // A cluster's nodes, and sentinels, are several.
            for url in urls.iter().flat_map(|urls| urls.split(',')) {
                for port in ["53/UDP", "53"] {
                    add(&pod, Way::OutOf, DNS, port);
                }
                let (_, host, port) = address(url.trim()).unwrap_or(("", "", usual));
                match installation.set.find("Service", host) {
                    Some(service) => {
                        for (target, port) in installation.set.targets(service, &port.into()) {
                            add(&pod, Way::OutOf, &named(target.name()), &port.to_string());
                            add(&target, Way::Into, &named(pod.name()), &port.to_string());
                        }
                    }
                    None => add(&pod, Way::OutOf, OUTSIDE, &port.to_string()),
                }
            }
        }
        if let Some(url) = container.value("OTEL_EXPORTER_OTLP_ENDPOINT").filter(|url| !url.is_empty()) {
            let (_, _, port) = address(&url).unwrap_or(("", "", 443));
            add(&pod, Way::OutOf, COLLECTOR, &port.to_string());
        }
        if LOGINS.iter().any(|name| container.value(name).is_some_and(|value| !value.is_empty())) {
            add(&pod, Way::OutOf, INTERNET, "443");
        }
    }
    for ingress in installation.set.of("Ingress") {
        for path in list(ingress.at("spec/rules")).iter().flat_map(|rule| list(at(rule, "http/paths"))) {
            for (target, port) in installation.set.backends(path) {
                add(&target, Way::Into, INGRESS, &port.to_string());
            }
        }
    }
    flows
}

fn port_of(container: &Container, listener: &str) -> Option<String> {
    Some(container.value(listener)?.rsplit(':').next()?.to_owned())
}

/// A part of the product, as the other end of a flow.
fn named(name: &str) -> String {
    format!("{NAME}={name}")
}

/// What the policies let through, and which of them does.
fn allowed(installation: &Installation) -> BTreeSet<(String, Flow)> {
    let mut flows = BTreeSet::new();
    let pods = installation.set.pods();
    for policy in installation.set.of("NetworkPolicy") {
        for (kind, part, peers, way) in
            [("Ingress", "spec/ingress", "from", Way::Into), ("Egress", "spec/egress", "to", Way::OutOf)]
        {
            if !list(policy.at("spec/policyTypes")).iter().any(|closed| closed == kind) {
                continue;
            }
            for rule in list(policy.at(part)) {
                let others = if list(&rule[peers]).is_empty() {
                    vec!["anybody".to_owned()]
                } else {
                    list(&rule[peers]).iter().flat_map(|peer| others(&pods, peer)).collect()
                };
                for pod in pods.iter().filter(|pod| selects(policy.at("spec/podSelector"), pod.labels)) {
                    for other in &others {
                        for port in ports(&rule["ports"]) {
                            let pod = pod.name().to_owned();
                            flows.insert((policy.id(), Flow { pod, way, other: other.clone(), port }));
                        }
                    }
                }
            }
        }
    }
    flows
}

fn ports(ports: &Value) -> Vec<String> {
    if list(ports).is_empty() {
        return vec!["any port".to_owned()];
    }
    let ports = list(ports).iter().map(|port| {
        let number =
            port["port"].as_u64().map_or_else(|| text(&port["port"]).to_owned(), |number| number.to_string());
        let end = port["endPort"].as_u64().map(|end| format!("-{end}")).unwrap_or_default();
        match text(&port["protocol"]) {
            "" | "TCP" => format!("{number}{end}"),
            other => format!("{number}{end}/{other}"),
        }
    });
    ports.collect()
}

/// Whom a peer names: parts of the set one by one, all others in words.
fn others(pods: &[Pod], peer: &Value) -> Vec<String> {
    let cidr = text(at(peer, "ipBlock/cidr"));
    if !cidr.is_empty() {
        let except: Vec<_> = list(at(peer, "ipBlock/except")).iter().map(text).collect();
        let bits = cidr.rsplit_once('/').and_then(|(_, bits)| bits.parse::<u32>().ok()).unwrap_or_default();
        let wide = bits < 16;
        return vec![match (wide, PRIVATE.iter().all(|network| except.contains(network))) {
            (false, _) => OUTSIDE.to_owned(),
            (true, true) => INTERNET.to_owned(),
            (true, false) => format!("all of {cidr}, other pods and the cloud's metadata included,"),
        }];
    }
    let (namespaces, selector) = (&peer["namespaceSelector"], &peer["podSelector"]);
    if namespaces.is_object() {
        let labels = |selector: &Value| {
            let labels =
                entries(&selector["matchLabels"]).map(|(name, value)| format!("{name}={}", text(value)));
            labels.collect::<Vec<_>>().join(",")
        };
        let namespace = text(&namespaces["matchLabels"]["kubernetes.io/metadata.name"]);
        let namespace = if namespace.is_empty() {
            "any namespace".to_owned()
        } else {
            format!("the namespace {namespace}")
        };
        let who = if selector.is_object() { labels(selector) } else { "every pod".to_owned() };
        return vec![format!("{who} in {namespace}")];
    }
    if entries(selector).next().is_none() {
        return vec!["every pod of the namespace".to_owned()];
    }
    let selected: Vec<_> =
        pods.iter().filter(|pod| selects(selector, pod.labels)).map(|pod| named(pod.name())).collect();
    if selected.is_empty() { vec![format!("pods that do not exist ({selector})")] } else { selected }
}
