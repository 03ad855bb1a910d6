//! The Dockerfile, `docker-compose.yml` and `k8s/` say the same of the images: names, users, ports, settings, ends. No validator
//! compares them.

#![expect(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

use std::collections::{BTreeMap, BTreeSet};

use manifests::{
    root,
    set::{at, entries, list, text},
    settings::{Service, services},
};
use serde_json::Value;

const OURS: [(&str, &str); 2] = [("api", "api"), ("stream-gateway", "gateway")];
/// Open files of a gateway besides one a stream, as its settings say.
const OTHER_FILES: u64 = 3_612;

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

fn compose() -> Value {
    serde_saphyr::from_str(&read("docker-compose.yml")).unwrap()
}

fn parts(compose: &Value) -> BTreeMap<&str, &Value> {
    let parts: BTreeMap<_, _> = entries(&compose["services"]).collect();
    assert!(parts.len() > 6, "{parts:?}");
    parts
}

/// Of a service's target in the Dockerfile: what follows each instruction, comments and line breaks left out.
fn target(service: &str) -> Vec<(String, String)> {
    let file = read("Dockerfile").replace("\\\n", " ");
    let from = format!(" AS {service}");
    let lines = file.lines().skip_while(|line| !line.ends_with(&from)).skip(1);
    let lines = lines.take_while(|line| !line.starts_with("FROM "));
    let instructions = lines.filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(' '));
    instructions.map(|(name, rest)| (name.to_owned(), rest.trim().to_owned())).collect()
}

fn instruction<'a>(target: &'a [(String, String)], name: &str) -> &'a str {
    let mut found = target.iter().filter(|(instruction, _)| instruction == name);
    let (Some((_, rest)), None) = (found.next(), found.next()) else { panic!("not one {name}: {target:?}") };
    rest
}

/// A service's pod in `k8s/base`.
fn pod(service: &str) -> Value {
    let deployment: Value =
        serde_saphyr::from_str(&read(&format!("k8s/base/{service}/deployment.yaml"))).unwrap();
    at(&deployment, "spec/template/spec").clone()
}

fn known() -> BTreeMap<&'static str, Service> {
    services(&read(".env.example"), &read("api/src/config.rs"), &read("stream-gateway/src/config.rs"))
}

/// A variable of a part as text, whatever YAML took it for.
fn variable(part: &Value, name: &str) -> Option<String> {
    let value = &part["environment"][name];
    value.as_str().map(str::to_owned).or_else(|| value.as_u64().map(|number| number.to_string()))
}

