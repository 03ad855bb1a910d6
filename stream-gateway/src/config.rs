//! Every setting of the gateway: an environment variable, or the flag of the same name. Typed, checked together.

use std::{net::SocketAddr, time::Duration};

use clap::{Args, Parser, Subcommand};
use protocol::channels::Channels;
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
use tracing_subscriber::EnvFilter;

use crate::{app::LAST_GOODBYES, descriptors, engine};

/// Between the end of draining and of the process: what is written, closed and joined then takes a moment.
const MARGIN: Duration = Duration::from_secs(5);

/// Holds the Server-Sent Events streams of browsers: GET /api/messages.
#[derive(Debug, Parser)]
#[command(name = "stream-gateway", version)]
#[command(next_line_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub settings: Settings,
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub enum Command {
    /// Hold streams (this is also what happens without a command)
    Serve,
    /// Say every problem with the settings, or that there is none, then end
    CheckConfig,
    /// Ask the service that runs here, at `OPS_LISTEN`: does it answer (livez), may it get traffic (readyz)? Then end
    Healthcheck { probe: Probe },
}

/// As given: texts, so that all of them can be checked before anything is said.
#[derive(Debug, Clone, Args)]
pub struct Settings {
    /// Where browsers (through the ingress) connect
    #[arg(long, env, global = true, hide_env_values = true, default_value = "127.0.0.1:8090")]
    listen: String,
    /// The operators' listener: /livez, /readyz, /metrics. Never routed from outside
    #[arg(long, env, global = true, hide_env_values = true, default_value = "127.0.0.1:8092")]
    pub ops_listen: String,
    /// Where browsers find the product: <scheme://host>[:port]. Also the issuer of tokens; the same as api's
    #[arg(long, env, global = true, hide_env_values = true)]
    origin: Option<String>,
    /// Other origins whose pages may open streams with the session cookie, separated by commas. The same as api's
    #[arg(long, env, global = true, hide_env_values = true, default_value = "")]
    allowed_origins: String,
    /// Networks of our own proxies, separated by commas: what they say in X-Forwarded-For is believed. None: the peer is the client
    #[arg(long, env, global = true, hide_env_values = true, default_value = "")]
    trusted_proxies: String,
    /// Connections of one client address (IPv6: of one /64) at each listener, streams not counted, and never more than half of a
    /// listener's; more are closed. Addresses in `TRUSTED_PROXIES` have no such bound. 0: nobody has
    #[arg(long, env, global = true, hide_env_values = true, default_value = "512")]
    connections_per_address: String,
    /// api's internal listener: http://host:port
    #[arg(long, env, global = true, hide_env_values = true)]
    api_internal_url: Option<String>,
    /// The secret that api's internal listener asks for, at least 32 characters; or several, comma-separated: the first is
    /// sent, and the others if api refuses it. The same as api's
    #[arg(long, env, global = true, hide_env_values = true)]
    internal_secret: Option<String>,
    /// The same, in a file; set one of the two
    #[arg(long, env, global = true, hide_env_values = true, default_value = "")]
    internal_secret_file: String,
    /// redis://[user:password@]host:port, or rediss:// for TLS. Of a cluster some nodes, comma-separated; with sentinels the name
    /// that they have for it in place of the host
    #[arg(long, env, global = true, hide_env_values = true)]
    redis_url: Option<String>,
    /// The same, in a file; set one of the two
    #[arg(long, env, global = true, hide_env_values = true, default_value = "")]
    redis_url_file: String,
    /// single: one server, wherever its name points. sentinel: the one that sentinels name. cluster: Redis Cluster, by sharded
    /// channels. The same as api's
    #[arg(long, env, global = true, default_value = "single")]
    redis_topology: String,
    /// Where sentinels are, as URLs, comma-separated, each with a user and password of its own if it wants any
    #[arg(long, env, global = true, hide_env_values = true, default_value = "")]
    redis_sentinels: String,
    /// The same, in a file; set one of the two
    #[arg(long, env, global = true, hide_env_values = true, default_value = "")]
    redis_sentinels_file: String,
    /// Before every Redis channel name. The same as api's
    #[arg(long, env, global = true, hide_env_values = true, default_value = "")]
    channel_prefix: String,
    /// Log filter: info, debug, `info,stream_gateway=debug`
    #[arg(long, env, global = true, hide_env_values = true, default_value = "info")]
    log: String,
    /// human or json
    #[arg(long, env, global = true, hide_env_values = true, default_value = "human")]
    log_format: String,
    /// Seconds between the heartbeats of a stream that asks for no other, ± 10 %. Below every proxy's idle limit on the way
    #[arg(long, env, global = true, hide_env_values = true, default_value = "15")]
    heartbeat_seconds: String,
    /// The shortest idle limit, in seconds, among the proxies on the way to browsers: heartbeats must come within it
    #[arg(long, env, global = true, hide_env_values = true, default_value = "60")]
    proxy_idle_seconds: String,
    /// Seconds between reconciles (whose feed is beyond what this process has?) while Redis is well
    #[arg(long, env, global = true, hide_env_values = true, default_value = "15")]
    reconcile_seconds: String,
    /// Milliseconds between reconciles while Redis is away or in doubt: how late events are then
    #[arg(long, env, global = true, hide_env_values = true, default_value = "1000")]
    suspect_reconcile_millis: String,
    /// Seconds without progress after which a reader that takes nothing is cut
    #[arg(long, env, global = true, hide_env_values = true, default_value = "60")]
    write_deadline_seconds: String,
    /// Seconds after which a stream is asked to reconnect, at random between half of it and all of it
    #[arg(long, env, global = true, hide_env_values = true, default_value = "14400")]
    max_stream_age_seconds: String,
    /// Streams of this process; more are told to come back later. Needs as many open files and 3,612 more
    #[arg(long, env, global = true, hide_env_values = true, default_value = "15000")]
    max_streams: String,
    /// Streams of one user on this process; the oldest is replaced by one more
    #[arg(long, env, global = true, hide_env_values = true, default_value = "32")]
    max_streams_per_user: String,
    /// Streams of one client address on this process (IPv6: of one /64); 0: no limit
    #[arg(long, env, global = true, hide_env_values = true, default_value = "0")]
    max_streams_per_address: String,
    /// New streams a second on this process; more are told to come back later
    #[arg(long, env, global = true, hide_env_values = true, default_value = "5000")]
    accept_rate: String,
    /// Whether there are rate limits at all
    #[arg(long, env, global = true, hide_env_values = true, default_value = "true")]
    rate_limits: String,
    /// Streams that one user opens: so many at once/refilled within so many seconds, or off. All gateways count together
    #[arg(long, env, global = true, hide_env_values = true, default_value = "240/60")]
    limit_open_per_user: String,
    /// The same from one client address. Name the ingress in `TRUSTED_PROXIES` first
    #[arg(long, env, global = true, hide_env_values = true, default_value = "off")]
    limit_open_per_address: String,
    /// Bytes of events kept for readers that are behind, over all users. Beyond it they read from api again
    #[arg(long, env, global = true, hide_env_values = true, default_value = "67108864")]
    backlog_bytes: String,
    /// Seconds after SIGTERM before the first stream is parted from, so that load balancers have noticed
    #[arg(long, env, global = true, hide_env_values = true, default_value = "5")]
    drain_wait_seconds: String,
    /// Seconds over which streams are then parted from at a steady rate
    #[arg(long, env, global = true, hide_env_values = true, default_value = "20")]
    drain_window_seconds: String,
    /// Seconds from SIGTERM until the platform kills the process (terminationGracePeriodSeconds); 0: not known. Draining must fit
    #[arg(long, env, global = true, hide_env_values = true, default_value = "0")]
    termination_grace_seconds: String,
    /// Where traces go: an OTLP/HTTP collector, <http://host:4318>; /v1/traces is put behind it. None: nothing is traced
    #[arg(long, env, global = true, hide_env_values = true, default_value = "")]
    otel_exporter_otlp_endpoint: String,
    /// What is sent to it besides: name=value,name=value, percent-encoded
    #[arg(long, env, global = true, hide_env_values = true, default_value = "")]
    otel_exporter_otlp_headers: String,
    /// The same, in a file; set one of the two
    #[arg(long, env, global = true, hide_env_values = true, default_value = "")]
    otel_exporter_otlp_headers_file: String,
    /// Events a second whose delivery is traced, at most. api says which belong to a trace
    #[arg(long, env, global = true, hide_env_values = true, default_value = "20")]
    traces_per_second: String,
}

