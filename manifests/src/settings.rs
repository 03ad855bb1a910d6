//! The settings that the services have, read from where they declare them, and the names of a gateway's metrics.

use std::collections::{BTreeMap, BTreeSet};

/// A binary of ours and its settings: name to default. Without a default, or where the default is for a laptop, one must be set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub settings: BTreeMap<String, Option<String>>,
    pub required: BTreeSet<String>,
}

pub fn services(env_example: &str, api: &str, gateway: &str) -> BTreeMap<&'static str, Service> {
    let must_be_set = shown_uncommented(env_example);
    let service = |config: &str| {
        let settings = declared(config);
        let required = must_be_set.iter().filter(|name| settings.contains_key(*name)).cloned().collect();
        Service { settings, required }
    };
    [("api", service(api)), ("stream-gateway", service(gateway))].into()
}

/// The fields that carry `#[arg(long, …env…)]`: name and default.
fn declared(config: &str) -> BTreeMap<String, Option<String>> {
    let mut settings = BTreeMap::new();
    for attribute in config.split("#[arg(").skip(1) {
        let Some((options, rest)) = attribute.split_once(")]") else { continue };
        if !options.split(',').any(|option| option.trim() == "env") {
            continue;
        }
        let field = rest.trim_start().trim_start_matches("pub ").split(':').next().unwrap_or_default();
        let default = options.split_once("default_value = \"").and_then(|(_, rest)| rest.split_once('"'));
        settings.insert(field.to_uppercase(), default.map(|(default, _)| default.to_owned()));
    }
    settings
}

/// In `.env.example` a line that is commented out shows a default that is good anywhere.
fn shown_uncommented(env_example: &str) -> BTreeSet<String> {
    let lines = env_example.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_once('=')).map(|(name, _)| name.to_owned()).collect()
}

/// The metrics in the generated table.
pub fn gateway_metrics(table: &str) -> Vec<String> {
    let names = table.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    names.filter(|name| name.starts_with("messenger_gateway_")).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::root;

    fn read(path: &str) -> String {
        std::fs::read_to_string(root().join(path)).unwrap()
    }

    #[test]
    fn the_services_declare_their_settings_as_they_are_read_here() {
        let services = services(
            &read(".env.example"),
            &read("api/src/config.rs"),
            &read("stream-gateway/src/config.rs"),
        );
        let required = |name: &str| services[name].required.iter().map(String::as_str).collect::<Vec<_>>();
        assert_eq!(
            required("api"),
            ["DATABASE_URL", "INTERNAL_SECRET", "ORIGIN", "REDIS_URL", "SIGNING_KEY_FILES"]
        );
        assert_eq!(
            required("stream-gateway"),
            ["API_INTERNAL_URL", "INTERNAL_SECRET", "ORIGIN", "REDIS_URL"]
        );
        assert_eq!(services["stream-gateway"].settings["MAX_STREAMS"].as_deref(), Some("15000"));
        assert!(!services["stream-gateway"].settings.contains_key("DATABASE_URL"));
        assert!(gateway_metrics(&read("docs/metrics.md")).contains(&"messenger_gateway_streams".to_owned()));
    }
}
