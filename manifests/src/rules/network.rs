//! Network policies allow exactly the flows that settings and ingresses need, at both ends.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::{Findings, Installation, Pod, address, at, each, entries, selects, text, texts};

const INGRESS: &str = "app.kubernetes.io/name=ingress-nginx in ingress-nginx";
const PROMETHEUS: &str = "app.kubernetes.io/name=prometheus in monitoring";
const COLLECTOR: &str = "app.kubernetes.io/name=opentelemetry-collector in monitoring";
const DNS: &str = "k8s-app=kube-dns in kube-system";
const UDP: &str = r#"{"port":53,"protocol":"UDP"}"#;
const OUTSIDE: &str = "a network outside";
const INTERNET: &str = "the internet";
/// Not the internet: pods, machines, and the metadata service of clouds, which gives away credentials.
const PRIVATE: [&str; 5] =
    ["10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"];
/// Settings that make api call an external host.
const LOGINS: [&str; 3] = ["GITHUB_CLIENT_ID", "OIDC_ISSUER", "EXTERNAL_JWKS_URL"];

/// One end of a connection: the pod, whether it is called or calls, its peer and the port.
type Flow = (String, &'static str, String, String);

pub(super) fn flows(set: &Installation, out: &mut Findings) {
    let (needed, allowed) = (needed(set), allowed(set));
    for flow @ (pod, way, peer, port) in &needed {
        let holds = allowed.iter().any(|(_, allowed)| allowed == flow);
        out.must("NetworkPolicy", holds, format!("{pod} {way} {peer} at {port} is not allowed"));
    }
    for (policy, flow @ (pod, way, peer, port)) in &allowed {
        let holds = needed.contains(flow);
        out.must(policy, holds, format!("{pod} {way} {peer} at {port} is allowed, but not needed"));
    }
    for pod in set.pods() {
        for kind in ["Ingress", "Egress"] {
            let closed = set.of("NetworkPolicy").any(|policy| {
                texts(&policy.body, "spec/policyTypes/*").contains(&kind)
                    && selects(policy.at("spec/podSelector"), pod.labels)
            });
            out.must(pod.id(), closed, format!("no NetworkPolicy closes its {kind}"));
        }
    }
}

fn needed(set: &Installation) -> BTreeSet<Flow> {
    let mut flows = BTreeSet::new();
    let mut add = |pod: &Pod, way, peer: &str, port: &str| {
        flows.insert((pod.name().to_owned(), way, peer.to_owned(), port.to_owned()));
    };
    for (pod, _) in set.ours() {
        if let Some(port) = pod.listens("OPS_LISTEN") {
            add(&pod, "from", PROMETHEUS, &port.to_string());
        }
        let ports = [5_432, 6_379, 26_379, 80];
        for (name, usual) in
            ["DATABASE_URL", "REDIS_URL", "REDIS_SENTINELS", "API_INTERNAL_URL"].iter().zip(ports)
        {
            for url in pod.value(name).into_iter().flat_map(|urls| urls.split(',')) {
                ["53", UDP].iter().for_each(|port| add(&pod, "to", DNS, port));
                let (_, host, port) = address(url.trim()).unwrap_or(("", "", usual));
                if set.find("Service", host).is_none() {
                    add(&pod, "to", OUTSIDE, &port.to_string());
                }
                for (target, port) in set.targets(host, &port.into()) {
                    add(&pod, "to", target.name(), &port.to_string());
                    add(&target, "from", pod.name(), &port.to_string());
                }
            }
        }
        if let Some(url) = pod.value("OTEL_EXPORTER_OTLP_ENDPOINT") {
            add(&pod, "to", COLLECTOR, &address(url).map_or(443, |(_, _, port)| port).to_string());
        }
        if LOGINS.iter().any(|name| pod.value(name).is_some()) {
            add(&pod, "to", INTERNET, "443");
        }
    }
    for path in set.of("Ingress").flat_map(|it| each(&it.body, "spec/rules/*/http/paths/*")) {
        for (target, port) in set.backends(path) {
            add(&target, "from", INGRESS, &port.to_string());
        }
    }
    flows
}

fn allowed(set: &Installation) -> BTreeSet<(&str, Flow)> {
    let mut flows = BTreeSet::new();
    for policy in set.of("NetworkPolicy") {
        for (part, way) in [("spec/ingress/*", "from"), ("spec/egress/*", "to")] {
            for rule in each(&policy.body, part) {
                let named = each(rule, &format!("{way}/*"));
                let mut peers: Vec<_> = named.iter().flat_map(|peer| peers(set, peer)).collect();
                if named.is_empty() {
                    peers.push("anywhere".to_owned());
                }
                for pod in set.pods().filter(|pod| selects(policy.at("spec/podSelector"), pod.labels)) {
                    let all =
                        peers.iter().flat_map(|peer| ports(rule).into_iter().map(move |port| (peer, port)));
                    let all = all.map(|(peer, port)| (pod.name().to_owned(), way, peer.clone(), port));
                    flows.extend(all.map(|flow| (policy.id.as_str(), flow)));
                }
            }
        }
    }
    flows
}

fn ports(rule: &Value) -> Vec<String> {
    let ports = each(rule, "ports/*").into_iter().map(|port| {
        let tcp = entries(port).all(|(name, value)| name == "port" || value == "TCP");
        if tcp { port["port"].to_string() } else { port.to_string() }
    });
    if rule["ports"].is_null() { vec!["any port".to_owned()] } else { ports.collect() }
}

/// The pods of the set one by one, all others in words.
fn peers(set: &Installation, peer: &Value) -> Vec<String> {
    let (namespaces, pods) = (&peer["namespaceSelector"], &peer["podSelector"]);
    if let Some(cidr) = at(peer, "ipBlock/cidr").as_str() {
        let narrow = cidr.rsplit_once('/').and_then(|(_, bits)| bits.parse().ok()) >= Some(16);
        let except = texts(peer, "ipBlock/except/*");
        let public = PRIVATE.iter().all(|network| except.contains(network));
        let wide = if public { INTERNET.to_owned() } else { format!("all of {cidr}") };
        return vec![if narrow { OUTSIDE.to_owned() } else { wide }];
    }
    if namespaces.is_object() {
        let namespace = text(&namespaces["matchLabels"]["kubernetes.io/metadata.name"]);
        let labels: Vec<_> =
            entries(&pods["matchLabels"]).map(|(name, value)| format!("{name}={}", text(value))).collect();
        return vec![format!("{} in {namespace}", labels.join(","))];
    }
    if entries(pods).next().is_none() {
        return vec!["every pod of the namespace".to_owned()];
    }
    set.pods().filter(|pod| selects(pods, pod.labels)).map(|pod| pod.name().to_owned()).collect()
}