/// The settings, checked.
#[derive(Debug, Clone)]
pub struct Config {
    pub listen: SocketAddr,
    pub ops_listen: SocketAddr,
    pub origin: Origin,
    pub allowed_origins: Vec<Origin>,
    pub trusted_proxies: TrustedProxies,
    /// At each listener; 0: no bound.
    pub connections_per_address: usize,
    /// Without a slash at the end.
    pub api_internal_url: String,
    pub internal_secrets: Secrets,
    pub redis: RedisTopology,
    pub channels: Channels,
    pub log: String,
    pub log_format: LogFormat,
    pub delivery: Delivery,
    pub admission: Admission,
    pub opening: Opening,
    pub drain: Drain,
    pub traces: Option<traces::Settings>,
}

/// What the delivery engine works by.
#[derive(Debug, Clone, Copy)]
pub struct Delivery {
    pub heartbeat: Duration,
    pub reconcile: Duration,
    pub suspect_reconcile: Duration,
    pub write_deadline: Duration,
    pub streams_per_user: usize,
    pub backlog_bytes: usize,
}

/// Who may open a stream.
#[derive(Debug, Clone, Copy)]
pub struct Admission {
    pub streams: usize,
    /// 0: no limit.
    pub streams_per_address: usize,
    pub rate: u32,
    pub max_age: Duration,
}

