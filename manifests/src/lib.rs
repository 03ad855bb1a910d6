//! Checks of rendered Kubernetes manifests that neither the schema validator nor checkov makes: whether the parts fit
//! together, and whether they fit the two services. What every API server refuses is left to it.

pub mod planted;
pub mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::{fmt::Display, fs, path::Path};

use anyhow::Context as _;
use serde_json::{Value, json};

/// One rendered overlay, and the facts that it must fit.
#[derive(Clone)]
pub struct Installation {
    pub objects: Vec<Object>,
    /// `kind/name/key` of each Secret and `ConfigMap` that the operator makes.
    pub provided: Vec<String>,
    /// By the last part of the image's name.
    pub services: BTreeMap<&'static str, SettingDefaults>,
    /// Series of a gateway, and its name for autoscalers, by the rules of prometheus-adapter.
    pub adapted: Vec<(String, String)>,
    /// docs/metrics.md, which is generated from the code.
    pub metrics: String,
}

/// Defaults by name. `None`: the setting has no default that fits a cluster.
pub type SettingDefaults = BTreeMap<String, Option<String>>;

#[derive(Clone)]
pub struct Object {
    pub id: String,
    pub kind: String,
    pub name: String,
    pub body: Value,
}

#[derive(Default)]
pub struct Findings(pub Vec<String>);

impl Findings {
    fn must(&mut self, of: impl Display, holds: bool, problem: impl Display) {
        if !holds {
            self.0.push(format!("{of}: {problem}"));
        }
    }
}

pub fn at<'a>(value: &'a Value, path: &str) -> &'a Value {
    value.pointer(&format!("/{path}")).unwrap_or(&Value::Null)
}

/// The values at a path in which `*` stands for each item of a list.
pub fn each<'a>(value: &'a Value, path: &str) -> Vec<&'a Value> {
    match path.split_once("/*") {
        Some((lists, rest)) => {
            let items = at(value, lists).as_array().into_iter().flatten();
            items.flat_map(|item| each(item, rest.trim_start_matches('/'))).collect()
        }
        None if path.is_empty() => vec![value],
        None => Some(at(value, path)).filter(|found| !found.is_null()).into_iter().collect(),
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

pub fn texts<'a>(value: &'a Value, path: &str) -> Vec<&'a str> {
    each(value, path).into_iter().map(text).collect()
}

pub fn entries(value: &Value) -> impl Iterator<Item = (&str, &Value)> {
    value.as_object().into_iter().flatten().map(|(name, value)| (name.as_str(), value))
}

pub fn read(path: &str) -> anyhow::Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// The settings of each service, from .env.example: a default is commented out.
pub fn services() -> anyhow::Result<BTreeMap<&'static str, SettingDefaults>> {
    let file = read(".env.example")?;
    let of = |service: &str| {
        let sections = file.split("\n# --- ").map(str::lines);
        let ours = |first: &str| first.to_lowercase().starts_with("both") || first.starts_with(service);
        let lines = sections.filter(|lines| lines.clone().next().is_some_and(ours)).flatten();
        let settings = lines.filter_map(|line| {
            let (name, value) = line.trim_start_matches("# ").split_once('=')?;
            let is_name = name.chars().all(|c| c.is_ascii_uppercase() || c == '_');
            is_name.then(|| (name.to_owned(), line.starts_with('#').then(|| value.to_owned())))
        });
        settings.collect()
    };
    Ok(["api", "stream-gateway"].map(|service| (service, of(service))).into())
}

/// Whether a selector selects these labels. An absent one selects nothing.
fn selects(selector: &Value, labels: &Value) -> bool {
    let by_labels = entries(&selector["matchLabels"]).all(|(name, value)| labels.get(name) == Some(value));
    let mut expressions = each(selector, "matchExpressions/*").into_iter();
    // The one operator that the manifests use; any other selects nothing, which the rules report.
    let by_expressions = expressions
        .all(|it| it["operator"] == "In" && texts(it, "values/*").contains(&text(&labels[text(&it["key"])])));
    selector.is_object() && by_labels && by_expressions
}

impl Object {
    pub fn new(body: Value) -> Self {
        let (kind, name) = (text(&body["kind"]).to_owned(), text(at(&body, "metadata/name")).to_owned());
        Self { id: format!("{kind}/{name}"), kind, name, body }
    }

    fn at(&self, path: &str) -> &Value {
        at(&self.body, path)
    }
}

impl Installation {
    pub fn read(overlay: &str, rendered: &str) -> anyhow::Result<Self> {
        let objects: Vec<Value> = serde_saphyr::from_multiple(rendered).context("invalid YAML")?;
        let provided = read(&format!("k8s/overlays/{overlay}/provided.list"))?;
        let provided = provided.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        let adapter: Value = serde_saphyr::from_str(&read("k8s/prometheus-adapter/values.yaml")?)?;
        let adapted = each(&adapter, "rules/custom/*").into_iter().map(|rule| {
            let series = text(&rule["seriesQuery"]).split('{').next().unwrap_or_default();
            (series.to_owned(), text(at(rule, "name/as")).to_owned())
        });
        Ok(Self {
            objects: objects.into_iter().filter(Value::is_object).map(Object::new).collect(),
            provided: provided.map(str::to_owned).collect(),
            services: services()?,
            adapted: adapted.collect(),
            metrics: read("docs/metrics.md")?,
        })
    }

