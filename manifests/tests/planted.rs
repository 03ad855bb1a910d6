//! Defects that no validator sees are planted into sound manifests, one after the other. Each is found, and the sentence names the
//! object.

#![expect(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

use manifests::{Installation, root, set::Object};
use serde_json::{Value, json};

fn sound(overlay: &str) -> Installation {
    let path = root().join(format!("manifests/tests/sound/{overlay}.yaml"));
    Installation::read(root(), overlay, &std::fs::read_to_string(path).unwrap()).unwrap()
}

/// In a list, a name or a kind leads to the item that has it.
fn step<'a>(value: &'a mut Value, part: &str) -> &'a mut Value {
    let Some(items) = value.as_array() else {
        // `~` stands for the slash in a label or annotation.
        return &mut value[part.replace('~', "/")];
    };
    let named = items.iter().position(|item| item["name"] == part);
    let place = named.or_else(|| part.parse().ok()).unwrap_or_else(|| panic!("there is no {part}"));
    &mut value[place]
}

/// Sets what is at `path` of an object; `null` takes it away.
fn plant(installation: &mut Installation, object: &str, path: &str, value: Value) {
    let objects = &mut installation.set.objects;
    let object = objects.iter_mut().find(|each| each.id() == object).unwrap_or_else(|| panic!("no {object}"));
    let (parents, last) = path.rsplit_once('/').unwrap_or(("", path));
    let parent = parents.split('/').filter(|part| !part.is_empty()).fold(&mut object.body, step);
    match (parent, value) {
        (Value::Object(fields), Value::Null) => _ = fields.remove(&last.replace('~', "/")).unwrap(),
        (Value::Array(items), Value::Null) => items.retain(|item| item["name"] != last),
        (parent, value) => *step(parent, last) = value,
    }
}

fn plant_object(installation: &mut Installation, body: Value) {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let object = Object { kind: text(&body["kind"]), name: text(&body["metadata"]["name"]), body };
    installation.set.objects.push(object);
}

#[track_caller]
fn assert_found(installation: &Installation, sentence: &str) {
    let findings = installation.findings();
    assert!(
        findings.iter().any(|finding| finding.contains(sentence)),
        "{sentence:?} is not among {findings:#?}"
    );
}

#[track_caller]
fn found(overlay: &str, object: &str, path: &str, value: Value, sentence: &str) {
    let mut installation = sound(overlay);
    plant(&mut installation, object, path, value);
    assert_found(&installation, sentence);
}

const API: &str = "Deployment/api";
const GATEWAY: &str = "Deployment/stream-gateway";
const API_CONTAINER: &str = "spec/template/spec/containers/api";
const GATEWAY_CONTAINER: &str = "spec/template/spec/containers/stream-gateway";

fn api(path: &str, value: Value, sentence: &str) {
    found("production", API, &format!("{API_CONTAINER}/{path}"), value, sentence);
}

fn gateway(path: &str, value: Value, sentence: &str) {
    found("production", GATEWAY, &format!("{GATEWAY_CONTAINER}/{path}"), value, sentence);
}

#[test]
fn sound_manifests_are_found_sound() {
    for overlay in ["local", "production"] {
        assert_eq!(sound(overlay).findings(), Vec::<String>::new(), "{overlay}");
    }
}

#[test]
fn a_selector_that_does_not_fit_its_labels() {
    let wrong = json!("gateway");
    let labels = "spec/template/metadata/labels/app.kubernetes.io~name";
    found(
        "production",
        GATEWAY,
        labels,
        wrong.clone(),
        "Deployment/stream-gateway: its selector does not select",
    );
    let selector = "spec/selector/app.kubernetes.io~name";
    found(
        "production",
        "Service/api",
        selector,
        wrong.clone(),
        "Service/api: its selector selects the pods of 0",
    );
    let selector = "spec/selector/matchLabels/app.kubernetes.io~name";
    found(
        "production",
        "PodDisruptionBudget/api",
        selector,
        wrong.clone(),
        "PodDisruptionBudget/api: its selector",
    );
    let selector = "spec/podSelector/matchLabels/app.kubernetes.io~name";
    found(
        "production",
        "NetworkPolicy/api",
        selector,
        wrong,
        "NetworkPolicy/api: its podSelector selects nobody",
    );
    let selector = "spec/selector/matchLabels";
    found("production", API, selector, json!({}), "Deployment/api: its selector selects the pods of");
}

