//! Every setting of api, declared where it is read, typed and checked together. Imports no module that it
//! configures, except for their types of settings.

mod providers;

use std::{fs, net::SocketAddr, time::Duration};

use clap::{Args, Parser, Subcommand};
use protocol::{channels::Channels, claims::SigningKeys, external::ExternalIssuer};
use service_kit::{
    client_address::TrustedProxies,
    config::{self, Common, Origin},
    healthcheck::Probe,
    limiter::{self, Limit},
    redis_topology::RedisTopology,
    secrets::Secrets,
    settings::{Given, Problems, Required, Setting, Settings, text},
    telemetry::Logging,
    traces,
};
use sqlx::postgres::PgConnectOptions;

pub use self::providers::{ClientRegistration, ProviderSettings, protected_url};

/// Time for publishing the queue when the service stops.
pub const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for requests of operators in progress, at the very end of a shutdown.
pub const OPS_STOP: Duration = Duration::from_secs(1);
/// The rest of a shutdown after the last request: a second each for the last spans, [`OPS_STOP`] and the database's connections.
const MARGIN: Duration = Duration::from_secs(3);
/// Limits one request to a login provider.
const PROVIDER_TIME_LIMIT: Duration = Duration::from_secs(10);

const DAY: u64 = 24 * 60 * 60;
/// The longest lifetime of a token (docs/api.md).
const LONGEST_TOKEN: u64 = 14 * DAY;

/// The REST API of the messenger: owns Postgres, publishes to Redis.
///
/// Every setting is a flag and an environment variable of the same name.
#[derive(Debug, Parser)]
#[command(name = "api", version, about, long_about)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Serve requests (the default)
    Serve,
    /// Apply missing migrations to the schema, and exit
    Migrate,
    /// Give every feed a new epoch, and exit: after the database was restored to an earlier point
    NewEpoch,
    /// Delete old events, ended sessions and unused login codes immediately, and exit
    Prune,
    /// Validate the configuration, report every problem, and exit
    CheckConfig,
    /// Create, list and revoke the tokens of other back ends, and exit
    #[command(subcommand)]
    ServiceToken(ServiceTokenCommand),
    /// Query the local service's /livez or /readyz and exit
    Healthcheck { probe: Probe },
}

#[derive(Debug, Clone, Subcommand)]
pub enum ServiceTokenCommand {
    /// Create a token and print it: it is stored nowhere
    Create(NewService),
    /// List the tokens: name, scopes, when each was created and last used
    List,
    /// Revoke the token of this name, within two seconds
    Revoke { name: String },
}

#[derive(Debug, Clone, Args)]
pub struct NewService {
    #[arg(long)]
    pub name: String,
    /// What its bearer may do
    #[arg(long = "scope", value_delimiter = ',', value_parser = ["publish", "users", "admin"], required = true)]
    pub scopes: Vec<String>,
}

#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    pub public: SocketAddr,
    pub internal: SocketAddr,
    pub ops: SocketAddr,
}

#[expect(clippy::struct_excessive_bools, reason = "each is a setting of its own")]
pub struct Config {
    pub origin: Origin,
    pub allowed_origins: Vec<Origin>,
    pub trusted_proxies: TrustedProxies,
    /// Per listener; 0: no limit.
    pub connections_per_address: usize,
    pub database: PgConnectOptions,
    pub database_pool_size: usize,
    pub redis: RedisTopology,
    pub channels: Channels,
    pub presence: bool,
    pub keys: SigningKeys,
    pub internal_secrets: Secrets,
    pub state_secrets: Secrets,
    pub dev_login: bool,
    pub usernames_change: bool,
    pub providers: Vec<ProviderSettings>,
    pub provider_time_limit: Duration,
    pub callback_token_in_query: bool,
    /// Whose subjects other back ends name, also if its tokens are not accepted.
    pub external_issuer: Option<String>,
    pub external: Option<ExternalSettings>,
    pub lifetimes: Lifetimes,
    /// Code points.
    pub longest_message: usize,
    pub largest_group: usize,
    pub keep: Keep,
    pub limits: RateLimits,
    pub shutdown_wait: Duration,
    pub shutdown_grace: Duration,
    pub traces: Option<traces::TraceSettings>,
}

#[derive(Debug, Clone, Copy)]
pub struct Lifetimes {
    /// From the last refresh of a session; the maximum for an `api` token.
    pub session: Duration,
    pub stream_token: Duration,
}

/// A gateway reads 32 MiB of an answer at most, and a thousand ranges have at least one event each, in which a control character is
/// written as six bytes.
pub const LONGEST_MESSAGE: u64 = 5_000;
/// The names of all fit into the request that makes the group, and a message's events into the queue for Redis several times.
pub const LARGEST_GROUP: u64 = 2_000;

