//! Every setting, typed, read once, checked together.

use std::{fs, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, Parser, Subcommand};
use protocol::{channels::Channels, claims::SigningKeys, external::ExternalIssuer};
use service_kit::{
    client_address::TrustedProxies,
    config::{Origin, Problems},
    healthcheck::Probe,
    limiter::{self, Limit},
    redis_topology::RedisTopology,
    secrets::Secrets,
    telemetry::LogFormat,
    traces,
};
use sqlx::postgres::PgConnectOptions;
use tracing_subscriber::EnvFilter;

use crate::{
    app::FLUSH_TIMEOUT,
    external::ExternalSettings,
    http::auth::Lifetimes,
    oauth::{self, ProviderSettings},
    store::{feed::Keep, session},
};

/// The REST API of the messenger: owns Postgres, tells Redis.
///
/// Every setting is a flag and an environment variable of the same name.
#[derive(Debug, Parser)]
#[command(version, about, long_about)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub settings: Settings,
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub enum Command {
    /// Answer requests (this is also what happens without a command)
    Serve,
    /// Apply what is missing of the schema, then end
    Migrate,
    /// After a database was restored to an earlier point: make clients' places from the lost future recognisable
    NewEpoch,
    /// Delete at once what a server deletes little by little: old events, sessions that ended, codes nobody fetched
    Prune,
    /// Check the settings, and the database if it can be reached; report every problem, and exit
    CheckConfig,
    /// Ask the service that runs here, at `OPS_LISTEN`: does it answer (livez), may it get traffic (readyz)? Then end
    Healthcheck { probe: Probe },
}

