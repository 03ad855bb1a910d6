//! Wires the gateway together, runs it on given listeners, and stops it in order.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
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
    tasks::{Stage, Tasks},
    traces::{self, Tracer},
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc, oneshot},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use warp::Filter;

use crate::{
    api_client::ApiClient,
    config::{Config, Drain, LAST_GOODBYES, LAST_REQUESTS},
    descriptors,
    engine::{self, EngineCommand, Inputs, NewStream, Rights},
    explain::explain,
    http::{self, Streams},
    identities::identities,
    keys::Keys,
    limits::StreamLimits,
    memory,
    metrics::Metrics,
    presence::{self, PresenceChanges},
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
        let public = bind("public", config.listen)?;
        engine::set_options(&public, config.delivery.write_deadline)
            .context("cannot set the options of the public listener")?;
        Ok(Self { public, ops: bind("ops", config.ops_listen)? })
    }
}

/// Serves until `stop`, or until a task fails; then stops in the order of [`Stages::stop`].
pub async fn run(config: Config, listeners: Listeners, stop: CancellationToken) -> anyhow::Result<()> {
    let tasks = Tasks::default();
    let (metrics, registry) = Metrics::of_service();
    let metrics = Arc::new(metrics);
    metrics.streams_limit.set(config.admission.streams as i64);
    metrics.replay_buffer_limit_bytes.set(config.delivery.replay_buffer_bytes as i64);
    let limits = ServerLimits {
        per_address: config.connections_per_address,
        proxies: config.trusted_proxies.clone(),
        stop: LAST_REQUESTS,
        ..ServerLimits::default()
    };

    let tracing = Stage::new(&tasks);
    let (tracer, exporter) = traces::start(
        config.traces.clone(),
        "stream-gateway",
        env!("CARGO_PKG_VERSION"),
        metrics.traces.clone(),
    )
    .context("failed to load the system's trusted CA certificates (SSL_CERT_FILE, ca-certificates)")?;
    tracing.spawn("trace exporter", |stop| exporter.run(stop));

    let serving = Stage::new(&tasks);
    let api = ApiClient::new(&config.api_internal_url, config.internal_secrets.clone(), metrics.clone());
    let keys = Arc::new(Keys::new(config.origin.as_str(), api.on_any_replica(), metrics.clone()));
    serving.spawn("keys", |stop| keys.clone().follow(stop));
    let ended_sessions = EndedSessions::default();
    let rights = Rights { keys: keys.clone(), ended_sessions: ended_sessions.clone() };
    let delivery = start_delivery(&config, &serving, &tasks, api.clone(), rights, tracer, &metrics)?;

    let stopping = Arc::new(AtomicBool::new(false));
    let readiness = {
        let (api, keys, stopping, metrics) = (api.clone(), keys.clone(), stopping.clone(), metrics.clone());
        move || readiness(&api, &keys, &stopping, &metrics)
    };
    let routes = ops::routes(Arc::new(registry), tasks.clone(), readiness);
    let routes = warp::service(routes.or(explain_route(delivery.commands.clone())));
    let bounds = ServerLimits { connections: ops::CONNECTIONS, ..limits.clone() };
    let counted = metrics.http.listener("ops");
    serving.spawn("ops listener", |stop| server::serve(listeners.ops, routes, bounds, counted, stop));

    let (drain, counted) = (config.drain, metrics.http.listener("public"));
    let new_streams = delivery.new_streams.clone();
    let streams = make_streams(config, &serving, api, keys, ended_sessions, new_streams, metrics);
    let routes = warp::service(http::routes(streams.clone()));
    // A request here takes milliseconds, and the engine notices that the client has gone.
    let bounds = ServerLimits { connections: descriptors::HTTP, half_close: true, ..limits };
    serving.spawn("public listener", |stop| server::serve(listeners.public, routes, bounds, counted, stop));

    tokio::select! {
        () = stop.cancelled() => {}
        // The other tasks still stop in order.
        _ = tasks.failed() => {}
    }
    Stages { stopping, streams, delivery, serving, tracing }.stop(drain).await;
    tasks.failure().map_or(Ok(()), |failure| Err(failure.into()))
}

/// The parts of the process, in the order in which they stop.
struct Stages {
    /// Makes the process unready.
    stopping: Arc<AtomicBool>,
    streams: Arc<Streams>,
    delivery: DeliveryThread,
    serving: Stage,
    tracing: Stage,
}

