//! Wires it all, runs on given listeners, stops in order.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use prometheus_client::metrics::counter::Counter;
use service_kit::{
    client_address::TrustedProxies,
    explain,
    limiter::Limiter,
    ops,
    origins::Origins,
    server::{self, Limits},
    tasks::Tasks,
    traces::{self, Tracer},
};
use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use tokio::{net::TcpListener, time::timeout};
use tokio_util::sync::CancellationToken;
use warp::Filter;

use crate::{
    commands::Context,
    config::{Addresses, Config},
    explain::explain,
    external::External,
    http::{self, Api, Cors, Edge, auth::Auth, oauth::SignIn},
    last_used::{self, LastUsed},
    metrics::Metrics,
    oauth,
    pruner::{self, Pruned},
    publisher::publisher,
    readiness::{self, Judgement},
    store::{
        self, Database,
        feed::{self, Keep},
        schema,
        session::{self, Route, Unfit},
    },
};

/// For Postgres to be there when the service starts, and for its answer to the first question.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Bounds one attempt to connect and to inspect the server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For what is still queued for Redis when the service stops.
pub const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Gateways know a removed key no longer than two of these.
const ANNOUNCE_KEYS_EVERY: Duration = Duration::from_secs(4);

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

/// Applies what is missing of the schema.
pub async fn migrate(postgres: PgConnectOptions) -> anyhow::Result<()> {
    let (mut connections, route) = connect(&postgres).await?;
    schema::migrate(&mut connections, route).await.context("cannot migrate")?;
    tracing::info!(migrations = schema::MIGRATIONS.iter().count(), "the schema is current");
    close(connections).await;
    Ok(())
}

/// Gives every user's feed a new epoch: for a database that was restored to an earlier point, before it is served again.
pub async fn new_epoch(postgres: PgConnectOptions) -> anyhow::Result<()> {
    let (mut connections, _) = connect(&postgres).await?;
    schema::require_current(&mut connections[0]).await?;
    let feeds = feed::redraw_epochs(&mut connections[0]).await.context("cannot draw new epochs")?;
    tracing::info!(feeds, "every feed has a new epoch");
    close(connections).await;
    Ok(())
}

/// Refuses a database that cannot be used as it is. `false`: it does not answer, so nothing is known of it.
pub async fn check_database(postgres: &PgConnectOptions) -> anyhow::Result<bool> {
    match timeout(CONNECT_TIMEOUT, session::connect(postgres)).await {
        Ok(Ok((connections, _))) => {
            close(connections).await;
            Ok(true)
        }
        Ok(Err(Unfit::Store(error))) if store::is_passing(&error) => Ok(false),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Ok(false),
    }
}

/// Deletes all that need not be kept, in the same small steps as a server, without its pauses.
pub async fn prune(postgres: PgConnectOptions, keep: Keep) -> anyhow::Result<()> {
    let (mut connections, _) = connect(&postgres).await?;
    schema::require_current(&mut connections[0]).await?;
    close(connections).await;
    let database = Database::new(postgres, 1, Counter::default());
    let pruned = pruner::prune_all(&database, keep).await.context("cannot prune")?;
    let Pruned { events, sessions, codes } = pruned;
    tracing::info!(events, sessions, codes, "deleted what need not be kept");
    database.close().await;
    Ok(())
}

