//! `.env.example` names exactly the settings that the services have, with the defaults that they have.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path))
        .expect("the file is in the workspace")
}

/// The settings of a service, from the fields that carry `#[arg(long, …env…)]`: name and default.
fn declared(config: &str) -> BTreeMap<String, Option<String>> {
    let mut settings = BTreeMap::new();
    for attribute in config.split("#[arg(").skip(1) {
        let (options, rest) = attribute.split_once(")]").expect("an attribute ends");
        if !options.split(',').any(|option| option.trim() == "env") {
            continue;
        }
        let field =
            rest.trim_start().trim_start_matches("pub ").split(':').next().expect("a field has a name");
        let default = options.split_once("default_value = \"").and_then(|(_, rest)| rest.split_once('"'));
        settings.insert(field.to_uppercase(), default.map(|(default, _)| default.to_owned()));
    }
    assert!(settings.len() > 10, "settings are declared in another way: {settings:?}");
    settings
}

/// The example's settings: name, value, and whether the line is only a comment that shows a default.
fn shown() -> BTreeMap<String, (String, bool)> {
    let is_name = |name: &str| name.chars().all(|c| c.is_ascii_uppercase() || c == '_');
    let text = read(".env.example");
    let lines = text.lines().filter_map(|line| {
        let setting = line.trim_start_matches("# ");
        let (name, value) = setting.split_once('=').filter(|(name, _)| is_name(name))?;
        Some((name.to_owned(), (value.to_owned(), setting != line)))
    });
    lines.collect()
}

#[test]
fn the_example_names_every_setting_and_no_other() {
    let api = declared(&read("api/src/config.rs"));
    let gateway = declared(&read("stream-gateway/src/config.rs"));
    let declared: BTreeSet<_> = api.into_keys().chain(gateway.into_keys()).collect();
    assert_eq!(shown().into_keys().collect::<BTreeSet<_>>(), declared);
}

#[test]
fn commented_settings_are_defaults() {
    let gateway = declared(&read("stream-gateway/src/config.rs"));
    let api = declared(&read("api/src/config.rs"));
    for (name, (value, commented)) in shown() {
        // Where both have it, the example shows api's.
        let default = api.get(&name).or_else(|| gateway.get(&name)).expect("the names agree");
        if commented {
            assert_eq!(default.as_deref(), Some(value.as_str()), "{name}");
        } else {
            let required = |service: &BTreeMap<_, Option<_>>| service.get(&name).is_some_and(Option::is_none);
            assert!(required(&api) || required(&gateway), "{name} has a default everywhere");
        }
    }
}

#[test]
fn every_secret_can_be_given_in_a_file() {
    let ends = ["_SECRET", "_SECRETS", "_PASSWORD", "_TOKEN", "_HEADERS", "_SENTINELS"];
    let with_passwords = ["DATABASE_URL", "REDIS_URL"];
    for config in ["api/src/config.rs", "stream-gateway/src/config.rs"] {
        let declared = declared(&read(config));
        let secrets: Vec<_> = declared
            .keys()
            .filter(|name| {
                ends.iter().any(|end| name.ends_with(end)) || with_passwords.contains(&name.as_str())
            })
            .collect();
        assert!(secrets.len() > 3, "{config}: {secrets:?}");
        for name in secrets {
            assert!(declared.contains_key(&format!("{name}_FILE")), "{config}: {name} has no {name}_FILE");
        }
    }
}
