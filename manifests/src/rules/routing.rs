//! The ingress: exactly the stream's path to the gateways, everything else to api, nothing to any other port.

use std::collections::BTreeSet;

use crate::{
    Installation,
    rules::number,
    set::{at, list, text},
};

const STREAM: &str = "/api/messages";

pub fn the_ingress_routes_the_stream_and_nothing_more(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    let origin =
        installation.serving().find_map(|(container, _)| container.value("ORIGIN")).unwrap_or_default();
    let (scheme, host) = origin.split_once("://").unwrap_or_default();
    let host = host.split(':').next().unwrap_or_default();
    let mut routes = BTreeSet::new();
    for ingress in installation.set.of("Ingress") {
        let id = ingress.id();
        if text(ingress.at("spec/ingressClassName")).is_empty() {
            findings.push(format!("{id}: it has no ingressClassName"));
        }
        if !ingress.at("spec/defaultBackend").is_null() {
            findings.push(format!("{id}: a default backend gets what no rule names"));
        }
        let secured = list(ingress.at("spec/tls"));
        let hosts = secured.iter().flat_map(|tls| list(&tls["hosts"])).map(text);
        if scheme == "https" && !hosts.clone().any(|secured| secured == host) {
            findings.push(format!("{id}: ORIGIN is {origin}, and it has no TLS for {host}"));
        }
        let mut streams = false;
        for rule in list(ingress.at("spec/rules")) {
            if scheme == "https" && text(&rule["host"]) != host {
                findings
                    .push(format!("{id}: ORIGIN is {origin}, and a rule is for {:?}", text(&rule["host"])));
            }
            for path in list(at(rule, "http/paths")) {
                let (route, kind) = (text(&path["path"]), text(&path["pathType"]));
                let targets = installation.set.backends(path);
                let Some((pod, number)) = targets.first() else {
                    findings.push(format!(
                        "{id}: {route} leads to a service or port that does not exist, or to no pod"
                    ));
                    continue;
                };
                let public = pod.containers().any(|container| {
                    let listens = container.value("LISTEN").unwrap_or_default();
                    listens.ends_with(&format!(":{number}"))
                });
                if !public {
                    findings.push(format!(
                        "{id}: {route} leads to port {number} of {}, which is not for clients",
                        pod.owner.id()
                    ));
                }
                let to_gateway = pod.containers().any(|container| container.program() == "stream-gateway");
                streams |= to_gateway;
                let right = if to_gateway {
                    (route, kind) == (STREAM, "Exact")
                } else {
                    (route, kind) == ("/", "Prefix")
                };
                if !right {
                    findings.push(format!("{id}: {route} ({kind}) must not lead to {}", pod.owner.id()));
                }
                routes.insert(if to_gateway { STREAM } else { "/" });
            }
        }
        if text(ingress.at("spec/ingressClassName")) == "nginx" {
            findings.extend(nginx(installation, ingress, streams));
        }
    }
    for route in [STREAM, "/"] {
        if !routes.contains(route) {
            findings.push(format!("no Ingress routes {route}"));
        }
    }
    findings
}

fn nginx(installation: &Installation, ingress: &crate::set::Object, streams: bool) -> Vec<String> {
    let mut findings = Vec::new();
    let annotation = |name: &str| {
        text(&ingress.at("metadata/annotations")[format!("nginx.ingress.kubernetes.io/{name}")]).to_owned()
    };
    if annotation("enable-access-log") != "false" {
        findings.push(format!("{}: its access log would hold tokens and codes", ingress.id()));
    }
    if streams {
        if annotation("proxy-buffering") != "off" {
            findings.push(format!("{}: proxy-buffering must be off", ingress.id()));
        }
        let idle = installation
            .serving()
            .filter(|(container, _)| container.program() == "stream-gateway")
            .find_map(|(container, service)| number(&container, service, "PROXY_IDLE_SECONDS"));
        if annotation("proxy-read-timeout").parse::<u64>().ok() < idle {
            findings.push(format!(
                "{}: proxy-read-timeout is below what gateways are told (PROXY_IDLE_SECONDS)",
                ingress.id()
            ));
        }
    }
    findings
}