#[test]
fn a_port_that_does_not_exist() {
    let target = "spec/ports/http/targetPort";
    found(
        "production",
        "Service/api",
        target,
        json!("web"),
        "Service/api: its targetPort \"web\" is no port of",
    );
    found("production", "Service/api", target, json!(8888), "Service/api: its targetPort 8888 is no port of");
    api("livenessProbe/httpGet/port", json!("op"), "Deployment/api: its livenessProbe asks port \"op\"");
    api("ports/http/containerPort", json!(9080), "Deployment/api: nothing listens at its port 9080");
    api(
        "env/LISTEN/value",
        json!("0.0.0.0:9080"),
        "Deployment/api: LISTEN is port 9080, which is none of its",
    );
    api(
        "env/OPS_LISTEN/value",
        json!("127.0.0.1:8082"),
        "Deployment/api: OPS_LISTEN is 127.0.0.1:8082, where nobody",
    );
    api("ports/internal/containerPort", json!(8082), "Deployment/api: two of its ports");
    let annotation = "spec/template/metadata/annotations/prometheus.io~port";
    found("production", API, annotation, json!("8083"), "Deployment/api: Prometheus is told port 8083");
    let url = json!("http://api-internal:8080");
    gateway(
        "env/API_INTERNAL_URL/value",
        url,
        "Deployment/stream-gateway: API_INTERNAL_URL http://api-internal:8080",
    );
    let url = json!("http://api:8080");
    gateway(
        "env/API_INTERNAL_URL/value",
        url,
        "API_INTERNAL_URL http://api:8080 does not lead to api's internal listener",
    );
}

#[test]
fn a_reference_that_leads_nowhere() {
    let secret = "env/INTERNAL_SECRET/valueFrom/secretKeyRef";
    api(&format!("{secret}/name"), json!("internal"), "Deployment/api: it refers to Secret/internal");
    api(
        &format!("{secret}/key"),
        json!("password"),
        "Deployment/api: it refers to the key password of Secret/messenger",
    );
    api("envFrom/0/configMapRef/name", json!("settings"), "Deployment/api: it refers to ConfigMap/settings");
    api("volumeMounts/signing-keys/name", json!("keys"), "Deployment/api: it mounts the volume keys");
    let pod = "spec/template/spec";
    found(
        "production",
        API,
        &format!("{pod}/serviceAccountName"),
        json!("apis"),
        "Deployment/api: its ServiceAccount apis",
    );
    let volume = format!("{pod}/volumes/signing-keys/secret/secretName");
    found(
        "production",
        API,
        &volume,
        json!("keys"),
        "Deployment/api, volume signing-keys: it refers to Secret/keys",
    );
    let item = format!("{pod}/volumes/authorities/configMap/items/0/key");
    found(
        "production",
        GATEWAY,
        &item,
        json!("ca.pem"),
        "Deployment/stream-gateway, volume authorities: it refers to the key ca.pem",
    );
    let target = "spec/scaleTargetRef/name";
    found(
        "production",
        "HorizontalPodAutoscaler/api",
        target,
        json!("apis"),
        "HorizontalPodAutoscaler/api: what it scales",
    );
    let secret = "spec/tls/0/secretName";
    found("production", "Ingress/stream", secret, json!("tls"), "Ingress/stream: it refers to Secret/tls");
    found(
        "local",
        "StatefulSet/postgres",
        "spec/serviceName",
        json!("pg"),
        "StatefulSet/postgres: its Service pg",
    );
    let mounts = format!("{API_CONTAINER}/volumeMounts/authorities");
    found("production", API, &mounts, Value::Null, "Deployment/api: nobody mounts its volume authorities");
    let account = format!("{pod}/serviceAccountName");
    found("production", API, &account, Value::Null, "Deployment/api: it has no ServiceAccount of its own");
    let mut installation = sound("production");
    installation.provided.push("Secret/forgotten/key".to_owned());
    assert_found(&installation, "provided.list: nothing refers to Secret/forgotten/key");
}

