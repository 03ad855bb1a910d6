//! Words of which Kubernetes knows a few: schemas call them texts, and the API server refuses all others.

use serde_json::Value;

use crate::{Installation, set::entries};

/// By the last two parts of the path, or the last one.
const WORDS: [(&str, &[&str]); 17] = [
    ("imagePullPolicy", &["Always", "IfNotPresent", "Never"]),
    ("restartPolicy", &["Always", "OnFailure", "Never"]),
    ("pathType", &["Exact", "Prefix", "ImplementationSpecific"]),
    ("policyTypes", &["Ingress", "Egress"]),
    ("protocol", &["TCP", "UDP", "SCTP"]),
    ("whenUnsatisfiable", &["DoNotSchedule", "ScheduleAnyway"]),
    ("strategy/type", &["RollingUpdate", "Recreate"]),
    ("updateStrategy/type", &["RollingUpdate", "OnDelete"]),
    ("seccompProfile/type", &["RuntimeDefault", "Localhost", "Unconfined"]),
    ("matchExpressions/operator", &["In", "NotIn", "Exists", "DoesNotExist"]),
    ("metrics/type", &["Resource", "ContainerResource", "Pods", "Object", "External"]),
    ("target/type", &["Utilization", "AverageValue", "Value"]),
    ("policies/type", &["Pods", "Percent"]),
    ("selectPolicy", &["Max", "Min", "Disabled"]),
    ("unhealthyPodEvictionPolicy", &["IfHealthyBudget", "AlwaysAllow"]),
    ("accessModes", &["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]),
    ("externalTrafficPolicy", &["Cluster", "Local"]),
];

pub fn words_are_known(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    for object in &installation.set.objects {
        let mut look = |path: &str, word: &str| {
            let known = WORDS.iter().find(|(place, _)| path.ends_with(&format!("/{place}")));
            let service_type = (object.kind == "Service" && path == "/spec/type")
                .then_some(&["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"][..]);
            if let Some(words) = service_type.or(known.map(|(_, words)| *words))
                && !words.contains(&word)
            {
                findings.push(format!(
                    "{}: {word:?} is none of {}, at {path}",
                    object.id(),
                    words.join(", ")
                ));
            }
        };
        walk(&object.body, "", &mut look);
    }
    findings
}

/// Every text, with its path; the places in lists are left out of it.
fn walk(value: &Value, path: &str, look: &mut impl FnMut(&str, &str)) {
    match value {
        Value::String(word) => look(path, word),
        Value::Array(items) => items.iter().for_each(|item| walk(item, path, look)),
        _ => entries(value).for_each(|(name, inner)| walk(inner, &format!("{path}/{name}"), look)),
    }
}