/// As given: texts, so that all of them can be checked before anything is said.
#[derive(Debug, Clone, Args)]
pub struct Settings {
    /// Where clients come in, through the ingress
    #[arg(long, env, global = true, default_value = "127.0.0.1:8080", value_name = "ADDRESS")]
    pub listen: String,
    /// Where gateways ask; never routed from outside
    #[arg(long, env, global = true, default_value = "127.0.0.1:8081", value_name = "ADDRESS")]
    pub internal_listen: String,
    /// Where operators look: /livez, /readyz, /metrics; never routed from outside
    #[arg(long, env, global = true, default_value = "127.0.0.1:8082", value_name = "ADDRESS")]
    pub ops_listen: String,
    /// Where browsers find the product: `https://host`, no path. Issuer of tokens; cookies are for https only if it is
    #[arg(long, env, global = true, default_value = "http://localhost:8080", value_name = "ORIGIN")]
    pub origin: String,
    /// Other origins whose pages may use the API with the session cookie and read its answers, comma-separated
    #[arg(long, env, global = true, default_value = "", value_name = "ORIGINS")]
    pub allowed_origins: String,
    /// Networks of our own proxies, comma-separated: what they say in X-Forwarded-For is believed. None: the peer is the client
    #[arg(long, env, global = true, default_value = "", value_name = "NETWORKS")]
    pub trusted_proxies: String,
    /// Connections of one client address (IPv6: of one /64) at each listener, and never more than half of a listener's; more are
    /// closed. Addresses in `TRUSTED_PROXIES` have no such bound. 0: nobody has
    #[arg(long, env, global = true, default_value = "512", value_name = "NUMBER")]
    pub connections_per_address: String,
    /// Postgres, as `postgres://user:password@host:port/database`
    #[arg(long, env, global = true, hide_env_values = true, value_name = "URL")]
    pub database_url: Option<String>,
    /// The same, in a file; set one of the two
    #[arg(long, env, global = true, default_value = "", value_name = "FILE")]
    pub database_url_file: String,
    /// Connections to Postgres, at most
    #[arg(long, env, global = true, default_value = "16", value_name = "NUMBER")]
    pub database_pool_size: String,
    /// Redis, as `redis://user:password@host:port`, or `rediss://` for TLS. Of a cluster some nodes, comma-separated; with
    /// sentinels the name that they have for it in place of the host
    #[arg(long, env, global = true, hide_env_values = true, value_name = "URLS")]
    pub redis_url: Option<String>,
    /// The same, in a file; set one of the two
    #[arg(long, env, global = true, default_value = "", value_name = "FILE")]
    pub redis_url_file: String,
    /// single: one server, wherever its name points. sentinel: the one that sentinels name. cluster: Redis Cluster, by sharded
    /// channels. The same for gateways
    #[arg(long, env, global = true, default_value = "single", value_name = "NAME")]
    pub redis_topology: String,
    /// Where sentinels are, as URLs, comma-separated, each with a user and password of its own if it wants any
    #[arg(long, env, global = true, hide_env_values = true, default_value = "", value_name = "URLS")]
    pub redis_sentinels: String,
    /// The same, in a file; set one of the two
    #[arg(long, env, global = true, default_value = "", value_name = "FILE")]
    pub redis_sentinels_file: String,
    /// In front of every Redis channel; the same for gateways
    #[arg(long, env, global = true, default_value = "", value_name = "TEXT")]
    pub channel_prefix: String,
    /// Ed25519 private keys (PKCS#8 PEM), comma-separated: the first signs tokens, all are accepted and published
    #[arg(long, env, global = true, value_name = "FILES")]
    pub signing_key_files: Option<String>,
    /// Shared with gateways, at least 32 characters; or several, comma-separated, all accepted: that is how it is rotated
    #[arg(long, env, global = true, hide_env_values = true, value_name = "TEXT")]
    pub internal_secret: Option<String>,
    /// The same, in a file; set one of the two
    #[arg(long, env, global = true, default_value = "", value_name = "FILE")]
    pub internal_secret_file: String,
    /// Signs what a browser carries through a login at a provider; needed where one is configured, the same at every replica,
    /// at least 32 characters. Or several, comma-separated: the first signs, all are accepted
    #[arg(long, env, global = true, hide_env_values = true, default_value = "", value_name = "TEXTS")]
    pub state_secret: String,
    /// The same, in a file; set one of the two
    #[arg(long, env, global = true, default_value = "", value_name = "FILE")]
    pub state_secret_file: String,
    /// Let anybody log in as anybody by name: for development, refused unless ORIGIN is a loopback host
    #[arg(long, env, global = true, default_value = "false", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub dev_login: String,
    /// The id of an OAuth app at GitHub, whose callback is `{ORIGIN}/api/oauth/github/callback`; lets people log in by GitHub
    #[arg(long, env, global = true, default_value = "", value_name = "TEXT")]
    pub github_client_id: String,
    /// Its secret
    #[arg(long, env, global = true, hide_env_values = true, default_value = "", value_name = "TEXT")]
    pub github_client_secret: String,
    /// The same, in a file; set one of the two
    #[arg(long, env, global = true, default_value = "", value_name = "FILE")]
    pub github_client_secret_file: String,
    /// Another GitHub: `https://host` of GitHub Enterprise
    #[arg(long, env, global = true, default_value = "https://github.com", value_name = "URL")]
    pub github_url: String,
    /// Where that one has its API: `https://host/api/v3`
    #[arg(long, env, global = true, default_value = "https://api.github.com", value_name = "URL")]
    pub github_api_url: String,
    /// An `OpenID` Connect provider, exactly as it calls itself; lets people log in by it
    #[arg(long, env, global = true, default_value = "", value_name = "URL")]
    pub oidc_issuer: String,
    /// What we are registered as there, with the callback `{ORIGIN}/api/oauth/oidc/callback`
    #[arg(long, env, global = true, default_value = "", value_name = "TEXT")]
    pub oidc_client_id: String,
    /// The secret of that
    #[arg(long, env, global = true, hide_env_values = true, default_value = "", value_name = "TEXT")]
    pub oidc_client_secret: String,
    /// The same, in a file; set one of the two
    #[arg(long, env, global = true, default_value = "", value_name = "FILE")]
    pub oidc_client_secret_file: String,
    /// After a login at a provider, put the token itself into the URL, as a page of the original client expects it. It then
    /// stays in the browser's history and in the logs of whatever is in front; without this it is a code for one use
    #[arg(long, env, global = true, default_value = "false", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub callback_token_in_query: String,
    /// Accept tokens of this issuer too (its `iss`, exactly), and make its users at first use: for a product with a login
    /// of its own
    #[arg(long, env, global = true, default_value = "", value_name = "URL")]
    pub external_issuer: String,
    /// Whom its tokens must be for: their `aud`
    #[arg(long, env, global = true, default_value = "", value_name = "TEXT")]
    pub external_audience: String,
    /// Where its public keys are (JWKS)
    #[arg(long, env, global = true, default_value = "", value_name = "URL")]
    pub external_jwks_url: String,
    /// How it signs: RS256, PS256, ES256, `EdDSA` or a longer one of these. Nothing else is accepted
    #[arg(long, env, global = true, default_value = "RS256", value_name = "NAME")]
    pub external_algorithm: String,
    /// How long a session lives from its last refresh, and the longest life of a token
    #[arg(long, env, global = true, default_value = "1209600", value_name = "SECONDS")]
    pub token_lifetime_seconds: String,
    /// How long a stream token opens streams; what it opened may last as long as the session
    #[arg(long, env, global = true, default_value = "300", value_name = "SECONDS")]
    pub stream_token_lifetime_seconds: String,
    /// Events older than this may be deleted; a client away for longer reloads
    #[arg(long, env, global = true, default_value = "30", value_name = "DAYS")]
    pub feed_keep_days: String,
    /// Of one user's events, older ones than this many may be deleted
    #[arg(long, env, global = true, default_value = "10000", value_name = "NUMBER")]
    pub feed_keep_events: String,
    /// Whether there are rate limits at all
    #[arg(long, env, global = true, default_value = "true", value_name = "BOOL")]
    pub rate_limits: String,
    /// Logins by one client address: so many at once/refilled within so many seconds. Each request of an OAuth login counts
    #[arg(long, env, global = true, default_value = "120/60", value_name = "LIMIT")]
    pub limit_login_per_address: String,
    /// Logins that try one username
    #[arg(long, env, global = true, default_value = "30/60", value_name = "LIMIT")]
    pub limit_login_per_name: String,
    /// Searches for usernames by one user
    #[arg(long, env, global = true, default_value = "120/60", value_name = "LIMIT")]
    pub limit_search_per_user: String,
    /// The same by one client address
    #[arg(long, env, global = true, default_value = "1200/60", value_name = "LIMIT")]
    pub limit_search_per_address: String,
    /// Conversations that one user starts
    #[arg(long, env, global = true, default_value = "60/600", value_name = "LIMIT")]
    pub limit_start_per_user: String,
    /// The same from one client address
    #[arg(long, env, global = true, default_value = "600/600", value_name = "LIMIT")]
    pub limit_start_per_address: String,
    /// Messages that one user sends
    #[arg(long, env, global = true, default_value = "120/60", value_name = "LIMIT")]
    pub limit_send_per_user: String,
    /// The same from one client address
    #[arg(long, env, global = true, default_value = "1200/60", value_name = "LIMIT")]
    pub limit_send_per_address: String,
    /// After SIGTERM: how long to be unready and still serve, until nobody sends new requests here
    #[arg(long, env, global = true, default_value = "5", value_name = "SECONDS")]
    pub shutdown_wait_seconds: String,
    /// After that: how long requests in progress may take to end
    #[arg(long, env, global = true, default_value = "10", value_name = "SECONDS")]
    pub shutdown_grace_seconds: String,
    /// From SIGTERM until the platform kills the process (terminationGracePeriodSeconds); 0: not known. An orderly end must fit
    #[arg(long, env, global = true, default_value = "0", value_name = "SECONDS")]
    pub termination_grace_seconds: String,
    /// What is logged, in the form of tracing directives: `info`, `info,api=debug`
    #[arg(long, env, global = true, default_value = "info", value_name = "DIRECTIVES")]
    pub log: String,
    /// `human` or `json`
    #[arg(long, env, global = true, default_value = "human", value_name = "FORMAT")]
    pub log_format: String,
    /// Where traces go: an OTLP/HTTP collector, `http://host:4318`; `/v1/traces` is put behind it. None: nothing is traced
    #[arg(long, env, global = true, hide_env_values = true, default_value = "", value_name = "URL")]
    pub otel_exporter_otlp_endpoint: String,
    /// What is sent to it besides: `name=value,name=value`, percent-encoded
    #[arg(long, env, global = true, hide_env_values = true, default_value = "", value_name = "HEADERS")]
    pub otel_exporter_otlp_headers: String,
    /// The same, in a file; set one of the two
    #[arg(long, env, global = true, default_value = "", value_name = "FILE")]
    pub otel_exporter_otlp_headers_file: String,
    /// Which part of the requests begin a trace, from 0 to 1, if their clients do not say whether they do
    #[arg(long, env, global = true, default_value = "0.01", value_name = "RATIO")]
    pub otel_traces_sampler_arg: String,
    /// Traces that begin in a second, at most; and as many again that clients ask for by a `traceparent`
    #[arg(long, env, global = true, default_value = "20", value_name = "NUMBER")]
    pub traces_per_second: String,
}

