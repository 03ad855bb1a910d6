//! The end of a pod: what it takes fits into what Kubernetes gives, and one follows the other.

use crate::{
    Installation,
    rules::number,
    set::{Container, at},
    settings::Service,
};

/// For what is left when the settings' times are over, and the time that the kubelet takes.
const ROOM: u64 = 20;

/// How long an orderly end takes by its settings.
fn orderly_end(container: &Container, service: &Service) -> Option<u64> {
    let parts = match container.program() {
        "api" => ["SHUTDOWN_WAIT_SECONDS", "SHUTDOWN_GRACE_SECONDS"],
        _ => ["DRAIN_WAIT_SECONDS", "DRAIN_WINDOW_SECONDS"],
    };
    parts.iter().map(|part| number(container, service, part)).sum()
}

pub fn ends_fit_into_the_grace_period(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    for (container, service) in installation.serving() {
        let id = container.id();
        let grace = container.pod.spec["terminationGracePeriodSeconds"].as_u64().unwrap_or(30);
        let hook = at(container.body, "lifecycle/preStop");
        let sleep = at(hook, "sleep/seconds").as_u64().unwrap_or_default();
        if !at(hook, "exec").is_null() {
            findings.push(format!("{id}: its preStop hook runs a command, and the image has no shell"));
        }
        if let Some(end) = orderly_end(&container, service)
            && sleep + end + ROOM > grace
        {
            findings.push(format!(
                "{id}: preStop {sleep} s, its own wait and end of {end} s and {ROOM} s of room do not fit into terminationGracePeriodSeconds {grace}"
            ));
        }
        if number(&container, service, "TERMINATION_GRACE_SECONDS") != Some(grace) {
            findings.push(format!(
                "{id}: TERMINATION_GRACE_SECONDS is not what terminationGracePeriodSeconds is, {grace}"
            ));
        }
    }
    findings
}

pub fn gateways_part_one_after_the_other(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    for (container, service) in installation.serving() {
        let owner = container.pod.owner;
        let rollout = owner.at("spec/strategy/rollingUpdate");
        if rollout["maxUnavailable"] != 0 || rollout["maxSurge"] == 0 || rollout["maxSurge"].is_null() {
            findings.push(format!(
                "{}: a rollout must start the new pod before the old one goes (maxUnavailable 0, maxSurge 1 or more)",
                owner.id()
            ));
        }
        let end = orderly_end(&container, service).unwrap_or_default();
        if container.program() == "stream-gateway" {
            if owner.at("spec/minReadySeconds").as_u64().unwrap_or_default() < end {
                findings.push(format!(
                    "{}: minReadySeconds is less than the {end} s in which a gateway parts from its streams, so several would at once",
                    owner.id()
                ));
            }
            if rollout["maxSurge"] != 1 {
                findings
                    .push(format!("{}: maxSurge is not 1, so several gateways would go at once", owner.id()));
            }
        }
    }
    findings
}