impl Stages {
    async fn stop(self, drain: Drain) {
        self.stopping.store(true, Ordering::Relaxed);
        tracing::info!(wait = ?drain.wait, "shutdown: unready; waiting for load balancers to notice");
        sleep(drain.wait).await;
        self.streams.draining.store(true, Ordering::Relaxed);
        self.delivery.drain(drain.window).await;
        self.serving.stop().await;
        // A collector that does not answer costs the last spans.
        let _ = timeout(traces::LAST_SPANS, self.tracing.stop()).await;
    }
}

/// The delivery thread, as the rest of the process reaches it.
struct DeliveryThread {
    new_streams: mpsc::Sender<NewStream>,
    commands: mpsc::Sender<EngineCommand>,
    /// From then on the thread may end.
    stop: CancellationToken,
}

impl DeliveryThread {
    /// Closes all streams at a steady rate over `window`.
    async fn drain(&self, window: Duration) {
        let (done_in, done) = oneshot::channel();
        self.stop.cancel();
        if self.commands.send(EngineCommand::Drain { window, done: done_in }).await.is_ok() {
            let _ = timeout(window + LAST_GOODBYES, done).await;
        }
    }
}

/// Starts the delivery thread and the Redis subscriber that feeds it.
fn start_delivery(
    config: &Config,
    serving: &Stage,
    tasks: &Tasks,
    api: ApiClient,
    rights: Rights,
    tracer: Tracer,
    metrics: &Arc<Metrics>,
) -> anyhow::Result<DeliveryThread> {
    let desired = DesiredSubscriptions::new(config.channels.clone());
    let (updates_in, updates) = mpsc::channel(subscriber::QUEUE);
    let (new_streams_in, new_streams) = mpsc::channel(engine::NEW_STREAMS);
    let (commands_in, commands) = mpsc::channel(4);
    let stop = CancellationToken::new();
    let (keys, redis_tracer) = (rights.keys.clone(), tracer.clone());
    let presence = PresenceChanges::new(config.presence);
    // During a rollout some replicas may not know presence yet, and one may hang.
    let (reports, reporting, counted) = (presence.clone(), api.on_any_replica(), metrics.clone());
    serving.spawn("presence reports", |stop| presence::run(reports, reporting, counted, stop));
    let inputs =
        Inputs { new_streams, updates, commands, presence, tasks: tasks.clone(), stop: stop.clone() };
    let delivery =
        engine::start(config.delivery, api, rights, desired.clone(), tracer, metrics.clone(), inputs)?;
    let subscriber = Subscriber {
        topology: config.redis.clone(),
        channels: config.channels.clone(),
        keys,
        desired,
        updates: updates_in,
        delivery,
        tracer: redis_tracer,
        tasks: tasks.clone(),
        metrics: metrics.clone(),
    };
    serving.spawn("redis subscriber", |stop| subscriber.run(stop));
    serving.spawn("memory", |stop| memory::run(metrics.clone(), stop));
    Ok(DeliveryThread { new_streams: new_streams_in, commands: commands_in, stop })
}

/// Makes what the stream route works with, and starts the tasks that belong to it.
fn make_streams(
    config: Config,
    serving: &Stage,
    api: ApiClient,
    keys: Arc<Keys>,
    ended: EndedSessions,
    new_streams: mpsc::Sender<NewStream>,
    metrics: Arc<Metrics>,
) -> Arc<Streams> {
    let (identities, lookups) = identities(api);
    serving.spawn("external identities", |stop| lookups.run(stop));
    let (limiter, counter) =
        Limiter::new(config.redis, config.channels, config.opening.patience, metrics.limits.clone());
    // Before its worker, which has nothing to do when there are no rules.
    let limits = StreamLimits::new(&config.admission, &config.opening, limiter);
    serving.spawn("shared rate limits", |stop| counter.run(stop));
    Arc::new(Streams {
        keys,
        identities: Arc::new(identities),
        limits,
        ended,
        metrics,
        cookies: Cookies::new(&config.origin),
        origins: Origins::new(config.origin, config.allowed_origins),
        trusted_proxies: config.trusted_proxies,
        max_age: config.admission.max_age,
        new_streams,
        rejecting: Arc::new(Semaphore::new(descriptors::REJECTED)),
        draining: AtomicBool::new(false),
    })
}

fn explain_route(
    engine: mpsc::Sender<EngineCommand>,
) -> impl Filter<Extract = (impl warp::Reply,), Error = warp::Rejection> + Clone {
    explain::route(move |request| {
        let engine = engine.clone();
        async move { explain(&engine, request).await }
    })
}

/// A gateway without Redis is degraded but ready; one without keys can admit no stream. If `api` rejects its secrets from the
/// start, it has no keys; if `api` rejects them later, it stays ready, because no other gateway could serve its streams better.
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