/// How to log.
#[derive(Debug)]
pub struct Logging {
    pub filter: EnvFilter,
    pub format: LogFormat,
}

/// Where to listen.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    pub public: SocketAddr,
    pub internal: SocketAddr,
    pub ops: SocketAddr,
}

/// What a running service needs.
pub struct Config {
    pub origin: Origin,
    pub allowed_origins: Vec<Origin>,
    pub trusted_proxies: TrustedProxies,
    /// At each listener; 0: no bound.
    pub connections_per_address: usize,
    pub database: PgConnectOptions,
    pub database_pool_size: usize,
    pub redis: RedisTopology,
    pub channels: Channels,
    pub keys: SigningKeys,
    pub internal_secrets: Secrets,
    pub state_secrets: Secrets,
    pub dev_login: bool,
    pub providers: Vec<ProviderSettings>,
    /// For one question to a provider.
    pub provider_time_limit: Duration,
    pub callback_token_in_query: bool,
    pub external: Option<ExternalSettings>,
    pub lifetimes: Lifetimes,
    pub keep: Keep,
    pub limits: RateLimits,
    pub shutdown_wait: Duration,
    pub shutdown_grace: Duration,
    pub traces: Option<traces::Settings>,
}

/// How often somebody may do what.
#[derive(Debug, Clone, Copy)]
pub struct RateLimits {
    pub login_per_address: Limit,
    pub login_per_name: Limit,
    pub search_per_user: Limit,
    pub search_per_address: Limit,
    pub start_per_user: Limit,
    pub start_per_address: Limit,
    pub send_per_user: Limit,
    pub send_per_address: Limit,
    /// How long Redis may take to answer.
    pub patience: Duration,
}