/// Serves until `stop`, then ends in order: unready, still serving while the word spreads; then no new connections, requests
/// in progress finish; then what they caused is published.
pub async fn run(config: Config, listeners: Listeners, stop: CancellationToken) -> anyhow::Result<()> {
    let (metrics, registry) = Metrics::of_service();
    let judgement = Judgement::new();
    let tasks = Tasks::default();
    let limits = Limits {
        per_address: config.connections_per_address,
        proxies: config.trusted_proxies.clone(),
        stop: config.shutdown_grace,
        ..Limits::default()
    };

    // The operators' listener is the first and the last: also who waits for Postgres is alive.
    let stop_ops = CancellationToken::new();
    let _stop_ops_on_failure = stop_ops.clone().drop_guard();
    let conflicts = metrics.database_conflicts.clone();
    let database = Database::new(config.database.clone(), config.database_pool_size, conflicts);
    let operators = ops::routes(registry.into(), tasks.clone(), {
        let judgement = judgement.clone();
        move || judgement.get()
    });
    let explaining = explain::route({
        let (database, metrics) = (database.clone(), metrics.clone());
        move |question| {
            let (database, metrics) = (database.clone(), metrics.clone());
            async move { explain(&database, &metrics, question).await }
        }
    });
    let operators = operators.or(explaining);
    let addresses = listeners.addresses()?;
    let counted = metrics.http.listener("ops");
    let operators = warp::service(operators);
    let operators = server::serve(listeners.ops, operators, limits.clone(), counted, stop_ops.clone());
    let operators = tasks.spawn("ops listener", &stop_ops, operators);

    let (mut connections, route) = tokio::select! {
        connected = connect(&config.database) => connected?,
        () = stop.cancelled() => return Ok(()),
    };
    schema::require_current(&mut connections[0]).await?;
    close(connections).await;
    match route {
        Route::Direct => database.use_sessions(),
        Route::Pooled => {
            tracing::info!(
                "Postgres is behind a transaction pooler; each statement is a transaction of three round trips"
            );
        }
    }

    metrics.database_connections_limit.set(i64::try_from(config.database_pool_size).unwrap_or(i64::MAX));
    let (limiter, counting) = Limiter::new(
        config.redis.clone(),
        config.channels.clone(),
        config.limits.patience,
        metrics.limits.clone(),
    );
    let (tracer, exporter) =
        traces::start(config.traces, "messenger-api", env!("CARGO_PKG_VERSION"), metrics.traces.clone())
            .context("cannot read whom this machine trusts (SSL_CERT_FILE, ca-certificates)")?;
    let (publisher, worker) = publisher(config.redis, config.channels, tracer.clone(), metrics.clone());
    let used = LastUsed::default();
    let providers = oauth::providers(config.providers, &config.origin, config.provider_time_limit)
        .context("cannot read whom this machine trusts (SSL_CERT_FILE, ca-certificates)")?;
    let external = config.external.map(External::new).transpose();
    let external = external
        .context("cannot read whom this machine trusts (SSL_CERT_FILE, ca-certificates)")?
        .map(Arc::new);
    let sign_in = SignIn::new(
        providers,
        config.origin.clone(),
        &config.state_secrets,
        config.callback_token_in_query,
        metrics.clone(),
    );
    let origins = Arc::new(Origins::new(config.origin, config.allowed_origins));
    let context = Context::new(database.clone(), publisher, tracer.clone());
    let auth = Auth::new(config.keys, origins.clone(), config.lifetimes, used.clone(), context.clone());
    let api = Arc::new(Api {
        context,
        auth: auth.with_external(external.clone()),
        limits: http::limits::Limits::new(limiter, &config.limits),
        external: external.clone(),
        dev_login: config.dev_login,
        sign_in,
        internal_secrets: config.internal_secrets,
    });

    // Each is stopped after those that need it.
    let stop_serving = CancellationToken::new();
    let stop_publishing = CancellationToken::new();
    let stop_tracing = CancellationToken::new();

    let watching =
        readiness::watch(config.database, database.clone(), metrics.clone(), judgement, stop.clone());
    let watching = tasks.spawn("readiness watch", &stop, watching);
    let pruning = pruner::run(database.clone(), config.keep, metrics.clone(), stop.clone());
    let pruning = tasks.spawn("pruner", &stop, pruning);
    let noting = last_used::run(used, database.clone(), stop.clone());
    let noting = tasks.spawn("last use of sessions", &stop, noting);
    let following =
        external.map(|external| tasks.spawn("external keys", &stop, external.follow(stop.clone())));
    let announcing = tasks.spawn("announcements of keys", &stop, announce_keys(api.clone(), stop.clone()));
    let publishing = worker.run(tasks.clone(), stop_publishing.clone());
    let publishing = tasks.spawn("publisher", &stop_publishing, publishing);
    let counting = tasks.spawn("shared rate limits", &stop_serving, counting.run(stop_serving.clone()));
    let exporting = tasks.spawn("trace exporter", &stop_tracing, exporter.run(stop_tracing.clone()));

    let routes = Cors::new(warp::service(http::public(&api)), origins);
    let service = Edge::new(routes, config.trusted_proxies, tracer, metrics.clone());
    let counted = metrics.http.listener("public");
    let public = server::serve(listeners.public, service, limits.clone(), counted, stop_serving.clone());
    let public = tasks.spawn("public listener", &stop_serving, public);
    // Gateways ask without a proxy between, and their questions belong to nobody's trace.
    let routes = warp::service(http::internal(&api));
    let service = Edge::new(routes, TrustedProxies::default(), Tracer::default(), metrics.clone());
    let counted = metrics.http.listener("internal");
    let internal = server::serve(listeners.internal, service, limits, counted, stop_serving.clone());
    let internal = tasks.spawn("internal listener", &stop_serving, internal);
    drop(api);
    for (name, address) in
        [("public", addresses.public), ("internal", addresses.internal), ("ops", addresses.ops)]
    {
        tracing::info!(name, %address, "listening");
    }

    tokio::select! {
        () = stop.cancelled() => {}
        // In the same order, so that what still works ends well.
        _ = tasks.failed() => stop.cancel(),
    }
    tokio::time::sleep(config.shutdown_wait).await;
    tracing::info!("no new connections");
    stop_serving.cancel();
    for serving in [public, internal, counting] {
        serving.await?;
    }
    stop_publishing.cancel();
    if timeout(FLUSH_TIMEOUT, publishing).await.is_err() {
        tracing::warn!("Redis did not take the last events in time");
    }
    stop_tracing.cancel();
    // A collector that takes no more costs the last spans.
    let _ = timeout(traces::LAST_SPANS, exporting).await;
    for task in [pruning, noting, announcing, watching].into_iter().chain(following) {
        task.await?;
    }
    stop_ops.cancel();
    operators.await?;
    database.close().await;
    if let Some(failure) = tasks.failure() {
        return Err(failure.into());
    }
    tracing::info!("stopped");
    Ok(())
}

