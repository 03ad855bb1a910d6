//! Every setting of the gateway, declared where it is read, typed and checked together. Imports no module that
//! it configures, except for their types of settings.

use std::{net::SocketAddr, time::Duration};

use clap::{Parser, Subcommand};
use protocol::channels::Channels;
use service_kit::{
    client_address::TrustedProxies,
    config::{self, Common, Origin},
    healthcheck::Probe,
    limiter::{self, Limit},
    redis_topology::RedisTopology,
    secrets::Secrets,
    settings::{Given, Problems, Required, Setting, Settings},
    telemetry::Logging,
    traces,
};

use crate::descriptors;

/// For the goodbyes that are still being written at the end of the drain window.
pub const LAST_GOODBYES: Duration = Duration::from_secs(10);
/// For the requests in progress at either listener after that. The other tasks stop immediately.
pub const LAST_REQUESTS: Duration = Duration::from_secs(3);
/// For the rest of a shutdown, after the goodbyes: [`LAST_REQUESTS`], then [`traces::LAST_SPANS`], and a second to spare.
const MARGIN: Duration = Duration::from_secs(5);
/// Share of the interval by which heartbeats are spread in both directions.
pub const HEARTBEAT_JITTER: f64 = 0.1;

/// Holds the Server-Sent Events streams of browsers: GET /api/messages.
///
/// Every setting is a flag and an environment variable of the same name.
#[derive(Debug, Parser)]
#[command(name = "stream-gateway", version, about, long_about)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub enum Command {
    /// Serve streams (the default)
    Serve,
    /// Validate the configuration, report every problem, and exit
    CheckConfig,
    /// Query the local service's /livez or /readyz and exit
    Healthcheck { probe: Probe },
}

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
    pub presence: bool,
    pub delivery: Delivery,
    pub admission: Admission,
    pub opening: Opening,
    pub drain: Drain,
    pub traces: Option<traces::TraceSettings>,
}

/// Settings of the delivery engine.
#[derive(Debug, Clone, Copy)]
pub struct Delivery {
    pub heartbeat: Duration,
    pub reconcile: Duration,
    pub degraded_reconcile: Duration,
    pub write_deadline: Duration,
    pub streams_per_user: usize,
    pub replay_buffer_bytes: usize,
}

/// Limits of open streams.
#[derive(Debug, Clone, Copy)]
pub struct Admission {
    pub streams: usize,
    /// 0: no limit.
    pub streams_per_address: usize,
    pub rate: u32,
    pub max_age: Duration,
}

/// Rate limits for opening streams.
#[derive(Debug, Clone, Copy)]
pub struct Opening {
    pub per_user: Limit,
    pub per_address: Limit,
    /// Time that Redis has to answer. The head of a stream waits for it.
    pub patience: Duration,
}

#[derive(Debug, Clone, Copy)]
pub struct Drain {
    pub wait: Duration,
    pub window: Duration,
}

const OPS_LISTEN: &str = "127.0.0.1:8092";

/// Every setting of the gateway.
pub fn rows() -> Vec<Setting> {
    Settings::rows(|s| read(s, u64::MAX))
}

/// `open_files`: the limit of this process.
pub fn for_serving(given: &Given, open_files: u64) -> Result<(Config, Logging), Problems> {
    read(&mut Settings::new(given), open_files)
}

pub fn for_healthcheck(given: &Given) -> Result<SocketAddr, Problems> {
    let mut s = Settings::new(given);
    let address = config::ops_listen(&mut s, OPS_LISTEN);
    s.finish(|| Some(address))
}