    fn of<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Object> {
        self.objects.iter().filter(move |object| object.kind == kind)
    }

    fn find(&self, kind: &str, name: &str) -> Option<&Object> {
        self.objects.iter().find(|object| object.kind == kind && object.name == name)
    }

    fn pods(&self) -> impl Iterator<Item = Pod<'_>> {
        self.objects.iter().filter(|owner| owner.at("spec/template").is_object()).map(|owner| {
            let spec = owner.at("spec/template/spec");
            let (labels, container) = (owner.at("spec/template/metadata/labels"), at(spec, "containers/0"));
            Pod { set: self, owner, labels, spec, container }
        })
    }

    /// The pods that run one of the services, the migration included.
    fn ours(&self) -> impl Iterator<Item = (Pod<'_>, &SettingDefaults)> {
        self.pods().filter_map(|pod| Some((pod, self.services.get(pod.program())?)))
    }

    fn serving(&self) -> impl Iterator<Item = (Pod<'_>, &SettingDefaults)> {
        self.ours().filter(|(pod, _)| pod.serves())
    }

    fn behind<'a>(&'a self, service: &Object) -> Vec<Pod<'a>> {
        let selector = json!({ "matchLabels": service.at("spec/selector") });
        self.pods().filter(|pod| selects(&selector, pod.labels)).collect()
    }

    /// The pods and their ports that a service's port, by number or name, leads to.
    fn targets<'a>(&'a self, service: &str, port: &Value) -> Vec<(Pod<'a>, u64)> {
        let Some(service) = self.find("Service", service) else { return Vec::new() };
        let mut ports = each(&service.body, "spec/ports/*").into_iter();
        let found = ports.find(|it| it["port"] == *port || it["name"] == *port);
        let target = found.map_or(&Value::Null, |it| &it["targetPort"]);
        self.behind(service).into_iter().filter_map(|pod| Some((pod, pod.port(target)?))).collect()
    }

    fn backends<'a>(&'a self, path: &Value) -> Vec<(Pod<'a>, u64)> {
        let backend = at(path, "backend/service");
        self.targets(text(&backend["name"]), at(backend, "port/name"))
    }

    fn keys(&self, kind: &str, name: &str) -> BTreeSet<&str> {
        let in_set = self.find(kind, name).into_iter().flat_map(|object| entries(&object.body["data"]));
        let start = format!("{kind}/{name}/");
        let provided = self.provided.iter().filter_map(|line| line.strip_prefix(&start));
        in_set.map(|(key, _)| key).chain(provided).collect()
    }
}

/// A pod and its container; a rule checks that there is one.
#[derive(Clone, Copy)]
struct Pod<'a> {
    set: &'a Installation,
    owner: &'a Object,
    labels: &'a Value,
    spec: &'a Value,
    container: &'a Value,
}

impl<'a> Pod<'a> {
    fn id(&self) -> &'a str {
        &self.owner.id
    }

    fn name(&self) -> &'a str {
        text(&self.labels["app.kubernetes.io/name"])
    }

    fn program(&self) -> &'a str {
        let last = text(&self.container["image"]).rsplit('/').next().unwrap_or_default();
        last.split([':', '@']).next().unwrap_or_default()
    }

    /// Without a command, a service serves.
    fn serves(&self) -> bool {
        self.container["args"].is_null()
    }

    fn port(self, port: &Value) -> Option<u64> {
        let mut ports = each(self.container, "ports/*").into_iter();
        ports.find(|it| it["name"] == *port || it["containerPort"] == *port)?["containerPort"].as_u64()
    }

    /// Values by name; `None` for one from a Secret.
    fn environment(&self) -> BTreeMap<&'a str, Option<&'a str>> {
        let maps = texts(self.container, "envFrom/*/configMapRef/name").into_iter();
        let maps = maps.filter_map(|name| self.set.find("ConfigMap", name));
        let mapped = maps.flat_map(|map| entries(&map.body["data"])).map(|(name, it)| (name, it.as_str()));
        let own =
            each(self.container, "env/*").into_iter().map(|it| (text(&it["name"]), it["value"].as_str()));
        mapped.chain(own).collect()
    }

    fn value(&self, name: &str) -> Option<&'a str> {
        self.environment().get(name).copied().flatten().filter(|value| !value.is_empty())
    }

    fn number(&self, settings: &SettingDefaults, name: &str) -> u64 {
        let value = self.value(name).or(settings.get(name).and_then(Option::as_deref));
        value.and_then(|value| value.parse().ok()).unwrap_or_default()
    }

    fn listens(&self, name: &str) -> Option<u64> {
        self.value(name)?.rsplit(':').next()?.parse().ok()
    }
}

/// Scheme, host and port of `scheme://[user[:password]@]host:port[/…]`.
fn address(url: &str) -> Option<(&str, &str, u64)> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = rest.split(['/', '?']).next()?;
    let (host, port) = authority.rsplit('@').next()?.rsplit_once(':')?;
    Some((scheme, host, port.parse().ok()?))
}
