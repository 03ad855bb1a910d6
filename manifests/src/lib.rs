//! What no validator sees in a set of Kubernetes manifests: whether its parts fit together, and whether they fit the two services.
//!
//! `.ci/run manifests` renders every overlay and gives the result to this program. Each rule looks at the whole set and says
//! what it finds in sentences that name the object.

pub mod rules;
pub mod set;
pub mod settings;

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::Context as _;
use serde_json::Value;

use crate::{
    set::Set,
    settings::{Service, services},
};

/// One overlay as it was rendered, and what it must fit to.
pub struct Installation {
    pub set: Set,
    /// Made by the operator, not in the tree: `Secret/name/key` or `ConfigMap/name/key`.
    pub provided: Vec<String>,
    /// By the last part of their image's name.
    pub services: BTreeMap<&'static str, Service>,
    /// The metrics that the adapter's rules offer to autoscalers: the series, and its name there.
    pub adapted: Vec<(String, String)>,
    /// The series of a gateway.
    pub gateway_metrics: Vec<String>,
}

impl Installation {
    /// `rendered` is what `kubectl kustomize` made of the overlay; the rest is read from the sources in `root`.
    pub fn read(root: &Path, overlay: &str, rendered: &str) -> anyhow::Result<Self> {
        let read = |path: &str| {
            fs::read_to_string(root.join(path)).with_context(|| format!("{path} cannot be read"))
        };
        let provided = read(&format!("k8s/overlays/{overlay}/provided.list"))?;
        let provided =
            provided.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let adapter: Value = serde_saphyr::from_str(&read("k8s/prometheus-adapter/values.yaml")?)
            .context("k8s/prometheus-adapter/values.yaml is no YAML")?;
        let rules = set::list(set::at(&adapter, "rules/custom")).iter();
        let adapted = rules.map(|rule| {
            let series = set::text(&rule["seriesQuery"]).split('{').next().unwrap_or_default();
            (series.to_owned(), set::text(set::at(rule, "name/as")).to_owned())
        });
        Ok(Self {
            set: Set::parse(rendered)?,
            provided: provided.map(str::to_owned).collect(),
            adapted: adapted.collect(),
            services: services(
                &read(".env.example")?,
                &read("api/src/config.rs")?,
                &read("stream-gateway/src/config.rs")?,
            ),
            gateway_metrics: settings::gateway_metrics(&read("docs/metrics.md")?),
        })
    }

    /// What is wrong, one sentence each.
    pub fn findings(&self) -> Vec<String> {
        let mut findings: Vec<String> = rules::ALL.iter().flat_map(|rule| rule(self)).collect();
        findings.sort();
        findings.dedup();
        findings
    }
}

/// The workspace.
pub fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}