/// Bounds of what is stored: the events of each feed by age and number, idempotency keys and messages by age.
#[derive(Debug, Clone, Copy)]
pub struct Keep {
    pub age: Duration,
    pub events: u64,
    pub idempotency_keys: Duration,
    /// Texts of messages; `None`: permanently.
    pub messages: Option<Duration>,
    /// A message can be edited for this long, so an event about it may be younger by as much.
    pub edit_window: Duration,
}

#[derive(Debug, Clone)]
pub struct ExternalSettings {
    pub issuer: ExternalIssuer,
    pub jwks_url: String,
}

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
    pub typing_per_user: Limit,
    pub typing_per_address: Limit,
    pub change_per_user: Limit,
    pub change_per_address: Limit,
    pub requests_per_service: Limit,
    /// The longest wait for an answer of Redis.
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
        typing_per_user: Limit::Off,
        typing_per_address: Limit::Off,
        change_per_user: Limit::Off,
        change_per_address: Limit::Off,
        requests_per_service: Limit::Off,
        patience: limiter::SHARED_CHECK_TIMEOUT,
    };
}

pub fn rows() -> Vec<Setting> {
    Settings::rows(read)
}

pub fn for_serving(given: &Given) -> Result<(Config, Addresses, Logging), Problems> {
    read(&mut Settings::new(given))
}

pub fn for_database(given: &Given) -> Result<(PgConnectOptions, Logging), Problems> {
    let mut s = Settings::new(given);
    let (database, logging) = (database(&mut s), config::logging(&mut s));
    s.finish(|| Some((database?, logging)))
}

pub fn for_pruning(given: &Given) -> Result<(PgConnectOptions, Keep, Logging), Problems> {
    let mut s = Settings::new(given);
    let (database, keep, logging) = (database(&mut s), keep(&mut s), config::logging(&mut s));
    s.finish(|| Some((database?, keep, logging)))
}

pub fn for_healthcheck(given: &Given) -> Result<SocketAddr, Problems> {
    let mut s = Settings::new(given);
    let address = config::ops_listen(&mut s, OPS_LISTEN);
    s.finish(|| Some(address))
}

const OPS_LISTEN: &str = "127.0.0.1:8082";

fn read(s: &mut Settings) -> Result<(Config, Addresses, Logging), Problems> {
    let common = Common::read(s, "127.0.0.1:8080", OPS_LISTEN, "http://localhost:8080");
    let internal = s.parse(
        "INTERNAL_LISTEN",
        "127.0.0.1:8081",
        "Address for requests of gateways. Never route it from outside",
    );
    let database = database(s);
    let database_pool_size =
        s.number("DATABASE_POOL_SIZE", "16", 1..=1_000, "Maximum number of connections to Postgres");
    let keys = keys(s, &common.origin);
    let dev_login = s.flag(
        "DEV_LOGIN",
        "false",
        "Allows login as any user by name, without proof. For development: rejected unless ORIGIN is a loopback host",
    );
    if dev_login && !common.origin.is_loopback() {
        s.problem(
            &["DEV_LOGIN", "ORIGIN"],
            "DEV_LOGIN allows login as any user, and ORIGIN is not a loopback host; unset it",
        );
    }
    let presence = config::presence(s);
    let usernames_change =
        s.flag("USERNAMES_CHANGE", "false", "Lets users change their username with PATCH /api/auth_user");
    let providers = providers::read(s);
    let state_secrets = s.secret(
        "STATE_SECRET",
        "",
        "Signs what a browser carries through a login with a provider; required with one, the same on every replica, and not \
         INTERNAL_SECRET. At least 32 characters; or several, comma-separated: the first signs, all are accepted",
        |list| if list.is_empty() { Ok(None) } else { Secrets::parse(list).map(Some) },
    );
    if let Some(None) = state_secrets
        && !providers.is_empty()
    {
        s.require("STATE_SECRET", "");
    }
    let callback_token_in_query = s.flag(
        "CALLBACK_TOKEN_IN_QUERY",
        "false",
        "After a login with a provider, puts the token itself into the URL, as pages of the original client expect it, and not a \
         code for one use. The token then stays in the browser's history and in the logs of proxies",
    );
    let (external_issuer, external) = external(s, &common.origin);
    let lifetimes = Lifetimes {
        session: s.seconds(
            "TOKEN_LIFETIME_SECONDS",
            "1209600",
            60..=LONGEST_TOKEN,
            "Lifetime of a session since its last refresh, and the maximum lifetime of a token",
        ),
        stream_token: s.seconds(
            "STREAM_TOKEN_LIFETIME_SECONDS",
            "300",
            10..=3_600,
            "Time for which a stream token opens streams; an open stream may last as long as its session",
        ),
    };
    let longest_message =
        s.number("MAX_MESSAGE_LENGTH", "4000", 1..=LONGEST_MESSAGE, "Code points of the longest message");
    let largest_group = s.number(
        "MAX_GROUP_SIZE",
        "1000",
        2..=LARGEST_GROUP,
        "Members of the largest group. Each message is an event for each of them, in one transaction",
    );
    let keep = keep(s);
    let limits = limits(s, common.rate_limits);
    let shutdown_wait = s.seconds(
        "SHUTDOWN_WAIT_SECONDS",
        "5",
        0..=600,
        "Time after SIGTERM in which the service is unready and still serves, until clients have noticed",
    );
    let shutdown_grace = s.seconds(
        "SHUTDOWN_GRACE_SECONDS",
        "10",
        1..=600,
        "Time after that for requests in progress to finish",
    );
    let parts = [("SHUTDOWN_WAIT_SECONDS", shutdown_wait), ("SHUTDOWN_GRACE_SECONDS", shutdown_grace)];
    s.termination_grace(parts, FLUSH_TIMEOUT + MARGIN);
    let ratio = s.with(
        "OTEL_TRACES_SAMPLER_ARG",
        "0.01",
        "Share of requests that start a trace, from 0 to 1, if their client does not decide it",
        traces::settings::ratio,
    );
    s.finish(|| {
        let addresses = Addresses { public: common.listen, internal, ops: common.ops_listen };
        let config = Config {
            origin: common.origin,
            allowed_origins: common.allowed_origins,
            trusted_proxies: common.trusted_proxies,
            connections_per_address: common.connections_per_address,
            database: database?,
            database_pool_size,
            redis: common.redis?,
            channels: common.channels,
            presence,
            keys: keys?,
            internal_secrets: common.internal_secrets?,
            // Without providers nothing is signed with it.
            state_secrets: state_secrets?.unwrap_or_else(Secrets::random),
            dev_login,
            usernames_change,
            providers,
            provider_time_limit: PROVIDER_TIME_LIMIT,
            callback_token_in_query,
            external_issuer,
            external,
            lifetimes,
            longest_message,
            largest_group,
            keep,
            limits,
            shutdown_wait,
            shutdown_grace,
            traces: common.traces.map(|traces| traces.sampling(ratio)),
        };
        Some((config, addresses, common.logging))
    })
}