#[test]
fn secret_in_a_mounted_file_is_a_secret_that_is_set() {
    let with_file = |file: &str| {
        let mut installation = sound("production");
        let variable = json!({ "name": "INTERNAL_SECRET_FILE", "value": file });
        plant(&mut installation, API, &format!("{API_CONTAINER}/env/INTERNAL_SECRET"), variable);
        installation
    };
    let sound = with_file("/etc/messenger/keys/signing-key.pem");
    assert_eq!(sound.findings(), Vec::<String>::new());
    let sentence =
        "Deployment/api: INTERNAL_SECRET_FILE names /etc/messenger/secret, and nothing is mounted there";
    assert_found(&with_file("/etc/messenger/secret"), sentence);
}

#[test]
fn a_file_that_is_not_mounted() {
    let key = json!("/etc/messenger/keys/other.pem");
    api(
        "env/SIGNING_KEY_FILES/value",
        key,
        "Deployment/api: SIGNING_KEY_FILES names /etc/messenger/keys/other.pem",
    );
    let url = "postgres://messenger:$(POSTGRES_PASSWORD)@postgres.example.com:5432/messenger?sslmode=verify-full&sslrootcert=/etc/ca.pem";
    api("env/DATABASE_URL/value", json!(url), "Deployment/api: DATABASE_URL names /etc/ca.pem");
    gateway(
        "env/SSL_CERT_FILE/value",
        json!("/etc/ca.pem"),
        "Deployment/stream-gateway: SSL_CERT_FILE names",
    );
    api(
        "env/SSL_CERT_DIR/value",
        json!("/etc/ssl/certs:/etc/ca"),
        "Deployment/api: SSL_CERT_DIR names /etc/ca",
    );
}

#[test]
fn a_quantity_that_is_none_and_a_limit_below_its_request() {
    api("resources/requests/memory", json!("64MB"), "Deployment/api: \"64MB\" is no quantity");
    api("resources/limits/memory", json!("32Mi"), "Deployment/api: its limit of memory is below its request");
    api("resources/requests/cpu", Value::Null, "Deployment/api: requests of cpu are missing");
    api("resources/limits/memory", Value::Null, "Deployment/api: limits of memory are missing");
}

#[test]
fn a_word_that_kubernetes_does_not_know() {
    api("imagePullPolicy", json!("ifNotPresent"), "Deployment/api: \"ifNotPresent\" is none of Always");
    let path = "spec/rules/0/http/paths/0/pathType";
    found("production", "Ingress/stream", path, json!("exact"), "Ingress/stream: \"exact\" is none of Exact");
    found(
        "production",
        "Service/api",
        "spec/type",
        json!("Cluster"),
        "Service/api: \"Cluster\" is none of ClusterIP",
    );
    let kind = "spec/strategy/type";
    found("production", API, kind, json!("rolling"), "Deployment/api: \"rolling\" is none of RollingUpdate");
    let types = "spec/policyTypes";
    found(
        "production",
        "NetworkPolicy/api",
        types,
        json!(["ingress"]),
        "NetworkPolicy/api: \"ingress\" is none of",
    );
}

