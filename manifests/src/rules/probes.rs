//! Probes mean what they say: started and alive by `/livez`, which asks nobody; ready by `/readyz`; both at the operators' port.

use crate::{
    Installation,
    set::{at, text},
};

pub fn probes_ask_operators_ports(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    for (container, _) in installation.serving() {
        let id = container.id();
        let listens = container.value("OPS_LISTEN").unwrap_or_default();
        let ops = listens.rsplit(':').next().and_then(|port| port.parse().ok());
        for (probe, path) in
            [("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")]
        {
            let asks = at(&container.body[probe], "httpGet");
            if text(&asks["path"]) != path {
                findings.push(format!("{id}: its {probe} must ask {path}"));
            }
            let port = container.pod.port(&asks["port"]);
            if !asks.is_null() && (port.is_none() || port != ops) {
                findings.push(format!("{id}: its {probe} must ask the port of OPS_LISTEN"));
            }
        }
    }
    findings
}