impl RateLimits {
    pub const OFF: Self = Self {
        login_per_address: Limit::Off,
        login_per_name: Limit::Off,
        search_per_user: Limit::Off,
        search_per_address: Limit::Off,
        start_per_user: Limit::Off,
        start_per_address: Limit::Off,
        send_per_user: Limit::Off,
        send_per_address: Limit::Off,
        patience: limiter::SHARED_CHECK_TIMEOUT,
    };
}

/// After the last request: what is left of an orderly end takes a moment; up to a second of it the last spans.
const MARGIN: Duration = Duration::from_secs(3);

const DAY: u64 = 24 * 60 * 60;
/// The contract's longest life of a token.
const LONGEST_TOKEN: u64 = 14 * DAY;

impl Settings {
    pub fn for_serving(&self) -> Result<(Config, Addresses, Logging), Problems> {
        let mut problems = Problems::default();
        let logging = self.logging(&mut problems);
        let public = problems.parse("LISTEN", &self.listen);
        let internal = problems.parse("INTERNAL_LISTEN", &self.internal_listen);
        let ops = problems.parse("OPS_LISTEN", &self.ops_listen);
        let origin = problems.origin("ORIGIN", &self.origin);
        let trusted_proxies = problems.parse("TRUSTED_PROXIES", &self.trusted_proxies);
        let connections_per_address = problems
            .number("CONNECTIONS_PER_ADDRESS", &self.connections_per_address, 0, 1_000_000)
            .and_then(|number| usize::try_from(number).ok());
        let allowed_origins = problems.origins("ALLOWED_ORIGINS", &self.allowed_origins);
        let database = self.database(&mut problems);
        let database_pool_size = problems
            .number("DATABASE_POOL_SIZE", &self.database_pool_size, 1, 1_000)
            .and_then(|size| usize::try_from(size).ok());
        let redis = self.redis(&mut problems);
        let keys = self.keys(&mut problems, origin.as_ref());
        let internal_secrets = problems.value_or_file(
            "INTERNAL_SECRET",
            self.internal_secret.as_deref(),
            &self.internal_secret_file,
        );
        let internal_secrets = problems.secrets("INTERNAL_SECRET", internal_secrets.as_deref());
        let dev_login = problems.parse::<bool>("DEV_LOGIN", &self.dev_login);
        if dev_login == Some(true) && origin.as_ref().is_some_and(|origin| !origin.is_loopback()) {
            problems.add("DEV_LOGIN lets anybody in as anybody, and ORIGIN is not a loopback host");
        }
        let providers = self.providers(&mut problems);
        let state_secrets =
            problems.value_or_file("STATE_SECRET", Some(&self.state_secret), &self.state_secret_file);
        let state_secrets = match state_secrets {
            // Nothing is signed by it then.
            None if providers.is_empty() => Some(Secrets::random()),
            list => problems.secrets("STATE_SECRET", list.as_deref()),
        };
        let callback_token_in_query =
            problems.parse::<bool>("CALLBACK_TOKEN_IN_QUERY", &self.callback_token_in_query);
        let external = self.external(&mut problems, origin.as_ref());
        let token_lifetime =
            problems.seconds("TOKEN_LIFETIME_SECONDS", &self.token_lifetime_seconds, 60, LONGEST_TOKEN);
        let stream_token_lifetime =
            problems.seconds("STREAM_TOKEN_LIFETIME_SECONDS", &self.stream_token_lifetime_seconds, 10, 3_600);
        let keep = self.keep(&mut problems);
        let limits = self.limits(&mut problems);
        let wait = problems.seconds("SHUTDOWN_WAIT_SECONDS", &self.shutdown_wait_seconds, 0, 600);
        let grace = problems.seconds("SHUTDOWN_GRACE_SECONDS", &self.shutdown_grace_seconds, 1, 600);
        let until_killed =
            problems.seconds("TERMINATION_GRACE_SECONDS", &self.termination_grace_seconds, 0, 7_200);
        let parts = [("SHUTDOWN_WAIT_SECONDS", wait), ("SHUTDOWN_GRACE_SECONDS", grace)];
        problems.ends_in_time(until_killed, &parts, FLUSH_TIMEOUT + MARGIN);
        let headers = problems.value_or_file(
            "OTEL_EXPORTER_OTLP_HEADERS",
            Some(&self.otel_exporter_otlp_headers),
            &self.otel_exporter_otlp_headers_file,
        );
        let texts = traces::Texts {
            endpoint: &self.otel_exporter_otlp_endpoint,
            headers: headers.as_deref().unwrap_or_default(),
            ratio: Some(&self.otel_traces_sampler_arg),
            per_second: &self.traces_per_second,
        };
        let traces = traces::Settings::read(&mut problems, &texts);
        let channels = Channels::new(self.channel_prefix.clone());
        problems.finish(|| {
            let config = Config {
                origin: origin?,
                allowed_origins,
                trusted_proxies: trusted_proxies?,
                connections_per_address: connections_per_address?,
                database: database?,
                database_pool_size: database_pool_size?,
                redis: redis?,
                channels,
                keys: keys?,
                internal_secrets: internal_secrets?,
                state_secrets: state_secrets?,
                dev_login: dev_login?,
                providers,
                provider_time_limit: oauth::TIME_LIMIT,
                callback_token_in_query: callback_token_in_query?,
                external: external?,
                lifetimes: Lifetimes { session: token_lifetime?, stream_token: stream_token_lifetime? },
                keep: keep?,
                limits: limits?,
                shutdown_wait: wait?,
                shutdown_grace: grace?,
                traces: traces?,
            };
            Some((config, Addresses { public: public?, internal: internal?, ops: ops? }, logging?))
        })
    }