#[test]
fn numbers_of_replicas_that_make_no_sense() {
    let autoscaler = "HorizontalPodAutoscaler/stream-gateway";
    let scaler = |path: &str, value: Value, sentence: &str| {
        found("production", autoscaler, path, value, &format!("{autoscaler}: {sentence}"));
    };
    scaler("spec/minReplicas", json!(30), "minReplicas 30 is above maxReplicas 20");
    scaler("spec/minReplicas", json!(1), "minReplicas must be 2 or more");
    scaler("spec/behavior/scaleDown/stabilizationWindowSeconds", json!(60), "it scales down too fast");
    scaler("spec/behavior/scaleDown/policies/0/value", json!(5), "it must scale down one pod at a time");
    scaler(
        "spec/metrics/0/pods/target/averageValue",
        json!("14000"),
        "when one of 3 gateways with 14000 streams dies",
    );
    scaler(
        "spec/metrics/0/pods/metric/name",
        json!("streams"),
        "no rule of prometheus-adapter offers streams",
    );
    scaler("spec/metrics", json!([]), "gateways are scaled by messenger_gateway_streams");
    found(
        "production",
        GATEWAY,
        "spec/replicas",
        json!(3),
        "Deployment/stream-gateway: replicas are written down",
    );
    found("local", API, "spec/replicas", json!(1), "Deployment/api: nobody says that there are two or more");
    let cpu = format!("{API_CONTAINER}/resources/requests/cpu");
    found(
        "production",
        API,
        &cpu,
        Value::Null,
        "HorizontalPodAutoscaler/api: a share of CPU needs a request of CPU",
    );
    let most = "spec/maxReplicas";
    found(
        "production",
        "HorizontalPodAutoscaler/api",
        most,
        json!(12),
        "Deployment/api: 13 replicas with DATABASE_POOL_SIZE 12",
    );
    let budget = "PodDisruptionBudget/stream-gateway";
    found(
        "production",
        budget,
        "spec/maxUnavailable",
        json!(0),
        &format!("{budget}: it lets no node be emptied"),
    );
    let mut installation = sound("production");
    plant(&mut installation, budget, "spec/maxUnavailable", Value::Null);
    plant(&mut installation, budget, "spec/minAvailable", json!(3));
    assert_found(&installation, &format!("{budget}: it lets no node be emptied"));
    let mut installation = sound("production");
    installation.gateway_metrics.clear();
    assert_found(
        &installation,
        "k8s/prometheus-adapter/values.yaml: gateways have no metric messenger_gateway_streams",
    );
}

#[test]
fn pods_that_are_not_spread_or_not_guarded() {
    let spread = "spec/template/spec/topologySpreadConstraints";
    found(
        "production",
        GATEWAY,
        spread,
        json!([]),
        "Deployment/stream-gateway: it is not spread over topology",
    );
    let label = format!("{spread}/1/labelSelector/matchLabels/app.kubernetes.io~name");
    found(
        "production",
        GATEWAY,
        &label,
        json!("api"),
        "Deployment/stream-gateway: it is not spread over kubernetes.io/hostname",
    );
    let mut installation = sound("production");
    installation.set.objects.retain(|object| object.id() != "PodDisruptionBudget/api");
    assert_found(&installation, "Deployment/api: 0 PodDisruptionBudgets select it");
}

#[test]
fn a_variable_that_is_no_setting() {
    api("env/LISTEN/name", json!("LISTEN_ON"), "Deployment/api: LISTEN_ON is no setting of api");
    gateway(
        "env/MAX_STREAMS/name",
        json!("DATABASE_POOL_SIZE"),
        "DATABASE_POOL_SIZE is no setting of stream-gateway",
    );
    let settings = |name: &str| {
        let objects = sound("production").set.objects;
        let map = objects.iter().find(|object| object.kind == "ConfigMap" && object.name.starts_with(name));
        map.unwrap().id()
    };
    let both = settings("messenger-settings");
    found(
        "production",
        &both,
        "data/FEED_KEEP_DAYS",
        json!("7"),
        "Deployment/stream-gateway: FEED_KEEP_DAYS is no setting",
    );
}

#[test]
fn a_required_setting_that_nothing_sets() {
    for name in ["INTERNAL_SECRET", "DATABASE_URL", "REDIS_URL", "SIGNING_KEY_FILES"] {
        api(&format!("env/{name}"), Value::Null, &format!("Deployment/api: {name} must be set"));
    }
    gateway(
        "env/API_INTERNAL_URL/value",
        json!(""),
        "Deployment/stream-gateway: API_INTERNAL_URL must be set",
    );
    gateway("envFrom", Value::Null, "Deployment/stream-gateway: ORIGIN must be set");
    let url = "spec/template/spec/containers/migrate/env/DATABASE_URL";
    found("production", "Job/migrate", url, Value::Null, "Job/migrate: DATABASE_URL must be set");
}

