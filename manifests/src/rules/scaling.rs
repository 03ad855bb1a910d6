//! How many there are: by whom it is said, whether the bounds make sense, and whether what is measured exists.

use crate::{
    Installation,
    rules::number,
    set::{Object, at, list, selects, text},
};

/// Postgres's `max_connections`, where nobody raised it, less those that it keeps for its owner.
const POSTGRES_CONNECTIONS: u64 = 97;

fn autoscaler_of<'a>(installation: &'a Installation, owner: &Object) -> Option<&'a Object> {
    installation.set.of("HorizontalPodAutoscaler").find(|autoscaler| {
        let target = autoscaler.at("spec/scaleTargetRef");
        target["kind"] == owner.kind.as_str() && target["name"] == owner.name.as_str()
    })
}

pub fn numbers_of_replicas_make_sense(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    for autoscaler in installation.set.of("HorizontalPodAutoscaler") {
        let id = autoscaler.id();
        let bound = |name: &str| autoscaler.at(&format!("spec/{name}")).as_u64();
        let (least, most) = (bound("minReplicas").unwrap_or(1), bound("maxReplicas").unwrap_or_default());
        if least > most {
            findings.push(format!("{id}: minReplicas {least} is above maxReplicas {most}"));
        }
        if least < 2 {
            findings.push(format!("{id}: minReplicas must be 2 or more, so that one can die"));
        }
        let patience = autoscaler.at("spec/behavior/scaleDown/stabilizationWindowSeconds");
        if patience.as_u64().unwrap_or_default() < 300 {
            findings.push(format!("{id}: it scales down too fast: a window of 300 s or more"));
        }
        let policies = list(autoscaler.at("spec/behavior/scaleDown/policies"));
        if !policies.iter().any(|policy| policy["type"] == "Pods" && policy["value"] == 1) {
            findings.push(format!("{id}: it must scale down one pod at a time"));
        }
        let target = autoscaler.at("spec/scaleTargetRef");
        match installation.set.find(text(&target["kind"]), text(&target["name"])) {
            None => findings.push(format!("{id}: what it scales does not exist")),
            Some(owner) if !owner.at("spec/replicas").is_null() => findings.push(format!(
                "{}: replicas are written down, so each apply would undo what its autoscaler did",
                owner.id()
            )),
            Some(_) => {}
        }
    }
    for (container, service) in installation.serving() {
        let owner = container.pod.owner;
        let autoscaler = autoscaler_of(installation, owner);
        let replicas = owner.at("spec/replicas").as_u64();
        if autoscaler.is_none() && replicas.is_none_or(|replicas| replicas < 2) {
            findings.push(format!("{}: nobody says that there are two or more of it", owner.id()));
        }
        if container.program() == "api" {
            let bound = autoscaler.and_then(|autoscaler| autoscaler.at("spec/maxReplicas").as_u64());
            let surge = owner.at("spec/strategy/rollingUpdate/maxSurge").as_u64().unwrap_or(1);
            let most = bound.or(replicas).unwrap_or(1) + surge;
            let pool = number(&container, service, "DATABASE_POOL_SIZE").unwrap_or_default();
            // One more asks whether Postgres answers.
            if most * (pool + 1) > POSTGRES_CONNECTIONS {
                findings.push(format!(
                    "{}: {most} replicas with DATABASE_POOL_SIZE {pool} want more than Postgres's {POSTGRES_CONNECTIONS} connections",
                    owner.id()
                ));
            }
        }
    }
    findings
}

pub fn autoscalers_measure_what_exists(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    for (series, _) in &installation.adapted {
        if !installation.gateway_metrics.contains(series) {
            findings.push(format!("k8s/prometheus-adapter/values.yaml: gateways have no metric {series}"));
        }
    }
    for (container, service) in installation.serving() {
        let owner = container.pod.owner;
        let Some(autoscaler) = autoscaler_of(installation, owner) else { continue };
        let id = autoscaler.id();
        let metrics = list(autoscaler.at("spec/metrics"));
        for metric in metrics {
            let name = text(at(metric, "pods/metric/name"));
            if !name.is_empty() && !installation.adapted.iter().any(|(_, offered)| offered == name) {
                findings.push(format!("{id}: no rule of prometheus-adapter offers {name}"));
            }
            let request = at(container.body, "resources/requests/cpu");
            if at(metric, "resource/name") == "cpu" && request.is_null() {
                findings.push(format!("{id}: a share of CPU needs a request of CPU in {}", owner.id()));
            }
        }
        if container.program() != "stream-gateway" {
            continue;
        }
        let streams =
            metrics.iter().find(|metric| at(metric, "pods/metric/name") == "messenger_gateway_streams");
        let Some(streams) = streams else {
            findings.push(format!(
                "{id}: gateways are scaled by messenger_gateway_streams: CPU says nothing about idle streams"
            ));
            continue;
        };
        let target = text(at(streams, "pods/target/averageValue")).parse::<u64>().unwrap_or_default();
        let least = autoscaler.at("spec/minReplicas").as_u64().unwrap_or(1).max(2);
        let room = number(&container, service, "MAX_STREAMS").unwrap_or_default();
        if target == 0 || target * least > room * (least - 1) {
            findings.push(format!(
                "{id}: when one of {least} gateways with {target} streams dies, the others have no room for them (MAX_STREAMS {room})"
            ));
        }
    }
    findings
}

pub fn pods_are_spread_and_guarded(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    for budget in installation.set.of("PodDisruptionBudget") {
        if budget.at("spec/maxUnavailable") == 0 || budget.at("spec/maxUnavailable") == "0%" {
            findings.push(format!("{}: it lets no node be emptied", budget.id()));
        }
        if let Some(least) = budget.at("spec/minAvailable").as_u64() {
            for (container, _) in installation.serving() {
                let owner = container.pod.owner;
                let autoscaler = autoscaler_of(installation, owner);
                let fewest =
                    autoscaler.map_or(owner.at("spec/replicas"), |scaler| scaler.at("spec/minReplicas"));
                if selects(budget.at("spec/selector"), container.pod.labels)
                    && fewest.as_u64().unwrap_or(1) <= least
                {
                    findings.push(format!("{}: it lets no node be emptied", budget.id()));
                }
            }
        }
    }
    for (container, _) in installation.serving() {
        let pod = container.pod;
        let id = pod.owner.id();
        let budgets = installation.set.of("PodDisruptionBudget");
        let budgets = budgets.filter(|budget| selects(budget.at("spec/selector"), pod.labels)).count();
        if budgets != 1 {
            findings.push(format!("{id}: {budgets} PodDisruptionBudgets select it, and one should"));
        }
        for key in ["topology.kubernetes.io/zone", "kubernetes.io/hostname"] {
            let spread = list(&pod.spec["topologySpreadConstraints"]);
            let spread = spread.iter().find(|spread| spread["topologyKey"] == key);
            if !spread.is_some_and(|spread| selects(&spread["labelSelector"], pod.labels)) {
                findings.push(format!("{id}: it is not spread over {key}"));
            }
        }
    }
    findings
}
