//! The Dockerfile, docker-compose.yml and k8s/ agree on the images: names, users, ports, settings, shutdown.

#![expect(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

use std::collections::{BTreeMap, BTreeSet};

use manifests::{at, each, entries, services, texts};
use serde_json::{Value, json};

const OURS: [(&str, &str); 2] = [("api", "api"), ("stream-gateway", "gateway")];
/// Open files of a gateway besides its streams, as its settings say.
const OTHER_FILES: u64 = 3_612;

fn read(path: &str) -> String {
    manifests::read(path).unwrap()
}

fn yaml(path: &str) -> Value {
    serde_saphyr::from_str(&read(path)).unwrap()
}

fn parts(compose: &Value) -> BTreeMap<&str, &Value> {
    let parts: BTreeMap<_, _> = entries(&compose["services"]).collect();
    assert!(parts.len() > 6, "{parts:?}");
    parts
}

fn environment(part: &Value) -> BTreeMap<&str, String> {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    entries(&part["environment"]).map(|(name, value)| (name, text(value))).collect()
}

/// The one instruction of this name in a target of the Dockerfile.
fn instruction(service: &str, name: &str) -> String {
    let file = read("Dockerfile").replace("\\\n", " ");
    let (_, target) = file.split_once(&format!(" AS {service}\n")).unwrap();
    let target = target.split("\nFROM ").next().unwrap();
    let found: Vec<_> = target.lines().filter_map(|line| line.strip_prefix(&format!("{name} "))).collect();
    let [found] = found[..] else { panic!("not one {name}: {found:?}") };
    found.trim().to_owned()
}

fn pod(service: &str) -> Value {
    at(&yaml(&format!("k8s/base/{service}/deployment.yaml")), "spec/template/spec").clone()
}

