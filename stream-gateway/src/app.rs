//! Wires the gateway together, runs it on given listeners, and stops it in order: unready, a wait for load balancers to
//! notice, a steady parting from all streams, the rest.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use anyhow::Context as _;
use service_kit::{
    cookies::Cookies,
    ended_sessions::EndedSessions,
    explain,
    limiter::Limiter,
    ops::{self, Readiness},
    origins::Origins,
    server::{self, Limits as ServerLimits},
    tasks::Tasks,
    traces,
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc, oneshot},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use warp::Filter;

use crate::{
    api_client::ApiClient,
    config::{Config, LAST_GOODBYES},
    descriptors,
    engine::{self, EngineCommand, Inputs, Rights},
    explain::explain,
    http::{self, Streams},
    identities::identities,
    keys::Keys,
    limits::StreamLimits,
    metrics::Metrics,
    subscriber::{self, DesiredSubscriptions, Subscriber},
};

pub struct Listeners {
    pub public: TcpListener,
    pub ops: TcpListener,
}

impl Listeners {
    pub fn bind(config: &Config) -> anyhow::Result<Self> {
        let bind = |name: &'static str, address| -> anyhow::Result<TcpListener> {
            let listener =
                server::bind(address).with_context(|| format!("cannot listen on {address} ({name})"))?;
            tracing::info!(name, address = %listener.local_addr()?, "listening");
            Ok(listener)
        };
        Ok(Self { public: bind("public", config.listen)?, ops: bind("ops", config.ops_listen)? })
    }
}

