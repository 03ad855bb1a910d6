//! Wires the service together, runs it on given listeners, and stops it in order.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use service_kit::{
    client_address::TrustedProxies,
    explain,
    limiter::Limiter,
    ops,
    origins::Origins,
    redis_topology::KeyedRedis,
    server::{self, Limits},
    tasks::{Stage, Tasks},
    traces::{self, Tracer},
};
use tokio::{
    net::TcpListener,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use warp::Filter;

use crate::{
    commands::CommandContext,
    config::{Addresses, Config, FLUSH_TIMEOUT, OPS_STOP},
    erasing,
    explain::explain,
    external::ExternalUsers,
    http::{self, Api, ApiEdge, Cors, auth::Auth, oauth::SignIn, tokens::Tokens},
    last_used::{self, LastUsed},
    maintenance,
    metrics::Metrics,
    oauth,
    presence::PresenceService,
    pruner,
    publisher::publisher,
    readiness::{self, SharedReadiness},
    relay::{self, Relay},
    store::{Database, session::Route},
};

/// Gateways learn of a removed key within two of these intervals.
const ANNOUNCE_KEYS_EVERY: Duration = Duration::from_secs(4);

const CA_CERTIFICATES: &str =
    "failed to load the system's trusted CA certificates (SSL_CERT_FILE, ca-certificates)";

/// Bound sockets. Port 0 is allowed: ask them for their addresses.
pub struct Listeners {
    pub public: TcpListener,
    pub internal: TcpListener,
    pub ops: TcpListener,
}

impl Listeners {
    pub fn bind(addresses: Addresses) -> anyhow::Result<Self> {
        let bind = |name, address| {
            server::bind(address).with_context(|| format!("cannot listen on {name} {address}"))
        };
        Ok(Self {
            public: bind("LISTEN", addresses.public)?,
            internal: bind("INTERNAL_LISTEN", addresses.internal)?,
            ops: bind("OPS_LISTEN", addresses.ops)?,
        })
    }

    pub fn addresses(&self) -> std::io::Result<Addresses> {
        Ok(Addresses {
            public: self.public.local_addr()?,
            internal: self.internal.local_addr()?,
            ops: self.ops.local_addr()?,
        })
    }
}

/// Serves until `stop`, or until a task fails; then stops in the order of [`Stages`].
pub async fn run(config: Config, listeners: Listeners, stop: CancellationToken) -> anyhow::Result<()> {
    let tasks = Tasks::default();
    let stages = Stages::new(&tasks, &stop);
    let (metrics, registry) = Metrics::of_service();
    let readiness = SharedReadiness::new();
    let addresses = listeners.addresses()?;
    let limits = Limits {
        per_address: config.connections_per_address,
        proxies: config.trusted_proxies.clone(),
        stop: config.shutdown_grace,
        ..Limits::default()
    };
    let conflicts = metrics.database_conflicts.clone();
    let database = Database::new(config.database.clone(), config.database_pool_size, conflicts);

    // Before anything else: a process that waits for Postgres is alive.
    let routes = ops::routes(registry.into(), tasks.clone(), {
        let readiness = readiness.clone();
        move || readiness.get()
    });
    let routes = warp::service(routes.or(explain_route(database.clone(), metrics.clone())));
    let counted = metrics.http.listener("ops");
    let few = Limits { connections: ops::CONNECTIONS, stop: OPS_STOP, ..limits.clone() };
    let listen = |stop| server::serve(listeners.ops, routes, few, counted, stop);
    stages.operators.spawn("ops listener", listen);

    let route = tokio::select! {
        route = maintenance::wait_until_usable(&config.database) => route?,
        () = stop.cancelled() => return Ok(()),
        failure = tasks.failed() => return Err(failure.into()),
    };
    // A connection of its own: it looks often, and must not wait for one when requests are many.
    let relays = Database::new(config.database.clone(), 1, metrics.database_conflicts.clone());
    match route {
        Route::Direct => [&database, &relays].map(Database::use_sessions),
        Route::Pooled => {
            tracing::info!(
                "postgres is behind a transaction pooler; each statement is a transaction of three round trips"
            );
            [(); 2]
        }
    };

    let background = &stages.background;
    let postgres = config.database.clone();
    background.spawn("readiness watch", |stop| {
        readiness::watch(postgres, database.clone(), metrics.clone(), readiness, stop)
    });
    let (keep, issuer) = (config.keep, config.external_issuer.clone());

    let (proxies, shutdown_wait) = (config.trusted_proxies.clone(), config.shutdown_wait);
    let origins = Arc::new(Origins::new(config.origin.clone(), config.allowed_origins.clone()));
    let (tracer, exporter) = traces::start(
        config.traces.clone(),
        "messenger-api",
        env!("CARGO_PKG_VERSION"),
        metrics.traces.clone(),
    )
    .context(CA_CERTIFICATES)?;
    stages.tracing.spawn("trace exporter", |stop| exporter.run(stop));
    let api = make_api(config, &stages, &tasks, &origins, &tracer, &database, &metrics)?;
    let publisher = api.context.publisher.clone();
    background.spawn("pruner", |stop| pruner::run(database.clone(), publisher, keep, metrics.clone(), stop));
    let relay = Relay::new(relays.clone(), api.context.publisher.clone(), issuer, metrics.clone());
    let staged = api.context.staged.clone();
    stages.serving.spawn("relay", |stop| relay::run(relay, staged, stop));
    background.spawn("erasing of users", |stop| {
        let (publisher, begun) = (api.context.publisher.clone(), api.context.erasures.clone());
        erasing::run(database.clone(), publisher, metrics.clone(), begun, stop)
    });
    background.spawn("key announcements", |stop| announce_keys(api.clone(), stop));

    let routes = Cors::new(warp::service(http::public(&api)), origins);
    let service = ApiEdge::new(routes, proxies, tracer, metrics.clone());
    let counted = metrics.http.listener("public");
    let listen = |stop| server::serve(listeners.public, service, limits.clone(), counted, stop);
    stages.serving.spawn("public listener", listen);
    // Gateways connect without a proxy, and their requests are not traced.
    let routes = warp::service(http::internal(&api));
    let service = ApiEdge::new(routes, TrustedProxies::default(), Tracer::default(), metrics.clone());
    let counted = metrics.http.listener("internal");
    let listen = |stop| server::serve(listeners.internal, service, limits, counted, stop);
    stages.serving.spawn("internal listener", listen);
    drop(api);
    for (name, address) in
        [("public", addresses.public), ("internal", addresses.internal), ("ops", addresses.ops)]
    {
        tracing::info!(name, %address, "listening");
    }

    tokio::select! {
        () = stop.cancelled() => {}
        // The other tasks still stop in order.
        _ = tasks.failed() => stop.cancel(),
    }
    stages.stop(shutdown_wait).await;
    tokio::join!(database.close(), relays.close());
    if let Some(failure) = tasks.failure() {
        return Err(failure.into());
    }
    tracing::info!("process stopped");
    Ok(())
}

/// The tasks of the process, in the order in which they are told to stop.
struct Stages {
    /// Stops with the process, because readiness must say so first. Nothing else needs these tasks.
    background: Stage,
    serving: Stage,
    /// What requests need: it stops after them.
    behind_requests: Stage,
    publishing: Stage,
    tracing: Stage,
    operators: Stage,
}

impl Stages {
    fn new(tasks: &Tasks, stop: &CancellationToken) -> Self {
        Self {
            background: Stage::stopped_by(tasks, stop.clone()),
            serving: Stage::new(tasks),
            behind_requests: Stage::new(tasks),
            publishing: Stage::new(tasks),
            tracing: Stage::new(tasks),
            operators: Stage::new(tasks),
        }
    }

    /// `wait`: how long the service is unready and still serves, so that load balancers notice.
    async fn stop(self, wait: Duration) {
        sleep(wait).await;
        tracing::info!("process stopping; no new connections");
        self.serving.stop().await;
        let (published, _) = tokio::join!(
            timeout(FLUSH_TIMEOUT, self.publishing.stop()),
            // Notes of use that Postgres does not take in time are lost.
            timeout(FLUSH_TIMEOUT, self.behind_requests.stop()),
        );
        if published.is_err() {
            tracing::warn!(
                "redis did not take the last events in time; delivery falls back to reconciliation"
            );
        }
        // A collector that does not answer costs the last spans.
        let _ = timeout(traces::LAST_SPANS, self.tracing.stop()).await;
        self.background.stop().await;
        self.operators.stop().await;
    }
}

fn make_api(
    config: Config,
    stages: &Stages,
    tasks: &Tasks,
    origins: &Arc<Origins>,
    tracer: &Tracer,
    database: &Database,
    metrics: &Metrics,
) -> anyhow::Result<Arc<Api>> {
    metrics.database_connections_limit.set(i64::try_from(config.database_pool_size).unwrap_or(i64::MAX));
    let (limiter, counter) = Limiter::new(
        config.redis.clone(),
        config.channels.clone(),
        config.limits.patience,
        metrics.limits.clone(),
    );
    // Before its worker, which has nothing to do when there are no rules.
    let limits = http::limits::RequestLimits::new(limiter, &config.limits);
    stages.serving.spawn("shared rate limits", |stop| counter.run(stop));
    let keyed = KeyedRedis::new(config.redis.clone());
    let channels = config.channels.clone();
    let (publisher, worker) = publisher(config.redis, config.channels, tracer.clone(), metrics.clone());
    stages.publishing.spawn("publisher", |stop| worker.run(tasks.clone(), stop));
    let context = CommandContext::new(database.clone(), publisher, tracer.clone());

    let presence = config.presence.then(|| {
        let publisher = context.publisher.clone();
        PresenceService::new(keyed, channels, database.clone(), publisher, metrics.clone())
    });
    if let Some(presence) = presence.clone() {
        stages.behind_requests.spawn("presence of lost gateways", |stop| presence.run(stop));
    }

    let used = LastUsed::default();
    let external =
        config.external.map(ExternalUsers::new).transpose().context(CA_CERTIFICATES)?.map(Arc::new);
    let auth = Auth::new(&config.keys, origins.clone(), used.clone(), context.clone(), external.clone());
    let tokens = Tokens::new(config.keys, &config.origin, config.lifetimes);
    stages.behind_requests.spawn("last use of sessions", |stop| last_used::run(used, database.clone(), stop));
    if let Some(external) = external.clone() {
        stages.behind_requests.spawn("external keys", |stop| external.follow(stop));
    }
    let providers = oauth::providers(config.providers, &config.origin, config.provider_time_limit)
        .context(CA_CERTIFICATES)?;
    let sign_in = SignIn::new(
        providers,
        config.origin,
        &config.state_secrets,
        config.callback_token_in_query,
        metrics.clone(),
    );
    Ok(Arc::new(Api {
        context,
        auth,
        tokens,
        limits,
        external_issuer: config.external_issuer,
        external,
        dev_login: config.dev_login,
        usernames_change: config.usernames_change,
        presence,
        longest_message: config.longest_message,
        largest_group: config.largest_group,
        edit_window: config.keep.edit_window,
        sign_in,
        internal_secrets: config.internal_secrets,
    }))
}

fn explain_route(
    database: Database,
    metrics: Metrics,
) -> impl Filter<Extract = (impl warp::Reply,), Error = warp::Rejection> + Clone {
    explain::route(move |request| {
        let (database, metrics) = (database.clone(), metrics.clone());
        async move { explain(&database, &metrics, request).await }
    })
}

/// Announces the valid keys to gateways every few seconds, because an announcement can be missed.
async fn announce_keys(api: Arc<Api>, stop: CancellationToken) {
    while !stop.is_cancelled() {
        api.context.publisher.publish_keys(&api.auth.keys_version());
        let wait = ANNOUNCE_KEYS_EVERY.mul_f64(rand::random_range(0.8..1.2));
        stop.run_until_cancelled(sleep(wait)).await;
    }
}
