//! Whether the parts of the set find each other: names, selectors, ports, references, mounted files.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::{
    Installation,
    set::{Container, Pod, Variable, address, at, entries, list, selects, text},
};

pub fn names_are_unique_and_in_the_namespace(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    let mut seen = BTreeSet::new();
    let namespace = installation.set.of("Namespace").next().map(|namespace| namespace.name.as_str());
    for object in &installation.set.objects {
        if !seen.insert((&object.kind, &object.name)) {
            findings.push(format!("{}: there are two of it", object.id()));
        }
        if object.kind != "Namespace" && object.at("metadata/namespace").as_str() != namespace {
            findings.push(format!("{}: it is not in the namespace of the set", object.id()));
        }
    }
    findings
}

/// Rules about our binaries find them by their images: a set in which they find none must not pass for sound.
pub fn the_product_is_whole(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    for name in installation.services.keys() {
        if !installation.serving().any(|(container, _)| container.program() == *name) {
            findings.push(format!("nothing runs {name}: no container's image has this name"));
        }
    }
    if !installation.ours().any(|(container, _)| container.command() == "migrate") {
        findings.push("nothing runs `api migrate`".to_owned());
    }
    findings
}

pub fn selectors_select(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    let pods = installation.set.pods();
    for object in &installation.set.objects {
        let id = object.id();
        let selects_nobody = |selector: &Value| !pods.iter().any(|pod| selects(selector, pod.labels));
        match object.kind.as_str() {
            "Deployment" | "StatefulSet" | "DaemonSet" => {
                if !selects(object.at("spec/selector"), object.at("spec/template/metadata/labels")) {
                    findings.push(format!("{id}: its selector does not select its own pods"));
                }
                // Nobody else's either, or two controllers would fight over them.
                for pod in pods.iter().filter(|pod| pod.owner.id() != id) {
                    if selects(object.at("spec/selector"), pod.labels) {
                        findings
                            .push(format!("{id}: its selector selects the pods of {} too", pod.owner.id()));
                    }
                }
            }
            "Service" => {
                let owners: BTreeSet<_> = installation.set.behind(object).map(|pod| pod.owner.id()).collect();
                if owners.len() != 1 {
                    findings.push(format!(
                        "{id}: its selector selects the pods of {} workloads, and one is meant",
                        owners.len()
                    ));
                }
            }
            "PodDisruptionBudget" if selects_nobody(object.at("spec/selector")) => {
                findings.push(format!("{id}: its selector selects nobody"));
            }
            "NetworkPolicy" if selects_nobody(object.at("spec/podSelector")) => {
                findings.push(format!("{id}: its podSelector selects nobody"));
            }
            _ => {}
        }
    }
    findings
}

pub fn ports_exist(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    for service in installation.set.of("Service") {
        for port in list(service.at("spec/ports")) {
            let target = if port["targetPort"].is_null() { &port["port"] } else { &port["targetPort"] };
            for pod in installation.set.behind(service) {
                if pod.port(target).is_none() {
                    findings.push(format!(
                        "{}: its targetPort {target} is no port of {}",
                        service.id(),
                        pod.owner.id()
                    ));
                }
            }
        }
    }
    for pod in installation.set.pods() {
        let id = pod.owner.id();
        let scraped = &at(pod.template, "metadata/annotations")["prometheus.io/port"];
        if let Some(port) = scraped.as_str()
            && pod.port(&port.parse::<u64>().unwrap_or_default().into()).is_none()
        {
            findings.push(format!("{id}: Prometheus is told port {port}, which it does not have"));
        }
        let mut names = BTreeSet::new();
        for container in pod.containers() {
            for port in list(&container.body["ports"]) {
                if !names.insert(port["name"].to_string()) || !names.insert(port["containerPort"].to_string())
                {
                    findings.push(format!(
                        "{id}: two of its ports are called {} or are {}",
                        port["name"], port["containerPort"]
                    ));
                }
            }
            for (name, _) in entries(container.body).filter(|(name, _)| name.ends_with("Probe")) {
                for kind in ["httpGet", "tcpSocket", "grpc"] {
                    let port = at(container.body, &format!("{name}/{kind}/port"));
                    if !port.is_null() && pod.port(port).is_none() {
                        findings.push(format!(
                            "{}: its {name} asks port {port}, which it does not have",
                            container.id()
                        ));
                    }
                }
            }
        }
    }
    findings.extend(
        installation.serving().flat_map(|(container, service)| listeners(installation, &container, service)),
    );
    findings
}

