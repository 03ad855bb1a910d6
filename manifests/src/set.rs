//! A rendered set of manifests, and the questions that rules ask of it: who is selected, what a container's environment is, where
//! an address leads. An absent part is `null`, an empty text or an empty list: rules say what must be there.

use std::collections::BTreeMap;

use anyhow::Context as _;
use serde_json::Value;

/// The label that says which part of the product a pod is.
pub const NAME: &str = "app.kubernetes.io/name";

pub struct Set {
    pub objects: Vec<Object>,
}

pub struct Object {
    pub kind: String,
    pub name: String,
    pub body: Value,
}

/// `path` by slashes: `spec/template/spec`.
pub fn at<'a>(value: &'a Value, path: &str) -> &'a Value {
    value.pointer(&format!("/{path}")).unwrap_or(&Value::Null)
}

pub fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

pub fn entries(value: &Value) -> impl Iterator<Item = (&str, &Value)> {
    value.as_object().into_iter().flatten().map(|(name, value)| (name.as_str(), value))
}

/// Whether a selector, with labels and expressions, selects who has these labels. An absent one selects nobody.
pub fn selects(selector: &Value, labels: &Value) -> bool {
    let by_labels = entries(&selector["matchLabels"]).all(|(name, value)| labels.get(name) == Some(value));
    let by_expressions = list(&selector["matchExpressions"]).iter().all(|expression| {
        let label = labels.get(text(&expression["key"]));
        let named = label.is_some_and(|label| list(&expression["values"]).contains(label));
        match text(&expression["operator"]) {
            "In" => named,
            "NotIn" => !named,
            "Exists" => label.is_some(),
            "DoesNotExist" => label.is_none(),
            _ => false,
        }
    });
    selector.is_object() && by_labels && by_expressions
}

impl Object {
    pub fn id(&self) -> String {
        format!("{}/{}", self.kind, self.name)
    }

    pub fn at(&self, path: &str) -> &Value {
        at(&self.body, path)
    }
}

impl Set {
    pub fn parse(yaml: &str) -> anyhow::Result<Self> {
        let documents: Vec<Value> = serde_saphyr::from_multiple(yaml).context("this is no YAML")?;
        let objects = documents.into_iter().filter(Value::is_object).map(|body| Object {
            kind: text(&body["kind"]).to_owned(),
            name: text(at(&body, "metadata/name")).to_owned(),
            body,
        });
        Ok(Self { objects: objects.collect() })
    }

    pub fn of<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Object> {
        self.objects.iter().filter(move |object| object.kind == kind)
    }

    pub fn find(&self, kind: &str, name: &str) -> Option<&Object> {
        self.objects.iter().find(|object| object.kind == kind && object.name == name)
    }

    /// Whatever has pods, by what it makes them from.
    pub fn pods(&self) -> Vec<Pod<'_>> {
        let templates = self.objects.iter().filter_map(|owner| {
            let template = match owner.kind.as_str() {
                "CronJob" => owner.at("spec/jobTemplate/spec/template"),
                "Pod" => &owner.body,
                _ => owner.at("spec/template"),
            };
            template.is_object().then_some((owner, template))
        });
        templates
            .map(|(owner, template)| Pod {
                set: self,
                owner,
                template,
                labels: at(template, "metadata/labels"),
                spec: &template["spec"],
            })
            .collect()
    }

    /// The pods behind a service.
    pub fn behind<'a>(&'a self, service: &'a Object) -> impl Iterator<Item = Pod<'a>> {
        let selector = serde_json::json!({ "matchLabels": service.at("spec/selector") });
        let selects_anybody = service.at("spec/selector").is_object();
        self.pods().into_iter().filter(move |pod| selects_anybody && selects(&selector, pod.labels))
    }

    /// The ports of pods that a port of a service leads to; the service's port by number or name.
    pub fn targets<'a>(&'a self, service: &'a Object, port: &Value) -> Vec<(Pod<'a>, u64)> {
        let ports = list(service.at("spec/ports"));
        let Some(found) = ports.iter().find(|each| each["port"] == *port || each["name"] == *port) else {
            return Vec::new();
        };
        let target = if found["targetPort"].is_null() { &found["port"] } else { &found["targetPort"] };
        self.behind(service).filter_map(|pod| pod.port(target).map(|number| (pod, number))).collect()
    }

    /// The ports of pods that a path of an Ingress leads to. None: no such service, no such port of it, or no pod.
    pub fn backends<'a>(&'a self, path: &Value) -> Vec<(Pod<'a>, u64)> {
        let backend = at(path, "backend/service");
        let by = if at(backend, "port/name").is_null() { "port/number" } else { "port/name" };
        let service = self.find("Service", text(&backend["name"]));
        service.map(|service| self.targets(service, at(backend, by))).unwrap_or_default()
    }
}