fn read(s: &mut Settings, open_files: u64) -> Result<(Config, Logging), Problems> {
    let common = Common::read(s, "127.0.0.1:8090", OPS_LISTEN, Required("http://localhost:8080"));
    let api_internal_url = s.with(
        "API_INTERNAL_URL",
        Required("http://127.0.0.1:8081"),
        "api's internal listener: http://host:port",
        internal_url,
    );
    let presence = config::presence(s);
    let delivery = delivery(s);
    let admission = admission(s, open_files);
    let mut limit = |name, default: &'static str, help| {
        let limit = s.parse(name, default, help);
        if common.rate_limits { limit } else { Limit::Off }
    };
    let opening = Opening {
        per_user: limit(
            "LIMIT_OPEN_PER_USER",
            "240/60",
            "Streams opened per user: so many at once, refilled evenly within so many seconds (240/60), or off. All gateways count \
             together, in Redis; streams over the limit are rejected with `busy`",
        ),
        per_address: limit(
            "LIMIT_OPEN_PER_ADDRESS",
            "off",
            "Streams opened per client address. Name the ingress in TRUSTED_PROXIES first",
        ),
        patience: limiter::SHARED_CHECK_TIMEOUT,
    };
    let drain = Drain {
        wait: s.seconds(
            "DRAIN_WAIT_SECONDS",
            "5",
            0..=300,
            "Time from SIGTERM until the first stream is closed, so that load balancers have noticed",
        ),
        window: s.seconds(
            "DRAIN_WINDOW_SECONDS",
            "20",
            0..=3_600,
            "Time over which streams are then closed at a steady rate",
        ),
    };
    let parts = [("DRAIN_WAIT_SECONDS", drain.wait), ("DRAIN_WINDOW_SECONDS", drain.window)];
    s.termination_grace(parts, LAST_GOODBYES + MARGIN);
    s.finish(|| {
        let config = Config {
            listen: common.listen,
            ops_listen: common.ops_listen,
            origin: common.origin,
            allowed_origins: common.allowed_origins,
            trusted_proxies: common.trusted_proxies,
            connections_per_address: common.connections_per_address,
            api_internal_url,
            internal_secrets: common.internal_secrets?,
            redis: common.redis?,
            channels: common.channels,
            presence,
            delivery,
            admission,
            opening,
            drain,
            traces: common.traces,
        };
        Some((config, common.logging))
    })
}

fn delivery(s: &mut Settings) -> Delivery {
    let heartbeat = s.seconds(
        "HEARTBEAT_SECONDS",
        "15",
        1..=55,
        "Interval of heartbeats on streams that request no other, ± 10 %",
    );
    let proxy_idle = s.seconds(
        "PROXY_IDLE_SECONDS",
        "60",
        2..=86_400,
        "Shortest idle timeout of the proxies between browsers and the gateway; HEARTBEAT_SECONDS must fit into it, ?heartbeat= \
         is the client's choice",
    );
    if longest_silence(heartbeat) >= proxy_idle {
        s.problem(
            &["HEARTBEAT_SECONDS", "PROXY_IDLE_SECONDS"],
            format!(
                "HEARTBEAT_SECONDS is {}; with jitter a proxy that waits {} s (PROXY_IDLE_SECONDS) would close quiet streams; lower it",
                heartbeat.as_secs(),
                proxy_idle.as_secs()
            ),
        );
    }
    Delivery {
        heartbeat,
        reconcile: s.seconds(
            "RECONCILE_SECONDS",
            "15",
            1..=300,
            "Interval of reconciles, which compare every user's feed with what was delivered, while Redis is healthy",
        ),
        degraded_reconcile: Duration::from_millis(s.number(
            "DEGRADED_RECONCILE_MILLIS",
            "1000",
            100..=60_000,
            "Interval of reconciles while Redis is degraded: how late events are then",
        )),
        write_deadline: s.seconds(
            "WRITE_DEADLINE_SECONDS",
            "60",
            1..=600,
            "A slow consumer that accepts no byte for this long is closed",
        ),
        streams_per_user: s.number(
            "MAX_STREAMS_PER_USER",
            "32",
            1..=10_000,
            "Streams of one user on this process; one more replaces the oldest",
        ),
        replay_buffer_bytes: s.number(
            "REPLAY_BUFFER_BYTES",
            "67108864",
            1 << 20..=1 << 36,
            "Bytes of recent events kept for slow consumers, over all users; beyond it they read from api again",
        ),
    }
}