#[test]
fn a_reference_to_a_variable_that_comes_later() {
    let mut installation = sound("production");
    for object in installation.set.objects.iter_mut().filter(|object| object.id() == API) {
        let container = step(step(&mut object.body["spec"]["template"]["spec"]["containers"], "api"), "env");
        container.as_array_mut().unwrap().reverse();
    }
    assert_found(
        &installation,
        "Deployment/api: DATABASE_URL refers to $(POSTGRES_PASSWORD), which is not set before it",
    );
}

#[test]
fn a_value_that_the_service_would_refuse() {
    gateway("env/MAX_STREAMS/value", json!("many"), "Deployment/stream-gateway: MAX_STREAMS is \"many\"");
    let mut installation = sound("production");
    plant(
        &mut installation,
        API,
        &format!("{API_CONTAINER}/env/LISTEN"),
        json!({ "name": "DEV_LOGIN", "value": "true" }),
    );
    assert_found(&installation, "Deployment/api: DEV_LOGIN lets anybody in");
    let url = json!("rediss://messenger:$(REDIS_PASSWORD)@other.example.com:6379");
    gateway(
        "env/REDIS_URL/value",
        url,
        "Deployment/stream-gateway: REDIS_URL is not what it is for Deployment/api",
    );
    gateway(
        "env/REDIS_URL/value",
        json!("rediss://one:$(REDIS_PASSWORD)@redis.example.com:6379,redis://two:6379"),
        "Deployment/stream-gateway: REDIS_URL leads out of the cluster without TLS",
    );
}

#[test]
fn an_outside_database_without_tls() {
    let url = json!(
        "postgres://messenger:$(POSTGRES_PASSWORD)@postgres.example.com:5432/messenger?sslmode=require"
    );
    api("env/DATABASE_URL/value", url, "Deployment/api: DATABASE_URL leads out of the cluster without TLS");
    let url = json!("redis://messenger:$(REDIS_PASSWORD)@redis.example.com:6379");
    gateway(
        "env/REDIS_URL/value",
        url,
        "Deployment/stream-gateway: REDIS_URL leads out of the cluster without TLS",
    );
}

#[test]
fn a_secret_in_the_tree() {
    let secret = json!({ "name": "INTERNAL_SECRET", "value": "0123456789abcdef0123456789abcdef" });
    api("env/INTERNAL_SECRET", secret, "Deployment/api: INTERNAL_SECRET is written out");
    let url = json!("redis://messenger:hunter2@redis.example.com:6379");
    gateway("env/REDIS_URL/value", url, "Deployment/stream-gateway: REDIS_URL has a password written out");
    let mut installation = sound("production");
    plant_object(
        &mut installation,
        json!({ "kind": "Secret", "metadata": { "name": "keys", "namespace": "messenger" } }),
    );
    assert_found(&installation, "Secret/keys: a Secret must not be in the tree");
    let mut installation = sound("production");
    let metadata = json!({ "name": "keys", "namespace": "messenger" });
    let key = ["-----BEGIN ", "PRIVATE KEY-----\nMC4"].concat();
    plant_object(
        &mut installation,
        json!({ "kind": "ConfigMap", "metadata": metadata, "data": { "k": key, "A_SECRET": "x", "AN_OTLP_HEADERS": "x" } }),
    );
    assert_found(&installation, "ConfigMap/keys: it holds a private key");
    assert_found(&installation, "ConfigMap/keys: A_SECRET is a secret");
    assert_found(&installation, "ConfigMap/keys: AN_OTLP_HEADERS is a secret");
}