#[derive(Clone, Copy)]
pub struct Pod<'a> {
    set: &'a Set,
    pub owner: &'a Object,
    pub template: &'a Value,
    pub labels: &'a Value,
    pub spec: &'a Value,
}

impl<'a> Pod<'a> {
    /// Which part of the product it is.
    pub fn name(&self) -> &'a str {
        text(&self.labels[NAME])
    }

    pub fn containers(self) -> impl Iterator<Item = Container<'a>> {
        let all = list(&self.spec["initContainers"]).iter().chain(list(&self.spec["containers"]));
        all.map(move |body| Container { pod: self, body })
    }

    /// A container's port by name or number.
    pub fn port(self, port: &Value) -> Option<u64> {
        let ports = self.containers().flat_map(|container| list(&container.body["ports"]));
        let mut ports = ports.filter(|each| each["name"] == *port || each["containerPort"] == *port);
        ports.next()?["containerPort"].as_u64()
    }
}

#[derive(Clone, Copy)]
pub struct Container<'a> {
    pub pod: Pod<'a>,
    pub body: &'a Value,
}

/// What a variable is set to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Variable {
    Text(String),
    /// From a Secret, or from somewhere that is not in the set.
    Unseen,
}

impl<'a> Container<'a> {
    pub fn id(&self) -> String {
        let owner = self.pod.owner.id();
        let name = text(&self.body["name"]);
        if self.pod.owner.name == name { owner } else { format!("{owner}, container {name}") }
    }

    /// Which binary it runs: the last part of the image's name.
    pub fn program(&self) -> &'a str {
        let image = text(&self.body["image"]);
        let last = image.split('@').next().and_then(|name| name.rsplit('/').next()).unwrap_or_default();
        last.split(':').next().unwrap_or_default()
    }

    /// What it runs of that binary: `api migrate`. Without a word it serves.
    pub fn command(&self) -> &'a str {
        let args = list(&self.body["args"]).iter().map(text);
        args.into_iter().find(|arg| !arg.starts_with('-')).unwrap_or("serve")
    }

    /// Names and values as the container sees them; a later one wins, and `env` over `envFrom`.
    pub fn environment(&self) -> BTreeMap<String, Variable> {
        let mut environment = BTreeMap::new();
        for source in list(&self.body["envFrom"]) {
            let config = self.pod.set.find("ConfigMap", text(at(source, "configMapRef/name")));
            for (name, value) in config.into_iter().flat_map(|config| entries(&config.body["data"])) {
                environment.insert(name.to_owned(), Variable::Text(text(value).to_owned()));
            }
        }
        for variable in list(&self.body["env"]) {
            let config = at(variable, "valueFrom/configMapKeyRef");
            let value = match self.pod.set.find("ConfigMap", text(&config["name"])) {
                Some(map) => map.body["data"][text(&config["key"])].as_str(),
                None => variable["value"].as_str(),
            };
            let value = value.map_or(Variable::Unseen, |value| Variable::Text(value.to_owned()));
            environment.insert(text(&variable["name"]).to_owned(), value);
        }
        environment
    }

    /// The value of a variable that can be seen.
    pub fn value(&self, name: &str) -> Option<String> {
        match self.environment().remove(name)? {
            Variable::Text(value) => Some(value),
            Variable::Unseen => None,
        }
    }
}

/// Scheme, host and port of `scheme://[user[:password]@]host:port[/…]`.
pub fn address(url: &str) -> Option<(&str, &str, u64)> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = rest.split(['/', '?']).next()?;
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let (host, port) = host.rsplit_once(':')?;
    Some((scheme, host, port.parse().ok()?))
}
