//! Pod Security `restricted`, and what goes beyond it: no token, a root file system that cannot be written to, images that are
//! told apart, and nothing secret in the tree.

use serde_json::Value;

use crate::{
    Installation,
    set::{Container, at, entries, list, text},
};

/// The kinds of volume that `restricted` allows.
const VOLUMES: [&str; 8] = [
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
];

pub fn pods_are_restricted(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    for namespace in installation.set.of("Namespace") {
        let label = "pod-security.kubernetes.io/enforce";
        if at(&namespace.body, "metadata/labels")[label] != "restricted" {
            findings.push(format!("{}: {label} must be restricted", namespace.id()));
        }
    }
    if installation.set.of("Namespace").count() != 1 {
        findings.push("the set must have one Namespace".to_owned());
    }
    for account in installation.set.of("ServiceAccount") {
        if account.body["automountServiceAccountToken"] != false {
            findings.push(format!("{}: automountServiceAccountToken must be false", account.id()));
        }
    }
    for pod in installation.set.pods() {
        let id = pod.owner.id();
        let mut must = |holds: bool, what: &str| {
            if !holds {
                findings.push(format!("{id}: {what}"));
            }
        };
        for name in ["hostNetwork", "hostPID", "hostIPC"] {
            must(pod.spec[name] != true, &format!("{name} must not be used"));
        }
        must(pod.spec["automountServiceAccountToken"] == false, "automountServiceAccountToken must be false");
        must(
            pod.spec["enableServiceLinks"] == false,
            "enableServiceLinks must be false: the environment is for settings",
        );
        for volume in list(&pod.spec["volumes"]) {
            let kinds = entries(volume).map(|(kind, _)| kind).filter(|kind| *kind != "name");
            for kind in kinds.filter(|kind| !VOLUMES.contains(kind)) {
                must(
                    false,
                    &format!(
                        "volume {} is a {kind}, which restricted pods may not have",
                        text(&volume["name"])
                    ),
                );
            }
        }
        for sysctl in list(at(pod.spec, "securityContext/sysctls")) {
            must(false, &format!("the sysctl {} is not for restricted pods", text(&sysctl["name"])));
        }
        for container in pod.containers() {
            restricted(&container, &mut findings);
        }
    }
    findings
}

fn restricted(container: &Container, findings: &mut Vec<String>) {
    let own = &container.body["securityContext"];
    let pods = &container.pod.spec["securityContext"];
    // What a container says counts before what its pod says.
    let effective = |path: &str| match at(own, path) {
        Value::Null => at(pods, path),
        value => value,
    };
    let drops = list(at(own, "capabilities/drop"));
    let adds = list(at(own, "capabilities/add"));
    let ports = list(&container.body["ports"]);
    let image = text(&container.body["image"]);
    let tag = image.rsplit('/').next().and_then(|name| name.split_once([':', '@'])).map(|(_, tag)| tag);
    let rules = [
        (effective("runAsNonRoot") == true, "runAsNonRoot must be true"),
        (
            effective("runAsUser").as_u64().is_some_and(|user| user > 0),
            "runAsUser must be a number other than 0",
        ),
        (
            ["RuntimeDefault", "Localhost"].contains(&text(effective("seccompProfile/type"))),
            "seccompProfile must be RuntimeDefault",
        ),
        (own["allowPrivilegeEscalation"] == false, "allowPrivilegeEscalation must be false"),
        (own["readOnlyRootFilesystem"] == true, "readOnlyRootFilesystem must be true"),
        (own["privileged"] != true, "it must not be privileged"),
        (drops.iter().any(|name| name == "ALL"), "capabilities must drop ALL"),
        (adds.iter().all(|name| name == "NET_BIND_SERVICE"), "capabilities must not be added"),
        (own["procMount"].is_null() || own["procMount"] == "Default", "procMount must be Default"),
        (ports.iter().all(|port| port["hostPort"].is_null()), "it must take no port of its node"),
        (tag.is_some_and(|tag| tag != "latest"), "its image must have a tag other than latest, or a digest"),
    ];
    let broken = rules.iter().filter(|(holds, _)| !holds);
    findings.extend(broken.map(|(_, what)| format!("{}: {what}", container.id())));
}

pub fn nothing_secret_is_in_the_set(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    for secret in installation.set.of("Secret") {
        findings.push(format!(
            "{}: a Secret must not be in the tree; put its name into provided.list",
            secret.id()
        ));
    }
    for object in &installation.set.objects {
        // Of whatever kind of key: what is between such lines is one.
        if object.body.to_string().contains("PRIVATE KEY-----") {
            findings.push(format!("{}: it holds a private key", object.id()));
        }
    }
    findings
}

/// One schema, one version: the migration that runs is the one that api needs.
pub fn a_program_has_one_image(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    let mut images: Vec<_> =
        installation.ours().map(|(container, _)| (container.program(), container)).collect();
    images.sort_by_key(|(program, container)| (*program, container.id()));
    for pair in images.windows(2) {
        if pair[0].0 == pair[1].0 && pair[0].1.body["image"] != pair[1].1.body["image"] {
            findings.push(format!("{} and {} must run the same image", pair[0].1.id(), pair[1].1.id()));
        }
    }
    findings
}