#[test]
fn an_end_that_does_not_fit_into_the_grace_period() {
    let grace = "spec/template/spec/terminationGracePeriodSeconds";
    found(
        "production",
        GATEWAY,
        grace,
        json!(30),
        "Deployment/stream-gateway: preStop 0 s, its own wait and end of 40 s",
    );
    found("production", API, grace, Value::Null, "Deployment/api: preStop 0 s, its own wait and end of 20 s");
    found("production", API, grace, json!(90), "Deployment/api: TERMINATION_GRACE_SECONDS is not what");
    gateway(
        "env/DRAIN_WINDOW_SECONDS/value",
        json!("60"),
        "Deployment/stream-gateway: preStop 0 s, its own wait and end of 70 s",
    );
    gateway(
        "lifecycle",
        json!({ "preStop": { "sleep": { "seconds": 10 } } }),
        "Deployment/stream-gateway: preStop 10 s",
    );
    gateway(
        "lifecycle",
        json!({ "preStop": { "exec": { "command": ["sleep"] } } }),
        "its preStop hook runs a command",
    );
}

#[test]
fn a_rollout_that_takes_several_gateways_at_once() {
    let rollout = "spec/strategy/rollingUpdate";
    found(
        "production",
        GATEWAY,
        "spec/minReadySeconds",
        json!(5),
        "Deployment/stream-gateway: minReadySeconds is less than the 40 s",
    );
    found(
        "production",
        GATEWAY,
        &format!("{rollout}/maxSurge"),
        json!(3),
        "Deployment/stream-gateway: maxSurge is not 1",
    );
    found(
        "production",
        API,
        &format!("{rollout}/maxUnavailable"),
        json!(1),
        "Deployment/api: a rollout must start the new pod",
    );
}

#[test]
fn a_probe_that_asks_the_wrong_thing() {
    api("livenessProbe/httpGet/path", json!("/readyz"), "Deployment/api: its livenessProbe must ask /livez");
    api(
        "readinessProbe/httpGet/port",
        json!("http"),
        "Deployment/api: its readinessProbe must ask the port of OPS_LISTEN",
    );
    gateway("startupProbe", Value::Null, "Deployment/stream-gateway: its startupProbe must ask /livez");
}

#[test]
fn a_pod_that_is_not_restricted() {
    let own = |path: &str, value: Value, sentence: &str| {
        api(&format!("securityContext/{path}"), value, &format!("Deployment/api: {sentence}"));
    };
    own("allowPrivilegeEscalation", json!(true), "allowPrivilegeEscalation must be false");
    own("readOnlyRootFilesystem", json!(false), "readOnlyRootFilesystem must be true");
    own("capabilities/drop", json!([]), "capabilities must drop ALL");
    own("capabilities/add", json!(["SYS_PTRACE"]), "capabilities must not be added");
    own("privileged", json!(true), "it must not be privileged");
    own("runAsNonRoot", json!(false), "runAsNonRoot must be true");
    own("runAsUser", json!(0), "runAsUser must be a number other than 0");
    own("seccompProfile", json!({ "type": "Unconfined" }), "seccompProfile must be RuntimeDefault");
    own("procMount", json!("Unmasked"), "procMount must be Default");
    api("ports/http/hostPort", json!(80), "Deployment/api: it must take no port of its node");
    api("image", json!("registry.example.com/messenger/api"), "Deployment/api: its image must have a tag");
    api(
        "image",
        json!("registry.example.com:5000/messenger/api:latest"),
        "Deployment/api: its image must have a tag",
    );
    api(
        "image",
        json!("registry.example.com/messenger/api:2"),
        "Deployment/api and Job/migrate must run the same image",
    );
    let pod = |path: &str, value: Value, sentence: &str| {
        found(
            "production",
            API,
            &format!("spec/template/spec/{path}"),
            value,
            &format!("Deployment/api: {sentence}"),
        );
    };
    pod("hostNetwork", json!(true), "hostNetwork must not be used");
    pod("automountServiceAccountToken", Value::Null, "automountServiceAccountToken must be false");
    pod("enableServiceLinks", Value::Null, "enableServiceLinks must be false");
    pod(
        "volumes/authorities",
        json!({ "name": "authorities", "hostPath": { "path": "/" } }),
        "volume authorities is a hostPath",
    );
    pod(
        "securityContext/sysctls",
        json!([{ "name": "net.core.somaxconn", "value": "65535" }]),
        "the sysctl net.core.somaxconn",
    );
    let token = "automountServiceAccountToken";
    found(
        "production",
        "ServiceAccount/api",
        token,
        Value::Null,
        "ServiceAccount/api: automountServiceAccountToken",
    );
    let label = "metadata/labels/pod-security.kubernetes.io~enforce";
    found(
        "production",
        "Namespace/messenger",
        label,
        json!("baseline"),
        "Namespace/messenger: pod-security.kubernetes.io/enforce",
    );
}

