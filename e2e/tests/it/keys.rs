//! Signing keys rotate under load without a failed request. Removing a leaked key closes its streams.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use e2e::{Service, World};
use serde_json::json;
use testkit::{
    cluster::Cluster,
    http::{Answer, Call, Client},
    ports::free_port,
    soon,
    sse::StreamRequest,
};

use crate::support::{goodbye, ready};

struct Load {
    apis: [String; 2],
    stream: String,
    client: Client,
    tokens: Mutex<Vec<String>>,
    stop: AtomicBool,
    requests: AtomicUsize,
    streams: AtomicUsize,
}

/// `None` from a replica that is being replaced or too busy: an ingress would use the other one.
async fn succeed(call: Call) -> Option<Answer> {
    let answer = call.send().await.ok().filter(|answer| answer.status != 503)?;
    assert_eq!(answer.status, 200, "{}", answer.text());
    Some(answer)
}

impl Load {
    /// Logs in, and uses the newest token, the oldest and one between at every replica, until stopped.
    async fn requests(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            for api in &self.apis {
                let login = self.client.post(format!("{api}/api/login")).json(&json!({ "username": "jane" }));
                let Some(answer) = succeed(login).await else { continue };
                let token = answer.json()["token"].as_str().unwrap().to_owned();
                self.tokens.lock().unwrap().push(token);
                for token in self.some() {
                    for api in &self.apis {
                        let call = self.client.get(format!("{api}/api/auth_user")).bearer(&token);
                        let answered = succeed(call).await.is_some();
                        self.requests.fetch_add(usize::from(answered), Ordering::Relaxed);
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn streams(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            for token in self.some() {
                ready(StreamRequest::new(self.stream.clone()).bearer(&token)).await;
                self.streams.fetch_add(1, Ordering::Relaxed);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn some(&self) -> Vec<String> {
        let tokens = self.tokens.lock().unwrap();
        let indices = [0, tokens.len() / 2, tokens.len().saturating_sub(1)];
        indices.iter().filter_map(|index| tokens.get(*index).cloned()).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_rotated_under_load_and_no_request_is_rejected() {
    let world = World::new().await;
    world.person("jane").await;
    let deploy = async || world.api().env("SHUTDOWN_WAIT_SECONDS", 0).ready().await;
    let mut apis: [Service; 2] = [deploy().await, deploy().await];
    let gateway = world.gateway(apis[0].internal()).ready().await;
    let load = Load {
        apis: [apis[0].url(""), apis[1].url("")],
        stream: gateway.url("/api/messages"),
        client: Client::default(),
        tokens: Mutex::default(),
        stop: AtomicBool::new(false),
        requests: AtomicUsize::new(0),
        streams: AtomicUsize::new(0),
    };
    let rotate = async {
        let progress = async || {
            let before = (load.requests.load(Ordering::Relaxed), load.streams.load(Ordering::Relaxed));
            testkit::until("both kinds of clients went on", || async {
                load.requests.load(Ordering::Relaxed) > before.0 + 50
                    && load.streams.load(Ordering::Relaxed) > before.1 + 20
            })
            .await;
        };
        progress().await;
        // First all replicas publish both keys, then one after the other signs with the new one.
        for names in [["signing.pem", "another.pem"], ["another.pem", "signing.pem"]] {
            for api in apis.iter_mut().rev() {
                api.redeploy("SIGNING_KEY_FILES", world.key_files(&names)).await;
                progress().await;
            }
        }
        load.stop.store(true, Ordering::Relaxed);
    };
    tokio::join!(load.requests(), load.streams(), rotate);
    let tokens = load.tokens.into_inner().unwrap();
    tokens.iter().for_each(|token| world.remember(token));

    // Once all tokens of the old key have expired, it is removed.
    for api in &mut apis {
        api.redeploy("SIGNING_KEY_FILES", world.key_files(&["another.pem"])).await;
    }
    let status = async |token: &str| {
        world.client.get(apis[0].url("/api/auth_user")).bearer(token).send().await.unwrap().status
    };
    assert_eq!(status(tokens.first().unwrap()).await, 401);
    assert_eq!(status(tokens.last().unwrap()).await, 200);
    assert_eq!(gateway.metric("messenger_gateway_stream_request_errors_total").await, 0.0);
    assert_eq!(gateway.metric("messenger_gateway_streams_rejected_total").await, 0.0);
}

/// Once the last replica without the key is ready, its streams end and the gateway refuses its tokens.
async fn remove_key(world: &World, reconcile: (&str, u64)) {
    let deploy = async || world.api().env("SHUTDOWN_WAIT_SECONDS", 0).ready().await;
    let mut apis = [deploy().await, deploy().await];
    let gateway = world.gateway(apis[0].internal()).env(reconcile.0, reconcile.1).ready().await;
    let jane = world.user(&apis[0], "jane").await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(ready(gateway.stream(&jane)).await);
    }
    // The gateway uses the first one, which still has the old configuration while the second one has the new.
    for api in apis.iter_mut().rev() {
        api.redeploy("SIGNING_KEY_FILES", world.key_files(&["another.pem"])).await;
    }
    for stream in &mut streams {
        assert_eq!(soon("the stream ends", goodbye(stream)).await, ("revoked".to_owned(), false));
    }
    let status = async |token| gateway.anonymous_stream().bearer(token).open().await.unwrap().status;
    assert_eq!(status(&jane.token).await, 401);
    world.client.get(apis[0].url("/api/auth_user")).bearer(&jane.token).expect(401).await;
    let jane = world.login(&apis[0], "jane").await;
    ready(gateway.stream(&jane)).await;
}

/// Longer than any test, so that no reconcile finds it.
const NO_RECONCILE: (&str, u64) = ("RECONCILE_SECONDS", 300);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_key_ends_its_streams_by_redis() {
    remove_key(&World::new().await, NO_RECONCILE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_key_ends_its_streams_by_a_redis_cluster() {
    let cluster = Cluster::start();
    let settings = [("REDIS_TOPOLOGY", "cluster".to_owned()), ("REDIS_URL", cluster.urls())];
    let world = World::with_redis_settings(settings).await;
    remove_key(&world, NO_RECONCILE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_key_ends_its_streams_without_redis() {
    let world = World::with_redis(format!("redis://127.0.0.1:{}/", free_port())).await;
    remove_key(&world, ("DEGRADED_RECONCILE_MILLIS", 1_000)).await;
}