fn admission(s: &mut Settings, open_files: u64) -> Admission {
    let streams = s.number(
        "MAX_STREAMS",
        "15000",
        1..=1_000_000,
        "Streams of this process; more are rejected with `busy`. It needs as many file descriptors and 3,612 more",
    );
    let needed = descriptors::needed(streams);
    if needed > open_files {
        s.problem(
            &["MAX_STREAMS"],
            format!(
                "MAX_STREAMS is {streams}, which needs {needed} open files, and {open_files} are allowed (ulimit -Hn); lower the \
                 former or raise the latter"
            ),
        );
    }
    Admission {
        streams: usize::try_from(streams).unwrap_or(usize::MAX),
        streams_per_address: s.number(
            "MAX_STREAMS_PER_ADDRESS",
            "0",
            0..=1_000_000,
            "Streams of one client address (IPv6: of one /64) on this process; 0: no limit",
        ),
        rate: s.number(
            "ACCEPT_RATE",
            "5000",
            1..=1_000_000,
            "New streams per second on this process; more are rejected with `busy`",
        ),
        max_age: s.seconds(
            "MAX_STREAM_AGE_SECONDS",
            "14400",
            2..=14 * 86_400,
            "Streams reconnect at a random age between half of this and all of it",
        ),
    }
}

/// A connection is never silent for longer than this.
fn longest_silence(heartbeat: Duration) -> Duration {
    heartbeat.mul_f64(1.0 + HEARTBEAT_JITTER) + Duration::from_secs(1)
}

fn internal_url(text: &str) -> Result<String, &'static str> {
    let url = text.trim_end_matches('/');
    let well_formed = url
        .parse::<http::Uri>()
        .is_ok_and(|uri| uri.scheme_str() == Some("http") && uri.authority().is_some() && uri.path() == "/");
    if well_formed { Ok(url.to_owned()) } else { Err("it must have the form http://host:port") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(args: &[&str]) -> Result<Config, Problems> {
        check_with(args, u64::MAX)
    }

    fn check_with(args: &[&str], open_files: u64) -> Result<Config, Problems> {
        let args = [&["stream-gateway"], args].concat();
        let (_, given) = Given::parse::<Cli>(&rows(), args).unwrap();
        Ok(for_serving(&given, open_files)?.0)
    }

    const ENOUGH: [&str; 4] = [
        "--origin=https://chat.example",
        "--api-internal-url=http://api:8081/",
        "--internal-secret=0123456789abcdef0123456789abcdef",
        "--redis-url=redis://redis:6379",
    ];

    #[test]
    fn all_missing_settings_are_reported_together() {
        let problems = check(&[
            // As flags, so that the environment of the tests does not count.
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
    fn other_settings_have_defaults() {
        let config = check(&ENOUGH).unwrap();
        assert_eq!(config.api_internal_url, "http://api:8081");
        assert_eq!(config.delivery.heartbeat, Duration::from_secs(15));
    }

    #[test]
    fn shutdown_after_the_goodbyes_fits_into_its_margin() {
        assert!(LAST_REQUESTS + traces::LAST_SPANS < MARGIN);
    }

    #[test]
    fn settings_that_do_not_fit_together_are_rejected() {
        let problems = |args: &[&str], open_files| {
            check_with(&[&ENOUGH, args].concat(), open_files).err().map(|problems| problems.to_string())
        };
        assert_eq!(problems(&["--termination-grace-seconds=40"], u64::MAX), None);
        let cut = problems(&["--termination-grace-seconds=39"], u64::MAX).unwrap();
        assert!(
            cut.contains("TERMINATION_GRACE_SECONDS is 39") && cut.contains("DRAIN_WINDOW_SECONDS"),
            "{cut}"
        );
        assert_eq!(problems(&["--heartbeat-seconds=26", "--proxy-idle-seconds=30"], u64::MAX), None);
        let silent = problems(&["--heartbeat-seconds=27", "--proxy-idle-seconds=30"], u64::MAX).unwrap();
        assert!(silent.contains("HEARTBEAT_SECONDS is 27"), "{silent}");
        assert_eq!(problems(&["--max-streams=1000"], 4_612), None);
        let few = problems(&["--max-streams=1000"], 4_611).unwrap();
        assert!(few.contains("4612 open files"), "{few}");
    }
}