#[test]
fn a_part_of_the_product_that_is_missing() {
    let image = "registry.example.com/messenger/gateway:1";
    gateway("image", json!(image), "nothing runs stream-gateway");
    found(
        "production",
        "Job/migrate",
        "spec/template/spec/containers/migrate/args",
        Value::Null,
        "nothing runs `api migrate`",
    );
}

#[test]
fn an_object_twice_or_elsewhere() {
    let namespace = "metadata/namespace";
    found(
        "production",
        API,
        namespace,
        json!("default"),
        "Deployment/api: it is not in the namespace of the set",
    );
    let mut installation = sound("production");
    plant_object(
        &mut installation,
        json!({ "kind": "Ingress", "metadata": { "name": "api", "namespace": "messenger" } }),
    );
    assert_found(&installation, "Ingress/api: there are two of it");
}

#[test]
fn an_ingress_that_routes_something_else() {
    let stream = |path: &str, value: Value, sentence: &str| {
        found("production", "Ingress/stream", path, value, &format!("Ingress/stream: {sentence}"));
    };
    let route = "spec/rules/0/http/paths/0";
    stream(
        &format!("{route}/pathType"),
        json!("Prefix"),
        "/api/messages (Prefix) must not lead to Deployment/stream-gateway",
    );
    stream(
        &format!("{route}/path"),
        json!("/api"),
        "/api (Exact) must not lead to Deployment/stream-gateway",
    );
    stream(
        &format!("{route}/backend/service/name"),
        json!("api"),
        "/api/messages (Exact) must not lead to Deployment/api",
    );
    stream(
        &format!("{route}/backend/service/name"),
        json!("gateway"),
        "/api/messages leads to a service or port that does not exist",
    );
    stream(
        "metadata/annotations/nginx.ingress.kubernetes.io~proxy-buffering",
        json!("on"),
        "proxy-buffering must be off",
    );
    stream(
        "metadata/annotations/nginx.ingress.kubernetes.io~proxy-read-timeout",
        json!("30"),
        "proxy-read-timeout is below",
    );
    stream(
        "metadata/annotations/nginx.ingress.kubernetes.io~enable-access-log",
        json!("true"),
        "its access log would hold tokens",
    );
    stream(
        "spec/rules/0/host",
        json!("other.example.com"),
        "ORIGIN is https://chat.example.com, and a rule is for",
    );
    stream("spec/tls", Value::Null, "ORIGIN is https://chat.example.com, and it has no TLS");
    stream("spec/ingressClassName", Value::Null, "it has no ingressClassName");
    let backend = json!({ "service": { "name": "api", "port": { "name": "http" } } });
    stream("spec/defaultBackend", backend, "a default backend gets what no rule names");
    let backend = json!({ "service": { "name": "api-internal", "port": { "name": "internal" } } });
    found(
        "production",
        "Ingress/api",
        &format!("{route}/backend"),
        backend,
        "Ingress/api: / leads to port 8081 of Deployment/api, which is not for clients",
    );
    let mut installation = sound("production");
    installation.set.objects.retain(|object| object.id() != "Ingress/stream");
    assert_found(&installation, "no Ingress routes /api/messages");
}