/// What a service of ours listens at is what its container says, reachable from outside of the pod.
fn listeners(
    installation: &Installation,
    container: &Container,
    service: &crate::settings::Service,
) -> Vec<String> {
    let id = container.id();
    let mut findings = Vec::new();
    let mut open = BTreeSet::new();
    for name in service.settings.keys().filter(|name| *name == "LISTEN" || name.ends_with("_LISTEN")) {
        let default = service.settings[name].clone().unwrap_or_default();
        let listens = container.value(name).unwrap_or(default);
        let (host, port) = listens.rsplit_once(':').unwrap_or_default();
        if !["0.0.0.0", "[::]"].contains(&host) {
            findings.push(format!("{id}: {name} is {listens}, where nobody outside of the pod can reach it"));
        }
        let port: u64 = port.parse().unwrap_or_default();
        open.insert(port);
        if container.pod.port(&port.into()).is_none() {
            findings.push(format!("{id}: {name} is port {port}, which is none of its ports"));
        }
    }
    for port in list(&container.body["ports"]) {
        if !port["containerPort"].as_u64().is_some_and(|port| open.contains(&port)) {
            findings.push(format!("{id}: nothing listens at its port {}", port["containerPort"]));
        }
    }
    if let Some(url) = container.value("API_INTERNAL_URL") {
        let asked = address(&url).and_then(|(_, host, port)| {
            let service = installation.set.find("Service", host)?;
            installation.set.targets(service, &port.into()).pop()
        });
        let internal = asked.is_some_and(|(pod, port)| {
            let listens = pod.containers().filter_map(|container| container.value("INTERNAL_LISTEN"));
            listens.into_iter().any(|listens| listens.ends_with(&format!(":{port}")))
        });
        if !internal {
            findings.push(format!("{id}: API_INTERNAL_URL {url} does not lead to api's internal listener"));
        }
    }
    findings
}

/// A key of a Secret or `ConfigMap` that something refers to; an empty key is all of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Reference {
    by: String,
    kind: &'static str,
    name: String,
    key: String,
}

fn references(installation: &Installation) -> Vec<Reference> {
    let mut found = Vec::new();
    let mut add = |by: String, kind: &'static str, name: &Value, key: &Value| {
        if !name.is_null() {
            found.push(Reference { by, kind, name: text(name).to_owned(), key: text(key).to_owned() });
        }
    };
    for pod in installation.set.pods() {
        for container in pod.containers() {
            for source in list(&container.body["envFrom"]) {
                add(container.id(), "ConfigMap", at(source, "configMapRef/name"), &Value::Null);
                add(container.id(), "Secret", at(source, "secretRef/name"), &Value::Null);
            }
            for variable in list(&container.body["env"]) {
                for (place, kind) in [("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")] {
                    let from = at(variable, &format!("valueFrom/{place}"));
                    add(container.id(), kind, &from["name"], &from["key"]);
                }
            }
        }
        for secret in list(&pod.spec["imagePullSecrets"]) {
            add(pod.owner.id(), "Secret", &secret["name"], &".dockerconfigjson".into());
        }
        for (volume, kind, source, name) in sources(&pod) {
            let items = list(&source["items"]);
            let by = || format!("{}, volume {}", pod.owner.id(), text(&volume["name"]));
            items.iter().for_each(|item| add(by(), kind, name, &item["key"]));
            if items.is_empty() {
                add(by(), kind, name, &Value::Null);
            }
        }
    }
    for ingress in installation.set.of("Ingress") {
        for tls in list(ingress.at("spec/tls")) {
            for key in ["tls.crt", "tls.key"] {
                add(ingress.id(), "Secret", &tls["secretName"], &key.into());
            }
        }
    }
    found
}

/// A pod's volumes that are made of a `ConfigMap` or a Secret: volume, kind, source, name.
fn sources<'a>(pod: &Pod<'a>) -> Vec<(&'a Value, &'static str, &'a Value, &'a Value)> {
    let volumes = list(&pod.spec["volumes"]).iter();
    let sources = volumes.filter_map(|volume| {
        let (config, secret) = (&volume["configMap"], &volume["secret"]);
        if config.is_object() {
            Some((volume, "ConfigMap", config, &config["name"]))
        } else {
            secret.is_object().then_some((volume, "Secret", secret, &secret["secretName"]))
        }
    });
    sources.collect()
}

/// The keys of a `ConfigMap` or Secret: those in the set, or those that the operator provides.
fn keys(installation: &Installation, kind: &str, name: &str) -> Option<Vec<String>> {
    if let Some(object) = installation.set.find(kind, name) {
        let keys = ["data", "stringData", "binaryData"].iter().flat_map(|part| entries(&object.body[*part]));
        return Some(keys.map(|(key, _)| key.to_owned()).collect());
    }
    let start = format!("{kind}/{name}/");
    let keys: Vec<_> = installation
        .provided
        .iter()
        .filter_map(|line| line.strip_prefix(&start))
        .map(str::to_owned)
        .collect();
    (!keys.is_empty()).then_some(keys)
}