/// Tells gateways again and again which keys are good here, so that they learn of a removed one within seconds, even if an
/// announcement was lost or they had not been there.
async fn announce_keys(api: Arc<Api>, stop: CancellationToken) {
    while !stop.is_cancelled() {
        api.context.publisher.publish_keys(&api.auth.keys_version());
        let wait = ANNOUNCE_KEYS_EVERY.mul_f64(rand::random_range(0.8..1.2));
        stop.run_until_cancelled(tokio::time::sleep(wait)).await;
    }
}

/// Waits for Postgres for a while: at a common start it may come up later than we.
async fn connect(postgres: &PgConnectOptions) -> anyhow::Result<([PgConnection; 2], Route)> {
    let patient = async {
        loop {
            match timeout(CONNECT_TIMEOUT, session::connect(postgres)).await {
                Ok(Ok(connected)) => return Ok(connected),
                Ok(Err(Unfit::Store(error))) if store::is_passing(&error) => {
                    tracing::warn!(%error, "Postgres cannot be reached yet");
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => tracing::warn!("Postgres does not answer yet"),
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    match timeout(START_TIMEOUT, patient).await {
        Ok(result) => result.context("cannot use Postgres"),
        Err(_) => anyhow::bail!("Postgres could not be reached for {} seconds", START_TIMEOUT.as_secs()),
    }
}

/// Says goodbye to Postgres; a connection that cannot be closed so is dropped.
async fn close(connections: [PgConnection; 2]) {
    for connection in connections {
        let _ = connection.close().await;
    }
}