/// Runs until `stop`, then drains.
#[expect(clippy::disallowed_methods, reason = "each is watched")]
pub async fn run(config: Config, listeners: Listeners, stop: CancellationToken) -> anyhow::Result<()> {
    let (metrics, registry) = Metrics::of_service();
    let metrics = Arc::new(metrics);
    metrics.streams_limit.set(config.admission.streams as i64);
    metrics.replay_buffer_limit_bytes.set(config.delivery.replay_buffer_bytes as i64);
    let (tracer, exporter) =
        traces::start(config.traces, "stream-gateway", env!("CARGO_PKG_VERSION"), metrics.traces.clone())
            .context(
                "failed to load the system's trusted CA certificates (SSL_CERT_FILE, ca-certificates)",
            )?;
    let tasks = Tasks::default();
    let stop_tracing = CancellationToken::new();
    let exporting = tasks.spawn("trace exporter", &stop_tracing, exporter.run(stop_tracing.clone()));
    let api = ApiClient::new(&config.api_internal_url, config.internal_secrets, metrics.clone());
    let keys = Arc::new(Keys::new(config.origin.as_str(), api.on_any_replica(), metrics.clone()));
    let (identities, asking) = identities(api.clone());
    let desired = DesiredSubscriptions::new(config.channels.clone());
    let ended_sessions = EndedSessions::default();
    let (updates_in, updates) = mpsc::channel(subscriber::QUEUE);
    let (new_streams_in, new_streams) = mpsc::channel(engine::NEW_STREAMS);
    let (commands_in, commands) = mpsc::channel(4);

    let stop_delivery = CancellationToken::new();
    let inputs = Inputs { new_streams, updates, commands, tasks: tasks.clone(), stop: stop_delivery.clone() };
    engine::start(
        config.delivery,
        api.clone(),
        Rights { keys: keys.clone(), ended_sessions: ended_sessions.clone() },
        desired.clone(),
        tracer.clone(),
        metrics.clone(),
        inputs,
    )?;

    let end = CancellationToken::new();
    let running = TaskTracker::new();
    let following = keys.clone().follow(end.clone());
    running.spawn(tasks.watch("keys", &end, following));
    running.spawn(tasks.watch("external identities", &end, asking.run(end.clone())));
    let subscriber = Subscriber {
        topology: config.redis.clone(),
        channels: config.channels.clone(),
        keys: keys.clone(),
        desired,
        updates: updates_in,
        tracer,
        tasks: tasks.clone(),
        metrics: metrics.clone(),
    };
    running.spawn(tasks.watch("redis subscriber", &end, subscriber.run(end.clone())));

    let stopping = Arc::new(AtomicBool::new(false));
    let readiness = {
        let (api, keys, stopping, metrics) = (api.clone(), keys.clone(), stopping.clone(), metrics.clone());
        move || readiness(&api, &keys, &stopping, &metrics)
    };
    let explaining = explain::route({
        let engine = commands_in.clone();
        move |question| {
            let engine = engine.clone();
            async move { explain(&engine, question).await }
        }
    });
    let ops_routes = ops::routes(Arc::new(registry), tasks.clone(), readiness);
    let ops_routes = warp::service(ops_routes.or(explaining));
    let bounds = ServerLimits {
        per_address: config.connections_per_address,
        proxies: config.trusted_proxies.clone(),
        ..ServerLimits::default()
    };
    let ops_bounds = ServerLimits { connections: descriptors::OPS, ..bounds.clone() };
    let counted = metrics.http.listener("ops");
    let serving = server::serve(listeners.ops, ops_routes, ops_bounds, counted, end.clone());
    running.spawn(tasks.watch("ops listener", &end, serving));

    let (limiter, counting) =
        Limiter::new(config.redis, config.channels, config.opening.patience, metrics.limits.clone());
    let limits = StreamLimits::new(&config.admission, &config.opening, limiter);
    running.spawn(tasks.watch("shared rate limits", &end, counting.run(end.clone())));

    let counted = metrics.http.listener("public");
    let streams = Arc::new(Streams {
        keys,
        identities: Arc::new(identities),
        limits,
        ended: ended_sessions,
        metrics,
        cookies: Cookies::new(&config.origin),
        origins: Origins::new(config.origin, config.allowed_origins),
        trusted_proxies: config.trusted_proxies,
        max_age: config.admission.max_age,
        new_streams: new_streams_in,
        rejecting: Arc::new(Semaphore::new(descriptors::REJECTED)),
        draining: AtomicBool::new(false),
    });
    let routes = warp::service(http::routes(streams.clone()));
    let bounds = ServerLimits { connections: descriptors::HTTP, ..bounds };
    let serving = server::serve(listeners.public, routes, bounds, counted, end.clone());
    running.spawn(tasks.watch("public listener", &end, serving));

    tokio::select! {
        () = stop.cancelled() => {}
        // In the same order, so that what still works ends well.
        _ = tasks.failed() => {}
    }
    stopping.store(true, Ordering::Relaxed);
    tracing::info!(wait = ?config.drain.wait, "shutdown: unready; waiting for load balancers to notice");
    sleep(config.drain.wait).await;
    streams.draining.store(true, Ordering::Relaxed);
    let (done_in, done) = oneshot::channel();
    stop_delivery.cancel();
    let window = config.drain.window;
    if commands_in.send(EngineCommand::Drain { window, done: done_in }).await.is_ok() {
        let _ = timeout(window + LAST_GOODBYES, done).await;
    }
    end.cancel();
    running.close();
    running.wait().await;
    stop_tracing.cancel();
    // A collector that takes no more costs the last spans.
    let _ = timeout(traces::LAST_SPANS, exporting).await;
    tasks.failure().map_or(Ok(()), |failure| Err(failure.into()))
}

/// A gateway without Redis is degraded and still of use; one without keys can admit nobody. One that `api` refuses from its
/// start on has no keys; one that it refuses later keeps its streams, which no other gateway could serve better.
fn readiness(api: &ApiClient, keys: &Keys, stopping: &AtomicBool, metrics: &Metrics) -> Readiness {
    if stopping.load(Ordering::Relaxed) {
        return Readiness { ready: false, note: "stopping".into() };
    }
    if !keys.known() {
        let note = if api.rejects_secrets() {
            "no public keys from api: it rejects INTERNAL_SECRET"
        } else {
            "no public keys from api yet"
        };
        return Readiness { ready: false, note: note.into() };
    }
    let note = match (api.rejects_secrets(), metrics.redis_degraded.get()) {
        (true, _) => "ready; degraded: api rejects INTERNAL_SECRET, so joining and lagging streams wait",
        (false, 0) => "ready",
        (false, _) => "ready; degraded: Redis is unavailable, delivery falls back to reconciliation",
    };
    Readiness { ready: true, note: note.into() }
}