pub fn references_lead_somewhere(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    let references = references(installation);
    for Reference { by, kind, name, key } in &references {
        match keys(installation, kind, name) {
            None => findings.push(format!(
                "{by}: it refers to {kind}/{name}, which is neither in the set nor in provided.list"
            )),
            Some(keys) if !key.is_empty() && !keys.contains(key) => {
                findings.push(format!(
                    "{by}: it refers to the key {key} of {kind}/{name}, which has {}",
                    keys.join(", ")
                ));
            }
            Some(_) => {}
        }
    }
    for line in &installation.provided {
        let used = references.iter().any(|Reference { kind, name, key, .. }| {
            *line == format!("{kind}/{name}/{key}")
                || (key.is_empty() && line.starts_with(&format!("{kind}/{name}/")))
        });
        if !used {
            findings.push(format!("provided.list: nothing refers to {line}"));
        }
    }
    for pod in installation.set.pods() {
        let id = pod.owner.id();
        let account = text(&pod.spec["serviceAccountName"]);
        if !account.is_empty() && installation.set.find("ServiceAccount", account).is_none() {
            findings.push(format!("{id}: its ServiceAccount {account} does not exist"));
        }
        if installation.services.contains_key(pod.name()) && account.is_empty() {
            findings.push(format!("{id}: it has no ServiceAccount of its own"));
        }
        let claims = list(pod.owner.at("spec/volumeClaimTemplates"))
            .iter()
            .map(|claim| text(at(claim, "metadata/name")));
        let volumes: BTreeSet<_> =
            list(&pod.spec["volumes"]).iter().map(|volume| text(&volume["name"])).chain(claims).collect();
        let mounts: BTreeSet<_> = pod
            .containers()
            .flat_map(|container| list(&container.body["volumeMounts"]))
            .map(|mount| text(&mount["name"]))
            .collect();
        for name in mounts.difference(&volumes) {
            findings.push(format!("{id}: it mounts the volume {name}, which it does not have"));
        }
        for name in volumes.difference(&mounts) {
            findings.push(format!("{id}: nobody mounts its volume {name}"));
        }
        let headless = text(pod.owner.at("spec/serviceName"));
        if !headless.is_empty() && installation.set.find("Service", headless).is_none() {
            findings.push(format!("{id}: its Service {headless} does not exist"));
        }
    }
    findings
}

/// Files that settings name are there: a key of what is mounted.
pub fn files_are_mounted(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    for (container, _) in installation.ours() {
        let files = mounted_files(installation, &container);
        let mut named: Vec<(String, String)> = Vec::new();
        for (name, value) in container.environment() {
            // Keys, certificates, and the secrets that are given in files.
            let Variable::Text(value) = value else { continue };
            if name.ends_with("_FILE") || name.ends_with("_FILES") {
                let files = value.split(',').map(str::trim).filter(|file| !file.is_empty());
                named.extend(files.map(|file| (name.clone(), file.to_owned())));
            }
        }
        let database = container.value("DATABASE_URL").unwrap_or_default();
        let root = database.split(['?', '&']).find_map(|part| part.strip_prefix("sslrootcert="));
        named.extend(root.map(|file| ("DATABASE_URL".to_owned(), file.to_owned())));
        for (setting, file) in named {
            // The image's own trust.
            if !file.starts_with("/etc/ssl/") && !files.contains(&file) {
                findings.push(format!(
                    "{}: {setting} names {file}, and nothing is mounted there",
                    container.id()
                ));
            }
        }
        for folder in
            container.value("SSL_CERT_DIR").unwrap_or_default().split(':').filter(|folder| !folder.is_empty())
        {
            if folder != "/etc/ssl/certs" && !files.iter().any(|file| file.starts_with(&format!("{folder}/")))
            {
                findings.push(format!(
                    "{}: SSL_CERT_DIR names {folder}, and nothing is mounted there",
                    container.id()
                ));
            }
        }
    }
    findings
}

fn mounted_files(installation: &Installation, container: &Container) -> BTreeSet<String> {
    let mut files = BTreeSet::new();
    let sources = sources(&container.pod);
    for mount in list(&container.body["volumeMounts"]) {
        let Some((_, kind, source, name)) =
            sources.iter().find(|(volume, ..)| volume["name"] == mount["name"])
        else {
            continue;
        };
        let folder = text(&mount["mountPath"]).trim_end_matches('/');
        let items = list(&source["items"]);
        if items.is_empty() {
            files.extend(
                keys(installation, kind, text(name))
                    .unwrap_or_default()
                    .iter()
                    .map(|key| format!("{folder}/{key}")),
            );
        }
        files.extend(items.iter().map(|item| format!("{folder}/{}", text(&item["path"]))));
    }
    files
}