    /// For the commands that only need the database.
    pub fn for_database(&self) -> Result<(PgConnectOptions, Logging), Problems> {
        let mut problems = Problems::default();
        let logging = self.logging(&mut problems);
        let database = self.database(&mut problems);
        problems.finish(|| Some((database?, logging?)))
    }

    /// For deleting what need not be kept.
    pub fn for_pruning(&self) -> Result<(PgConnectOptions, Keep, Logging), Problems> {
        let mut problems = Problems::default();
        let logging = self.logging(&mut problems);
        let database = self.database(&mut problems);
        let keep = self.keep(&mut problems);
        problems.finish(|| Some((database?, keep?, logging?)))
    }

    fn keep(&self, problems: &mut Problems) -> Option<Keep> {
        let days = problems.number("FEED_KEEP_DAYS", &self.feed_keep_days, 1, 3_650);
        let events = problems.number("FEED_KEEP_EVENTS", &self.feed_keep_events, 1, 1_000_000_000);
        Some(Keep { age: Duration::from_secs(days? * DAY), events: events? })
    }

    fn logging(&self, problems: &mut Problems) -> Option<Logging> {
        let filter = problems.parse("LOG", &self.log);
        let format = problems.parse("LOG_FORMAT", &self.log_format);
        Some(Logging { filter: filter?, format: format? })
    }