#[test]
fn an_image_is_what_the_pods_expect() {
    for (service, _) in OURS {
        let (image, pod) = (target(service), pod(service));
        let container = &pod["containers"][0];
        assert_eq!(container["image"], format!("messenger/{service}"));
        let user = &pod["securityContext"];
        assert_eq!(instruction(&image, "USER"), format!("{}:{}", user["runAsUser"], user["runAsGroup"]));
        let ports = list(&container["ports"]).iter().map(|port| port["containerPort"].to_string());
        assert_eq!(instruction(&image, "EXPOSE"), ports.collect::<Vec<_>>().join(" "));
        assert_eq!(instruction(&image, "ENTRYPOINT"), format!(r#"["/usr/local/bin/{service}"]"#));
        let health = format!(r#"CMD ["/usr/local/bin/{service}", "healthcheck", "livez"]"#);
        assert!(instruction(&image, "HEALTHCHECK").ends_with(&health), "{image:?}");
    }
    assert_eq!(
        serde_saphyr::from_str::<Value>(&read("k8s/base/migration/job.yaml"))
            .unwrap()
            .pointer("/spec/template/spec/containers/0/image"),
        Some(&"messenger/api".into())
    );
}

#[test]
fn an_image_is_built_of_every_crate_that_the_lock_file_needs() {
    let members = read("Cargo.toml");
    let (_, members) = members.split_once("members = [").unwrap();
    let (members, _) = members.split_once(']').unwrap();
    let (dockerfile, sent) = (read("Dockerfile"), read(".dockerignore"));
    for member in members.split(',').map(|member| member.trim().trim_matches('"')) {
        let copied = format!("COPY {member}/Cargo.toml {member}/");
        assert!(dockerfile.lines().any(|line| line == copied), "{copied} is not in the Dockerfile");
        let sends = format!("!{member}/Cargo.toml");
        assert!(sent.lines().any(|line| line == sends), "{sends} is not in .dockerignore");
    }
}

#[test]
fn compose_gives_each_service_its_settings_and_no_other() {
    let (compose, known) = (compose(), known());
    let parts = parts(&compose);
    for (service, name) in OURS {
        let pod = pod(service);
        for replica in 1..=2 {
            let part = parts[format!("{name}-{replica}").as_str()];
            assert_eq!(part["image"], format!("messenger/{service}:dev"));
            let given: BTreeSet<_> = entries(&part["environment"]).map(|(name, _)| name.to_owned()).collect();
            for name in &given {
                assert!(known[service].settings.contains_key(name), "{service} has no setting {name}");
            }
            for name in &known[service].required {
                assert!(given.contains(name) || given.contains(&format!("{name}_FILE")), "{service}: {name}");
            }
            for listener in ["LISTEN", "INTERNAL_LISTEN", "OPS_LISTEN"] {
                let in_pod = list(&pod["containers"][0]["env"]).iter().find(|each| each["name"] == listener);
                let in_pod = in_pod.map(|variable| text(&variable["value"]).to_owned());
                assert_eq!(variable(part, listener), in_pod, "{service} {listener}");
            }
            let killed = format!("{}s", variable(part, "TERMINATION_GRACE_SECONDS").unwrap());
            assert_eq!(part["stop_grace_period"], killed, "{service} is killed when it says that it is");
            let check = list(&part["healthcheck"]["test"]).iter().map(text).collect::<Vec<_>>();
            assert_eq!(check, ["CMD", &format!("/usr/local/bin/{service}"), "healthcheck", "readyz"]);
        }
    }
    let gateway = parts["gateway-1"];
    let streams = variable(gateway, "MAX_STREAMS");
    let streams = streams.or_else(|| known["stream-gateway"].settings["MAX_STREAMS"].clone()).unwrap();
    let files = at(gateway, "ulimits/nofile/hard").as_u64().unwrap();
    assert!(files >= streams.parse::<u64>().unwrap() + OTHER_FILES, "{streams} streams, {files} files");
    let proxy = at(&compose, "services/proxy/networks/outside/ipv4_address");
    assert_eq!(variable(gateway, "TRUSTED_PROXIES").unwrap(), text(proxy));
}

#[test]
fn the_proxy_asks_every_replica_and_whether_it_is_ready() {
    let compose = compose();
    let file = read("compose/Caddyfile");
    let site = text(at(&compose, "services/api-1/environment/ORIGIN"));
    assert!(file.lines().any(|line| line == format!("{site} {{")), "its address is ORIGIN");
    let port = site.rsplit_once(':').unwrap().1;
    assert_eq!(compose["services"]["proxy"]["ports"][0], format!("127.0.0.1:{port}:{port}"));
    for (service, name) in OURS {
        let listens = |setting: &str| {
            let part = &compose["services"][format!("{name}-1")];
            variable(part, setting).unwrap().rsplit_once(':').unwrap().1.to_owned()
        };
        let (public, ops) = (listens("LISTEN"), listens("OPS_LISTEN"));
        let asked = format!("reverse_proxy {name}-1:{public} {name}-2:{public} {{");
        let (_, block) = file.split_once(&asked).unwrap_or_else(|| panic!("{service}: no {asked}"));
        let block: Vec<_> =
            block.lines().map(str::trim).take_while(|line| *line != "transport http {").collect();
        assert!(
            block.contains(&"import replicas") && block.contains(&&*format!("health_port {ops}")),
            "{block:?}"
        );
    }
}

#[test]
fn the_proxy_survives_its_replicas_and_ends_soon() {
    let (compose, file) = (compose(), read("compose/Caddyfile"));
    let value = |name: &str| {
        let mut values = file.lines().filter_map(|line| line.trim().strip_prefix(name));
        let (Some(value), None) = (values.next(), values.next()) else { panic!("not one {name}") };
        value.trim().to_owned()
    };
    assert_eq!(value("request_buffers "), value("max_size "), "a body is there again for the next replica");
    let (_, fallback) = file.split_once("handle_errors {").unwrap();
    assert!(fallback.contains("respond `retry: {retry}\nevent: goodbye\n"), "an EventSource comes back");
    assert!(
        value("grace_period ").trim_end_matches('s').parse::<u64>().unwrap() < 10,
        "Docker kills after 10 s"
    );
    assert_eq!(compose["services"]["proxy"]["stop_grace_period"], Value::Null);
}

#[test]
fn every_container_is_confined_and_limited_and_holds_no_secret_in_the_file() {
    let compose = compose();
    for (name, part) in parts(&compose) {
        assert_eq!(part["read_only"], true, "{name}");
        assert_eq!(part["cap_drop"], serde_json::json!(["ALL"]), "{name}");
        assert_eq!(part["security_opt"], serde_json::json!(["no-new-privileges:true"]), "{name}");
        for resource in ["cpus", "memory", "pids"] {
            assert!(!at(part, &format!("deploy/resources/limits/{resource}")).is_null(), "{name} {resource}");
        }
    }
}

/// What is said in a part, and of the proxy in its own file, about files of secrets.
fn secrets_named_by(name: &str, part: &Value) -> BTreeSet<String> {
    let file = if name == "proxy" { read("compose/Caddyfile") } else { String::new() };
    let said = format!("{part}{file}");
    let names = said.split("/run/secrets/").skip(1);
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-';
    names.filter_map(|rest| rest.split(|c| !is_name(c)).next()).map(str::to_owned).collect()
}

#[test]
fn secrets_reach_containers_as_files_and_only_where_they_are_used() {
    let (compose, provide) = (compose(), read("compose/provide"));
    let mut used = BTreeSet::new();
    for (name, part) in parts(&compose) {
        let named = secrets_named_by(name, part);
        let mounted: BTreeSet<_> = list(&part["secrets"]).iter().map(|each| text(each).to_owned()).collect();
        assert_eq!(named, mounted, "{name}");
        for (variable, value) in entries(&part["environment"]) {
            let secret = ["PASSWORD", "SECRET", "_URL", "_AUTH"].iter().any(|word| variable.contains(word));
            let in_file = variable.ends_with("_FILE") && text(value).starts_with("/run/secrets/");
            assert!(!secret || in_file || variable == "API_INTERNAL_URL", "{name} {variable}");
        }
        // What comes from the environment of Compose is shown by `docker inspect`.
        for member in ["environment", "command", "healthcheck"] {
            assert!(!part[member].to_string().contains("${"), "{name} {member}");
        }
        used.extend(mounted);
    }
    let declared: BTreeSet<_> = entries(&compose["secrets"]).map(|(name, _)| name.to_owned()).collect();
    assert_eq!(used, declared);
    for name in declared {
        let file = text(&compose["secrets"][&name]["file"]);
        let file = file.strip_prefix("compose/secrets/").unwrap();
        assert!(provide.contains(&format!("secret {file} ")) || provide.contains(&format!("keep {file}\n")));
    }
}

#[test]
fn one_part_builds_an_image_and_the_others_use_it() {
    let compose = compose();
    for (service, _) in OURS {
        let image = format!("messenger/{service}:dev");
        let parts = parts(&compose);
        let users = parts.values().filter(|part| part["image"] == *image);
        let builds: Vec<_> = users.map(|part| &part["build"]).filter(|build| !build.is_null()).collect();
        let [build] = builds[..] else { panic!("{image} is built {} times", builds.len()) };
        assert_eq!(build["target"], service);
    }
}

#[test]
fn server_that_lacks_its_database_is_not_healthy() {
    let compose = compose();
    let [in_compose, in_cluster] = [
        at(&compose, "services/postgres/healthcheck/test").clone(),
        read("k8s/overlays/local/postgres.yaml")
            .split("---\n")
            .map(|document| serde_saphyr::from_str::<Value>(document).unwrap())
            .find_map(|object| {
                let probe = "spec/template/spec/containers/0/readinessProbe/exec/command";
                object.pointer(&format!("/{probe}")).cloned()
            })
            .unwrap(),
    ];
    let words = |command: &Value| list(command).iter().map(|word| text(word).to_owned()).collect::<Vec<_>>();
    assert_eq!(words(&in_compose)[1..], words(&in_cluster)[..]);
    let database = text(at(&compose, "services/postgres/environment/POSTGRES_DB")).to_owned();
    assert!(words(&in_cluster).contains(&format!("--dbname={database}")));
    assert!(words(&in_cluster).contains(&"--host=127.0.0.1".to_owned()));
}

#[test]
fn compose_and_the_cluster_on_one_machine_have_the_same_servers() {
    let compose = compose();
    for server in ["postgres", "redis"] {
        let image = format!("image: {}\n", text(at(&compose, &format!("services/{server}/image"))));
        let manifest = read(&format!("k8s/overlays/local/{server}.yaml"));
        assert!(manifest.contains(&image), "{server} is not {image}");
    }
}