fn keep(s: &mut Settings) -> Keep {
    let days: u64 = s.number(
        "FEED_KEEP_DAYS",
        "30",
        1..=3_650,
        "Older events may be deleted; a client that was away for longer reloads",
    );
    let events = s.number(
        "FEED_KEEP_EVENTS",
        "10000",
        1..=1_000_000_000,
        "Number of the newest events kept per user; older ones may be deleted",
    );
    let key_days: u64 = s.number(
        "IDEMPOTENCY_KEEP_DAYS",
        "30",
        1..=3_650,
        "A repeated send is recognised by its Idempotency-Key for this long",
    );
    let message_days: u64 = s.number(
        "MESSAGE_KEEP_DAYS",
        "0",
        0..=36_500,
        "The texts of older messages are deleted, in small steps; 0: texts are kept until somebody deletes them",
    );
    let edit_window = s.seconds(
        "EDIT_WINDOW_SECONDS",
        "86400",
        0..=3_650 * DAY,
        "Time after sending in which users may change the text of a message",
    );
    let [age, idempotency_keys, messages] =
        [days, key_days, message_days].map(|days| Duration::from_secs(days * DAY));
    let messages = Some(messages).filter(|age| !age.is_zero());
    Keep { age, events, idempotency_keys, messages, edit_window }
}

fn limits(s: &mut Settings, on: bool) -> RateLimits {
    let mut limit = |name, default: &'static str, help| {
        let limit = s.parse(name, default, help);
        if on { limit } else { Limit::Off }
    };
    RateLimits {
        login_per_address: limit(
            "LIMIT_LOGIN_PER_ADDRESS",
            "120/60",
            "Logins per client address, as burst/seconds: 120/60 allows a burst of 120, refilled over 60 seconds; or off. Every \
             request of an OAuth login counts. All replicas count together, in Redis. The same form for all limits",
        ),
        login_per_name: limit("LIMIT_LOGIN_PER_NAME", "30/60", "Logins per username"),
        search_per_user: limit("LIMIT_SEARCH_PER_USER", "120/60", "Searches for usernames, per user"),
        search_per_address: limit(
            "LIMIT_SEARCH_PER_ADDRESS",
            "1200/60",
            "Searches for usernames, per client address",
        ),
        start_per_user: limit("LIMIT_START_PER_USER", "60/600", "Conversations started, per user"),
        start_per_address: limit(
            "LIMIT_START_PER_ADDRESS",
            "600/600",
            "Conversations started, per client address",
        ),
        send_per_user: limit("LIMIT_SEND_PER_USER", "120/60", "Messages sent, per user"),
        send_per_address: limit("LIMIT_SEND_PER_ADDRESS", "1200/60", "Messages sent, per client address"),
        typing_per_user: limit("LIMIT_TYPING_PER_USER", "120/60", "Calls that tell of typing, per user"),
        typing_per_address: limit("LIMIT_TYPING_PER_ADDRESS", "1200/60", "The same, per client address"),
        change_per_user: limit(
            "LIMIT_CHANGE_PER_USER",
            "300/60",
            "All other changes (deletions, read marks, blocks, groups and their members, profiles), per user",
        ),
        change_per_address: limit("LIMIT_CHANGE_PER_ADDRESS", "3000/60", "The same, per client address"),
        requests_per_service: limit(
            "LIMIT_REQUESTS_PER_SERVICE",
            "12000/60",
            "Requests of other back ends, per service token; one may publish to 1,000 receivers",
        ),
        patience: limiter::SHARED_CHECK_TIMEOUT,
    }
}