    fn limits(&self, problems: &mut Problems) -> Option<RateLimits> {
        let on = problems.parse::<bool>("RATE_LIMITS", &self.rate_limits);
        let login_per_address = problems.parse("LIMIT_LOGIN_PER_ADDRESS", &self.limit_login_per_address);
        let login_per_name = problems.parse("LIMIT_LOGIN_PER_NAME", &self.limit_login_per_name);
        let search_per_user = problems.parse("LIMIT_SEARCH_PER_USER", &self.limit_search_per_user);
        let search_per_address = problems.parse("LIMIT_SEARCH_PER_ADDRESS", &self.limit_search_per_address);
        let start_per_user = problems.parse("LIMIT_START_PER_USER", &self.limit_start_per_user);
        let start_per_address = problems.parse("LIMIT_START_PER_ADDRESS", &self.limit_start_per_address);
        let send_per_user = problems.parse("LIMIT_SEND_PER_USER", &self.limit_send_per_user);
        let send_per_address = problems.parse("LIMIT_SEND_PER_ADDRESS", &self.limit_send_per_address);
        let limits = RateLimits {
            login_per_address: login_per_address?,
            login_per_name: login_per_name?,
            search_per_user: search_per_user?,
            search_per_address: search_per_address?,
            start_per_user: start_per_user?,
            start_per_address: start_per_address?,
            send_per_user: send_per_user?,
            send_per_address: send_per_address?,
            patience: limiter::SHARED_CHECK_TIMEOUT,
        };
        Some(if on? { limits } else { RateLimits::OFF })
    }