#[test]
fn a_flow_that_is_missing_or_that_nobody_needs() {
    let gateways = "app.kubernetes.io/name=stream-gateway";
    let policy = |name: &str, path: &str, value: Value, sentence: &str| {
        found("production", &format!("NetworkPolicy/{name}"), path, value, sentence);
    };
    let missing = format!("no NetworkPolicy lets {gateways} reach api at 8081");
    policy("api", "spec/ingress/1/ports/0/port", json!(8080), &missing);
    let extra = format!("NetworkPolicy/api: it lets {gateways} reach api at 8080, which nobody needs");
    policy("api", "spec/ingress/1/ports/0/port", json!(8080), &extra);
    policy("api", "spec/ingress/1/ports", Value::Null, "reach api at any port, which nobody needs");
    policy("api", "spec/ingress/1/from", Value::Null, "NetworkPolicy/api: it lets anybody reach api at 8081");
    policy(
        "api",
        "spec/ingress/1/from/0/podSelector",
        json!({}),
        "NetworkPolicy/api: it lets every pod of the namespace reach api",
    );
    policy(
        "api",
        "spec/ingress/0/from/0/podSelector",
        Value::Null,
        "it lets every pod in the namespace ingress-nginx reach api",
    );
    policy(
        "stream-gateway",
        "spec/egress",
        json!([]),
        "no NetworkPolicy lets stream-gateway reach app.kubernetes.io/name=api at 8081",
    );
    policy(
        "to-redis",
        "spec/egress/0/ports/0/port",
        json!(6380),
        "no NetworkPolicy lets stream-gateway reach a network outside at 6379",
    );
    policy(
        "to-postgres",
        "spec/podSelector/matchExpressions/0/values",
        json!(["api", "migration", "stream-gateway"]),
        "NetworkPolicy/to-postgres: it lets stream-gateway reach a network outside at 5432, which nobody needs",
    );
    policy(
        "to-postgres",
        "spec/egress/0/to/0/ipBlock/cidr",
        json!("0.0.0.0/0"),
        "other pods and the cloud's metadata included",
    );
    policy(
        "to-login-provider",
        "spec/egress/0/to/0/ipBlock/except",
        json!(["10.0.0.0/8"]),
        "NetworkPolicy/to-login-provider: it lets api reach all of 0.0.0.0/0",
    );
    policy(
        "dns",
        "spec/egress/0/ports/0/protocol",
        json!("TCP"),
        "no NetworkPolicy lets api reach k8s-app=kube-dns in the namespace kube-system at 53/UDP",
    );
    let mut installation = sound("production");
    let endpoint = json!("http://opentelemetry-collector.monitoring:4318");
    plant(
        &mut installation,
        "ConfigMap/messenger-settings-bbdbgtd24c",
        "data/OTEL_EXPORTER_OTLP_ENDPOINT",
        endpoint,
    );
    assert_found(
        &installation,
        "no NetworkPolicy lets stream-gateway reach app.kubernetes.io/name=opentelemetry-collector in the namespace monitoring at 4318",
    );
    let services =
        json!({ "key": "app.kubernetes.io/name", "operator": "In", "values": ["api", "stream-gateway"] });
    let to_collector = json!({
        "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": "monitoring" } },
        "podSelector": { "matchLabels": { "app.kubernetes.io/name": "opentelemetry-collector" } },
    });
    let policy = json!({
        "kind": "NetworkPolicy",
        "metadata": { "name": "to-collector", "namespace": "messenger", "labels": { "app.kubernetes.io/name": "messenger" } },
        "spec": {
            "podSelector": { "matchExpressions": [services] },
            "policyTypes": ["Egress"],
            "egress": [{ "to": [to_collector], "ports": [{ "port": 4318 }] }],
        },
    });
    plant_object(&mut installation, policy);
    assert_eq!(installation.findings(), Vec::<String>::new());
    let mut installation = sound("local");
    installation.set.objects.retain(|object| object.id() != "NetworkPolicy/nothing");
    assert_found(&installation, "StatefulSet/postgres: no NetworkPolicy closes its Egress");
    let mut installation = sound("local");
    installation.set.objects.retain(|object| object.id() != "NetworkPolicy/redis");
    assert_found(&installation, "lets app.kubernetes.io/name=api reach redis at 6379 (ingress of redis)");
}