fn database(s: &mut Settings) -> Option<PgConnectOptions> {
    s.secret(
        "DATABASE_URL",
        Required("postgres://messenger:password@127.0.0.1:5432/messenger"),
        "Postgres: postgres://user:password@host:port/database. Over a network add ?sslmode=verify-full for TLS with a certificate \
         that the system trusts, or also &sslrootcert=/path/ca.pem for one of your own authority",
        |url| {
            // The parser ignores the scheme, and its error can repeat a part of the URL, and with it the password.
            let ours = ["postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme));
            let options: Option<PgConnectOptions> = url.parse().ok().filter(|_| ours);
            options.map(connection).ok_or("it must have the form postgres://user:password@host:port/database")
        },
    )
}

/// Names the application. The startup message has nothing that a pooler might reject.
pub fn connection(url: PgConnectOptions) -> PgConnectOptions {
    url.application_name("api").extra_float_digits(None)
}

fn external(s: &mut Settings, origin: &Origin) -> (Option<String>, Option<ExternalSettings>) {
    let issuer = s.with(
        "EXTERNAL_ISSUER",
        "",
        "Also accept tokens of this issuer (its iss, exactly), and create its users at first use: for a product with its own login. \
         Alone, it accepts none: other back ends can name its subjects",
        text,
    );
    let audience = s.with("EXTERNAL_AUDIENCE", "", "Audience (aud) that its tokens must have", text);
    let jwks_url = s.with("EXTERNAL_JWKS_URL", "", "URL of its public keys (JWKS)", |url| {
        // A server that controls this response can issue tokens for every user.
        if url.is_empty() { Ok(String::new()) } else { protected_url(url).map(String::from) }
    });
    let algorithm = s.parse(
        "EXTERNAL_ALGORITHM",
        "RS256",
        "Algorithm of its signatures: RS256, PS256, ES256, EdDSA or a longer one of these. No other is accepted",
    );
    if issuer == origin.as_str() {
        s.problem(
            &["EXTERNAL_ISSUER", "ORIGIN"],
            "EXTERNAL_ISSUER is ORIGIN; api's own tokens need no setting",
        );
    }
    if [&audience, &jwks_url].iter().all(|value| value.is_empty()) {
        return (Some(issuer).filter(|issuer| !issuer.is_empty()), None);
    }
    s.require("EXTERNAL_ISSUER", &issuer);
    s.require("EXTERNAL_AUDIENCE", &audience);
    s.require("EXTERNAL_JWKS_URL", &jwks_url);
    let name = Some(issuer.clone());
    (name, Some(ExternalSettings { issuer: ExternalIssuer { issuer, audience, algorithm }, jwks_url }))
}

fn keys(s: &mut Settings, origin: &Origin) -> Option<SigningKeys> {
    let name = "SIGNING_KEY_FILES";
    let files = s.with(
        name,
        Required("signing-key.pem"),
        "Files of Ed25519 private keys (PKCS#8 PEM), comma-separated: the first signs tokens, all are accepted and published. To \
         create one: openssl genpkey -algorithm ed25519 -out signing-key.pem",
        text,
    );
    let read = |file: &str| fs::read(file).map_err(|error| format!("{file}: {error}"));
    let pems: Result<Vec<_>, _> = files.split(',').map(|file| read(file.trim())).collect();
    let keys = pems.and_then(|pems| {
        let (first, others) = pems.split_first().ok_or("no file is named")?;
        SigningKeys::from_pems(origin.as_str(), first, others).map_err(|error| error.to_string())
    });
    keys.map_err(|error| s.problem(&[name], format!("{name} is invalid: {error}"))).ok()
}