/// How often somebody may open a stream.
#[derive(Debug, Clone, Copy)]
pub struct Opening {
    pub per_user: Limit,
    pub per_address: Limit,
    /// How long Redis may take to answer. The head of a stream waits for it.
    pub patience: Duration,
}

#[derive(Debug, Clone, Copy)]
pub struct Drain {
    pub wait: Duration,
    pub window: Duration,
}

impl Settings {
    /// `open_files`: as many as the machine allows this process.
    pub fn check(self, open_files: u64) -> Result<Config, Problems> {
        let mut p = Problems::default();
        let listen = p.parse("LISTEN", &self.listen);
        let ops_listen = p.parse("OPS_LISTEN", &self.ops_listen);
        let origin = p.require("ORIGIN", self.origin.as_deref()).map(str::to_owned);
        let origin = origin.and_then(|origin| p.origin("ORIGIN", &origin));
        let allowed_origins = p.origins("ALLOWED_ORIGINS", &self.allowed_origins);
        let trusted_proxies = p.parse("TRUSTED_PROXIES", &self.trusted_proxies);
        let connections = p.number("CONNECTIONS_PER_ADDRESS", &self.connections_per_address, 0, 1_000_000);
        let api_internal_url = internal_url(&mut p, self.api_internal_url.as_deref());
        let internal_secrets =
            p.value_or_file("INTERNAL_SECRET", self.internal_secret.as_deref(), &self.internal_secret_file);
        let internal_secrets = p.secrets("INTERNAL_SECRET", internal_secrets.as_deref());
        let redis = self.redis(&mut p);
        if let Err(error) = self.log.parse::<EnvFilter>() {
            p.add(format!("LOG cannot be read: {error}"));
        }
        let log_format = p.parse("LOG_FORMAT", &self.log_format);
        let heartbeat = p.seconds("HEARTBEAT_SECONDS", &self.heartbeat_seconds, 1, 55);
        let proxy_idle = p.seconds("PROXY_IDLE_SECONDS", &self.proxy_idle_seconds, 2, 86_400);
        if let (Some(heartbeat), Some(idle)) = (heartbeat, proxy_idle)
            && engine::longest_silence(heartbeat) >= idle
        {
            p.add(format!(
                "HEARTBEAT_SECONDS is {}, and with its jitter a proxy that waits {} s (PROXY_IDLE_SECONDS) would cut quiet streams",
                heartbeat.as_secs(),
                idle.as_secs()
            ));
        }
        let reconcile = p.seconds("RECONCILE_SECONDS", &self.reconcile_seconds, 1, 300);
        let suspect_reconcile =
            p.millis("SUSPECT_RECONCILE_MILLIS", &self.suspect_reconcile_millis, 100, 60_000);
        let write_deadline = p.seconds("WRITE_DEADLINE_SECONDS", &self.write_deadline_seconds, 1, 600);
        let max_age = p.seconds("MAX_STREAM_AGE_SECONDS", &self.max_stream_age_seconds, 2, 14 * 86_400);
        let streams = p.number("MAX_STREAMS", &self.max_streams, 1, 1_000_000);
        let streams_per_user = p.number("MAX_STREAMS_PER_USER", &self.max_streams_per_user, 1, 10_000);
        let per_address = p.number("MAX_STREAMS_PER_ADDRESS", &self.max_streams_per_address, 0, 1_000_000);
        let rate = p.number("ACCEPT_RATE", &self.accept_rate, 1, 1_000_000);
        let limits = p.parse::<bool>("RATE_LIMITS", &self.rate_limits);
        let opened_per_user = p.parse("LIMIT_OPEN_PER_USER", &self.limit_open_per_user);
        let opened_per_address = p.parse("LIMIT_OPEN_PER_ADDRESS", &self.limit_open_per_address);
        let backlog = p.number("BACKLOG_BYTES", &self.backlog_bytes, 1 << 20, 1 << 36);
        let wait = p.seconds("DRAIN_WAIT_SECONDS", &self.drain_wait_seconds, 0, 300);
        let window = p.seconds("DRAIN_WINDOW_SECONDS", &self.drain_window_seconds, 0, 3_600);
        let grace = p.seconds("TERMINATION_GRACE_SECONDS", &self.termination_grace_seconds, 0, 7_200);
        let parts = [("DRAIN_WAIT_SECONDS", wait), ("DRAIN_WINDOW_SECONDS", window)];
        p.ends_in_time(grace, &parts, LAST_GOODBYES + MARGIN);
        let headers = p.value_or_file(
            "OTEL_EXPORTER_OTLP_HEADERS",
            Some(&self.otel_exporter_otlp_headers),
            &self.otel_exporter_otlp_headers_file,
        );
        let texts = traces::Texts {
            endpoint: &self.otel_exporter_otlp_endpoint,
            headers: headers.as_deref().unwrap_or_default(),
            ratio: None,
            per_second: &self.traces_per_second,
        };
        let traces = traces::Settings::read(&mut p, &texts);
        if let Some(streams) = streams {
            let needed = descriptors::needed(streams);
            if needed > open_files {
                p.add(format!(
                    "MAX_STREAMS is {streams}, which needs {needed} open files, and {open_files} are allowed (ulimit -Hn): lower the one or raise the other"
                ));
            }
        }
        p.finish(|| {
            Some(Config {
                listen: listen?,
                ops_listen: ops_listen?,
                origin: origin?,
                allowed_origins,
                trusted_proxies: trusted_proxies?,
                connections_per_address: usize::try_from(connections?).ok()?,
                api_internal_url: api_internal_url?,
                internal_secrets: internal_secrets?,
                redis: redis?,
                channels: Channels::new(self.channel_prefix),
                log: self.log,
                log_format: log_format?,
                delivery: Delivery {
                    heartbeat: heartbeat?,
                    reconcile: reconcile?,
                    suspect_reconcile: suspect_reconcile?,
                    write_deadline: write_deadline?,
                    streams_per_user: usize::try_from(streams_per_user?).ok()?,
                    backlog_bytes: usize::try_from(backlog?).ok()?,
                },
                admission: Admission {
                    streams: usize::try_from(streams?).ok()?,
                    streams_per_address: usize::try_from(per_address?).ok()?,
                    rate: u32::try_from(rate?).ok()?,
                    max_age: max_age?,
                },
                opening: Opening {
                    per_user: if limits? { opened_per_user? } else { Limit::Off },
                    per_address: if limits? { opened_per_address? } else { Limit::Off },
                    patience: limiter::SHARED_CHECK_TIMEOUT,
                },
                drain: Drain { wait: wait?, window: window? },
                traces: traces?,
            })
        })
    }