    fn database(&self, problems: &mut Problems) -> Option<PgConnectOptions> {
        let given =
            problems.value_or_file("DATABASE_URL", self.database_url.as_deref(), &self.database_url_file);
        let url = problems.require("DATABASE_URL", given.as_deref())?;
        // The parser looks at no scheme, and its message can repeat a part of the URL, and with it the password.
        let ours = ["postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme));
        let options = PgConnectOptions::from_str(url).ok().filter(|_| ours);
        if options.is_none() {
            problems.add(
                "DATABASE_URL cannot be read: it has the form postgres://user:password@host:port/database",
            );
        }
        options.map(session::options)
    }

    fn redis(&self, problems: &mut Problems) -> Option<RedisTopology> {
        let url = problems.value_or_file("REDIS_URL", self.redis_url.as_deref(), &self.redis_url_file);
        let sentinels = problems.value_or_file(
            "REDIS_SENTINELS",
            Some(&self.redis_sentinels),
            &self.redis_sentinels_file,
        );
        RedisTopology::from_settings(
            problems,
            &self.redis_topology,
            url.as_deref(),
            sentinels.as_deref().unwrap_or_default(),
        )
    }

    fn providers(&self, problems: &mut Problems) -> Vec<ProviderSettings> {
        let [github_secret, oidc_secret] = [
            ("GITHUB_CLIENT_SECRET", &self.github_client_secret, &self.github_client_secret_file),
            ("OIDC_CLIENT_SECRET", &self.oidc_client_secret, &self.oidc_client_secret_file),
        ]
        .map(|(name, value, file)| problems.value_or_file(name, Some(value), file).unwrap_or_default());
        let github = ProviderSettings::github(
            problems,
            &self.github_url,
            &self.github_api_url,
            &self.github_client_id,
            &github_secret,
        );
        let oidc = ProviderSettings::oidc(problems, &self.oidc_issuer, &self.oidc_client_id, &oidc_secret);
        github.into_iter().chain(oidc).collect()
    }

    /// `Some(None)`: no other issuer is trusted.
    fn external(&self, problems: &mut Problems, origin: Option<&Origin>) -> Option<Option<ExternalSettings>> {
        let given = [
            ("EXTERNAL_ISSUER", &self.external_issuer),
            ("EXTERNAL_AUDIENCE", &self.external_audience),
            ("EXTERNAL_JWKS_URL", &self.external_jwks_url),
        ];
        let algorithm = problems.parse("EXTERNAL_ALGORITHM", &self.external_algorithm);
        if given.iter().all(|(_, value)| value.is_empty()) {
            return algorithm.map(|_| None);
        }
        let [issuer, audience, jwks_url] =
            given.map(|(name, value)| problems.require(name, Some(value)).map(str::to_owned));
        if origin.is_some_and(|origin| issuer.as_deref() == Some(origin.as_str())) {
            problems.add("EXTERNAL_ISSUER is ORIGIN: our own tokens need no setting");
        }
        // Whoever can change what is answered there can be anybody here.
        let jwks_url = jwks_url.and_then(|url| {
            let unusable = |error| problems.add(format!("EXTERNAL_JWKS_URL cannot be used: {error}"));
            oauth::protected_url(&url).map_err(unusable).ok()
        });
        let issuer = ExternalIssuer { issuer: issuer?, audience: audience?, algorithm: algorithm? };
        Some(Some(ExternalSettings { issuer, jwks_url: jwks_url?.into() }))
    }

    fn keys(&self, problems: &mut Problems, origin: Option<&Origin>) -> Option<SigningKeys> {
        let files = problems.require("SIGNING_KEY_FILES", self.signing_key_files.as_deref())?.to_owned();
        let mut pems = Vec::new();
        for file in files.split(',').map(|file| PathBuf::from(file.trim())) {
            match fs::read(&file) {
                Ok(pem) => pems.push(pem),
                Err(error) => problems.add(format!("SIGNING_KEY_FILES: {}: {error}", file.display())),
            }
        }
        let (first, others) = pems.split_first()?;
        // Without an origin nothing is signed, but the keys are looked at.
        let issuer = origin.map_or("", Origin::as_str);
        SigningKeys::from_pems(issuer, first, others)
            .map_err(|error| problems.add(format!("SIGNING_KEY_FILES: {error}")))
            .ok()
    }
}