#[test]
fn image_is_what_the_pods_expect() {
    for (service, _) in OURS {
        let pod = pod(service);
        let (container, user) = (&pod["containers"][0], &pod["securityContext"]);
        assert_eq!(container["image"], format!("messenger/{service}"));
        assert_eq!(instruction(service, "USER"), format!("{}:{}", user["runAsUser"], user["runAsGroup"]));
        let ports: Vec<_> =
            each(container, "ports/*/containerPort").into_iter().map(Value::to_string).collect();
        assert_eq!(instruction(service, "EXPOSE"), ports.join(" "));
        assert_eq!(instruction(service, "ENTRYPOINT"), format!(r#"["/usr/local/bin/{service}"]"#));
        let check = format!(r#"CMD ["/usr/local/bin/{service}", "healthcheck", "livez"]"#);
        assert!(instruction(service, "HEALTHCHECK").ends_with(&check));
    }
    let migration = yaml("k8s/base/migration/job.yaml");
    assert_eq!(at(&migration, "spec/template/spec/containers/0/image"), "messenger/api");
}

#[test]
fn image_is_built_from_every_crate_in_the_lock_file() {
    let (manifest, dockerfile, sent) = (read("Cargo.toml"), read("Dockerfile"), read(".dockerignore"));
    let members = manifest.split("members = [").nth(1).unwrap().split(']').next().unwrap();
    for member in members.split(',').map(|member| member.trim().trim_matches('"')) {
        assert!(dockerfile.contains(&format!("\nCOPY {member}/Cargo.toml {member}/\n")), "{member}");
        assert!(sent.contains(&format!("\n!{member}/Cargo.toml\n")), "{member} is not in .dockerignore");
    }
}

#[test]
fn compose_gives_each_service_its_settings_and_no_other() {
    let compose = yaml("docker-compose.yml");
    let (parts, services) = (parts(&compose), services().unwrap());
    for (service, name) in OURS {
        let (pod, settings) = (pod(service), &services[service]);
        for part in [1, 2].map(|replica| parts[&*format!("{name}-{replica}")]) {
            assert_eq!(part["image"], format!("messenger/{service}:dev"));
            let given = environment(part);
            for name in given.keys() {
                assert!(settings.contains_key(*name), "{service} has no setting {name}");
            }
            for (name, _) in settings.iter().filter(|(_, default)| default.is_none()) {
                let file = format!("{name}_FILE");
                assert!(given.contains_key(&**name) || given.contains_key(&*file), "{service}: {name}");
            }
            for listener in ["LISTEN", "INTERNAL_LISTEN", "OPS_LISTEN"] {
                let mut in_pod = each(&pod, "containers/0/env/*").into_iter();
                let in_pod = in_pod.find(|variable| variable["name"] == listener);
                let in_pod = in_pod.and_then(|variable| variable["value"].as_str());
                assert_eq!(given.get(listener).map(String::as_str), in_pod, "{service} {listener}");
            }
            assert_eq!(part["stop_grace_period"], format!("{}s", given["TERMINATION_GRACE_SECONDS"]));
            let check = json!(["CMD", format!("/usr/local/bin/{service}"), "healthcheck", "readyz"]);
            assert_eq!(part["healthcheck"]["test"], check);
        }
    }
    let gateway = parts["gateway-1"];
    let streams = services["stream-gateway"]["MAX_STREAMS"].clone();
    let streams: u64 = environment(gateway).remove("MAX_STREAMS").or(streams).unwrap().parse().unwrap();
    let files = at(gateway, "ulimits/nofile/hard").as_u64().unwrap();
    assert!(files >= streams + OTHER_FILES, "{streams} streams, {files} files");
    let proxy = at(&compose, "services/proxy/networks/outside/ipv4_address");
    assert_eq!(*proxy, environment(gateway)["TRUSTED_PROXIES"]);
}

#[test]
fn proxy_sends_requests_to_every_ready_replica() {
    let (compose, file) = (yaml("docker-compose.yml"), read("compose/Caddyfile"));
    let parts = parts(&compose);
    let site = environment(parts["api-1"])["ORIGIN"].clone();
    assert!(file.contains(&format!("\n{site} {{\n")), "its address is ORIGIN");
    let port = site.rsplit_once(':').unwrap().1;
    assert_eq!(parts["proxy"]["ports"][0], format!("127.0.0.1:{port}:{port}"));
    for (service, name) in OURS {
        let environment = environment(parts[&*format!("{name}-1")]);
        let listens = |setting: &str| environment[setting].rsplit_once(':').unwrap().1;
        let (public, ops) = (listens("LISTEN"), listens("OPS_LISTEN"));
        let start = format!("reverse_proxy {name}-1:{public} {name}-2:{public} {{");
        let block = file.split(&start).nth(1).unwrap_or_else(|| panic!("{service}: no {start}"));
        let block = block.split("transport http {").next().unwrap();
        assert!(block.contains("import replicas\n") && block.contains(&format!("health_port {ops}\n")));
    }
}

#[test]
fn proxy_survives_its_replicas_and_stops_soon() {
    let file = read("compose/Caddyfile");
    let value = |name: &str| {
        let values: Vec<_> = file.lines().filter_map(|line| line.trim().strip_prefix(name)).collect();
        let [value] = values[..] else { panic!("not one {name}") };
        value.trim().to_owned()
    };
    assert_eq!(value("request_buffers "), value("max_size "), "the next replica gets the body again");
    let (_, fallback) = file.split_once("handle_errors {").unwrap();
    assert!(fallback.contains("respond `retry: {retry}\nevent: goodbye\n"), "an EventSource reconnects");
    let grace: u64 = value("grace_period ").trim_end_matches('s').parse().unwrap();
    assert!(grace < 10, "Docker kills after 10 s");
    assert_eq!(*at(&yaml("docker-compose.yml"), "services/proxy/stop_grace_period"), Value::Null);
}

#[test]
fn every_container_is_confined_and_limited() {
    for (name, part) in parts(&yaml("docker-compose.yml")) {
        assert_eq!(part["read_only"], true, "{name}");
        assert_eq!(part["cap_drop"], json!(["ALL"]), "{name}");
        assert_eq!(part["security_opt"], json!(["no-new-privileges:true"]), "{name}");
        for resource in ["cpus", "memory", "pids"] {
            assert!(!at(part, &format!("deploy/resources/limits/{resource}")).is_null(), "{name} {resource}");
        }
    }
}

#[test]
fn secrets_are_files_and_only_where_they_are_used() {
    let (compose, provide) = (yaml("docker-compose.yml"), read("compose/provide"));
    let mut used = BTreeSet::new();
    for (name, part) in parts(&compose) {
        // The proxy names its secrets in its own file.
        let file = if name == "proxy" { read("compose/Caddyfile") } else { String::new() };
        let text = format!("{part}{file}");
        let named = text.split("/run/secrets/").skip(1);
        let end = |c: char| !c.is_ascii_alphanumeric() && c != '-';
        let named: BTreeSet<_> = named.map(|rest| rest.split(end).next().unwrap()).collect();
        assert_eq!(named, texts(part, "secrets/*").into_iter().collect(), "{name}");
        used.extend(named.into_iter().map(str::to_owned));
        for (variable, value) in environment(part) {
            let secret = ["PASSWORD", "SECRET", "_URL", "_AUTH"].iter().any(|word| variable.contains(word));
            let in_file = variable.ends_with("_FILE") && value.starts_with("/run/secrets/");
            assert!(!secret || in_file || variable == "API_INTERNAL_URL", "{name} {variable}");
        }
        // `docker inspect` shows what comes from Compose's environment.
        for member in ["environment", "command", "healthcheck"] {
            assert!(!part[member].to_string().contains("${"), "{name} {member}");
        }
    }
    assert_eq!(used, entries(&compose["secrets"]).map(|(name, _)| name.to_owned()).collect());
    for (_, secret) in entries(&compose["secrets"]) {
        let file = secret["file"].as_str().unwrap().strip_prefix("compose/secrets/").unwrap();
        assert!(provide.contains(&format!("secret {file} ")) || provide.contains(&format!("keep {file}\n")));
    }
}

#[test]
fn one_service_builds_each_image_and_the_others_use_it() {
    let compose = yaml("docker-compose.yml");
    for (service, _) in OURS {
        let users =
            parts(&compose).into_values().filter(|part| part["image"] == format!("messenger/{service}:dev"));
        let builds: Vec<_> = users.map(|part| &part["build"]).filter(|build| !build.is_null()).collect();
        let [build] = builds[..] else { panic!("{service} is built {} times", builds.len()) };
        assert_eq!(build["target"], service);
    }
}

#[test]
fn servers_are_the_same_in_compose_and_in_the_cluster() {
    let compose = yaml("docker-compose.yml");
    for server in ["postgres", "redis"] {
        let image = format!("image: {}\n", parts(&compose)[server]["image"].as_str().unwrap());
        assert!(
            read(&format!("k8s/overlays/local/{server}.yaml")).contains(&image),
            "{server} is not {image}"
        );
    }
    // A server without its database is not healthy.
    let part = parts(&compose)["postgres"];
    let check = texts(part, "healthcheck/test/*")[1..].to_vec();
    let database = format!("--dbname={}", environment(part)["POSTGRES_DB"]);
    assert!(check.contains(&&*database) && check.contains(&"--host=127.0.0.1"), "{check:?}");
    let probe = "spec/template/spec/containers/0/readinessProbe/exec/command/*";
    let objects: Vec<Value> = serde_saphyr::from_multiple(&read("k8s/overlays/local/postgres.yaml")).unwrap();
    assert!(objects.iter().any(|object| texts(object, probe) == check), "{check:?}");
}