    fn redis(&self, p: &mut Problems) -> Option<RedisTopology> {
        let url = p.value_or_file("REDIS_URL", self.redis_url.as_deref(), &self.redis_url_file);
        let sentinels =
            p.value_or_file("REDIS_SENTINELS", Some(&self.redis_sentinels), &self.redis_sentinels_file);
        RedisTopology::from_settings(
            p,
            &self.redis_topology,
            url.as_deref(),
            sentinels.as_deref().unwrap_or_default(),
        )
    }
}

fn internal_url(p: &mut Problems, value: Option<&str>) -> Option<String> {
    let text = p.require("API_INTERNAL_URL", value)?.trim_end_matches('/');
    let well_formed = text
        .parse::<http::Uri>()
        .is_ok_and(|uri| uri.scheme_str() == Some("http") && uri.authority().is_some() && uri.path() == "/");
    if !well_formed {
        p.add("API_INTERNAL_URL must have the form http://host:port");
        return None;
    }
    Some(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(args: &[&str]) -> Result<Config, Problems> {
        check_with(args, u64::MAX)
    }

    fn check_with(args: &[&str], open_files: u64) -> Result<Config, Problems> {
        Cli::try_parse_from([&["stream-gateway"], args].concat()).unwrap().settings.check(open_files)
    }

    const ENOUGH: [&str; 4] = [
        "--origin=https://chat.example",
        "--api-internal-url=http://api:8081/",
        "--internal-secret=0123456789abcdef0123456789abcdef",
        "--redis-url=redis://redis:6379",
    ];

    #[test]
    fn what_is_missing_is_told_at_once() {
        let problems = check(&[
            // Given as flags, so that the environment of the tests says nothing.
            "--origin=",
            "--api-internal-url=",
            "--internal-secret=",
            "--redis-url=",
            "--heartbeat-seconds=0",
            "--log-format=xml",
        ])
        .unwrap_err()
        .to_string();
        for name in
            ["ORIGIN", "API_INTERNAL_URL", "INTERNAL_SECRET", "REDIS_URL", "HEARTBEAT_SECONDS", "LOG_FORMAT"]
        {
            assert!(problems.contains(name), "{problems}");
        }
    }

    #[test]
    fn secrets_are_read_from_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("redis");
        std::fs::write(&path, "redis://:hunter2@redis:6379\n").unwrap();
        let file = format!("--redis-url-file={}", path.display());
        let [origin, api, secret, redis] = ENOUGH;
        assert!(check(&[origin, api, secret, "--redis-url=", &file]).is_ok());
        let problems = check(&[
            origin,
            api,
            secret,
            redis,
            &file,
            "--redis-sentinels-file=/missing/a",
            "--otel-exporter-otlp-headers-file=/missing/b",
        ])
        .unwrap_err()
        .to_string();
        for problem in
            ["3 problem(s)", "REDIS_URL and REDIS_URL_FILE are both set", "/missing/a", "/missing/b"]
        {
            assert!(problems.contains(problem), "{problem} is missing in {problems}");
        }
        assert!(!problems.contains("hunter2"), "{problems}");
    }

    #[test]
    fn the_rest_has_defaults() {
        let config = check(&ENOUGH).unwrap();
        assert_eq!(config.api_internal_url, "http://api:8081");
        assert_eq!(config.delivery.heartbeat, Duration::from_secs(15));
    }

    #[test]
    fn what_cannot_work_together_is_refused() {
        let refused = |args: &[&str], open_files| {
            check_with(&[&ENOUGH, args].concat(), open_files).err().map(|problems| problems.to_string())
        };
        assert_eq!(refused(&["--termination-grace-seconds=40"], u64::MAX), None);
        let cut = refused(&["--termination-grace-seconds=39"], u64::MAX).unwrap();
        assert!(
            cut.contains("TERMINATION_GRACE_SECONDS is 39") && cut.contains("DRAIN_WINDOW_SECONDS"),
            "{cut}"
        );
        assert_eq!(refused(&["--heartbeat-seconds=26", "--proxy-idle-seconds=30"], u64::MAX), None);
        let silent = refused(&["--heartbeat-seconds=27", "--proxy-idle-seconds=30"], u64::MAX).unwrap();
        assert!(silent.contains("HEARTBEAT_SECONDS is 27"), "{silent}");
        assert_eq!(refused(&["--max-streams=1000"], 4_612), None);
        let few = refused(&["--max-streams=1000"], 4_611).unwrap();
        assert!(few.contains("4612 open files"), "{few}");
    }
}
