//! The settings that both services have, and the type of an origin.

use std::{net::SocketAddr, num::NonZeroU32, str::FromStr};

use protocol::channels::Channels;
use thiserror::Error;
use tracing_subscriber::EnvFilter;
use url::{Host, Url};

use crate::{
    client_address::TrustedProxies,
    redis_topology::{self, RedisTopology},
    secrets::Secrets,
    settings::{Initial, Required, Settings},
    telemetry::{LogFormat, Logging},
    traces,
};

pub struct Common {
    pub listen: SocketAddr,
    pub ops_listen: SocketAddr,
    pub origin: Origin,
    pub allowed_origins: Vec<Origin>,
    pub trusted_proxies: TrustedProxies,
    /// Per listener; 0: no limit.
    pub connections_per_address: usize,
    /// `None`: a problem was reported, as for the other options.
    pub redis: Option<RedisTopology>,
    pub channels: Channels,
    pub internal_secrets: Option<Secrets>,
    pub rate_limits: bool,
    pub logging: Logging,
    pub traces: Option<traces::TraceSettings>,
}

impl Common {
    /// The arguments are what the service has in place of `LISTEN`, `OPS_LISTEN` and `ORIGIN` that are not set.
    pub fn read(
        s: &mut Settings,
        listen: &'static str,
        ops_listen: &'static str,
        origin: impl Into<Initial>,
    ) -> Self {
        Self {
            listen: s.parse("LISTEN", listen, "Address for clients, behind the ingress"),
            ops_listen: self::ops_listen(s, ops_listen),
            origin: s.parse(
                "ORIGIN",
                origin,
                "Public origin of the product: scheme://host[:port], no path. It is the issuer of tokens. With https, cookies are \
                 Secure and locked to the host (__Host-)",
            ),
            allowed_origins: s.list(
                "ALLOWED_ORIGINS",
                "Other origins whose pages may use the session cookie and read responses, without wildcards. Browsers send the \
                 cookie only within one site; pages of other sites use tokens",
            ),
            trusted_proxies: s.parse(
                "TRUSTED_PROXIES",
                "",
                "Proxies whose X-Forwarded-For is trusted, so that limits count clients and not the ingress: their networks, \
                 comma-separated, as 10.0.0.0/8,fd00::/8. List no network that clients can send from. Empty: the peer is the client",
            ),
            connections_per_address: s.number(
                "CONNECTIONS_PER_ADDRESS",
                "512",
                0..=1_000_000,
                "Connections of one client address (IPv6: of one /64) at each listener, without open streams, and never more than \
                 half of what the listener accepts; more are closed. Not for TRUSTED_PROXIES. 0: no limit",
            ),
            redis: redis(s),
            channels: Channels::new(s.parse::<String>(
                "CHANNEL_PREFIX",
                "",
                "Prefix of every Redis channel and key, so that several installations can share one Redis. The same for both services",
            )),
            internal_secrets: s.secret(
                "INTERNAL_SECRET",
                Required(""),
                "Secret between gateways and api's internal listener, at least 32 characters: openssl rand -hex 32. Or several, \
                 comma-separated: the first is sent, all are accepted. The runbook says how to rotate it",
                Secrets::parse,
            ),
            rate_limits: s.flag("RATE_LIMITS", "true", "Enables rate limits"),
            logging: logging(s),
            traces: traces(s),
        }
    }
}

/// `PRESENCE`, in both services.
pub fn presence(s: &mut Settings) -> bool {
    s.flag("PRESENCE", "true", "Tells partners who is online. The same for both services")
}

pub fn ops_listen(s: &mut Settings, default: &'static str) -> SocketAddr {
    s.parse(
        "OPS_LISTEN",
        default,
        "Address for operators: /livez, /readyz, /metrics. Never route it from outside",
    )
}

pub fn logging(s: &mut Settings) -> Logging {
    Logging {
        filter: s.parse::<EnvFilter>(
            "LOG",
            "info",
            "Log filter: error, warn, info or debug, or per module: info,api=debug",
        ),
        format: s.parse::<LogFormat>("LOG_FORMAT", "human", "Form of log lines: human or json"),
    }
}

fn redis(s: &mut Settings) -> Option<RedisTopology> {
    let servers = s.secret(
        "REDIS_URL",
        Required("redis://127.0.0.1:6379"),
        "Redis: redis://[user:password@]host:port, or rediss:// for TLS, verified with the system's certificates (or SSL_CERT_FILE \
         and SSL_CERT_DIR). With cluster: some of its nodes, comma-separated. With sentinel: the name of the primary in place of \
         host:port",
        redis_topology::servers,
    );
    let topology = s.parse(
        "REDIS_TOPOLOGY",
        "single",
        "single: one server, wherever its name points. sentinel: the primary that Sentinel names. cluster: Redis Cluster with \
         sharded channels. The same for both services",
    );
    let sentinels = s.secret(
        "REDIS_SENTINELS",
        "",
        "URLs of the sentinels, comma-separated, each with its own user and password if it needs them",
        redis_topology::servers,
    );
    let redis = RedisTopology::new(topology, servers?, sentinels?);
    redis.map_err(|problem| s.problem(&["REDIS_URL", "REDIS_TOPOLOGY", "REDIS_SENTINELS"], problem)).ok()
}

fn traces(s: &mut Settings) -> Option<traces::TraceSettings> {
    let endpoint = s.with(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "",
        "OpenTelemetry collector that accepts OTLP over HTTP: http://host:4318 or https://host; /v1/traces is appended. Empty: no \
         tracing",
        traces::settings::endpoint,
    );
    let headers = s.secret(
        "OTEL_EXPORTER_OTLP_HEADERS",
        "",
        "Headers for the collector, such as an API key: name=value,name=value, percent-encoded",
        traces::settings::headers,
    );
    let per_second = s.number::<u32>(
        "TRACES_PER_SECOND",
        "20",
        1..=100_000,
        "api: traces started per second, and as many again that clients request. stream-gateway: events per second whose delivery \
         is traced",
    );
    Some(traces::TraceSettings::new(endpoint?, headers?, NonZeroU32::new(per_second)?))
}

/// An origin in the one form in which browsers send it (RFC 6454, 6.2): `scheme://host[:port]`, the host in lower case and in
/// ASCII, without a default port. Settings may write it in another way; it is compared byte by byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(String);

#[derive(Debug, PartialEq, Eq, Error)]
pub enum NotAnOrigin {
    #[error(
        "an origin must have the form https://host or http://host:port, without a user, a path or a query"
    )]
    Form,
    #[error("an origin names one host; list each origin, wildcards are not supported")]
    Wildcard,
}

impl Origin {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn is_https(&self) -> bool {
        self.0.starts_with("https://")
    }

    /// Development conveniences are allowed on loopback only.
    pub fn is_loopback(&self) -> bool {
        let url = Url::parse(&self.0).expect("an origin is a URL");
        url.host().is_some_and(|host| is_loopback(&host))
    }
}

/// Whether the host names this machine, without asking DNS.
pub fn is_loopback(host: &Host<&str>) -> bool {
    match host {
        Host::Domain(name) => *name == "localhost" || name.ends_with(".localhost"),
        Host::Ipv4(address) => address.is_loopback(),
        Host::Ipv6(address) => address.is_loopback(),
    }
}

impl FromStr for Origin {
    type Err = NotAnOrigin;

    fn from_str(text: &str) -> Result<Self, NotAnOrigin> {
        if text.contains('*') {
            return Err(NotAnOrigin::Wildcard);
        }
        // The parser repairs, as browsers do, much that is a mistake in a setting.
        let repaired = |c: char| c.is_whitespace() || c.is_control() || c == '\\';
        let (_, behind) = text.split_once("://").ok_or(NotAnOrigin::Form)?;
        if text.contains(repaired) || behind.starts_with('/') {
            return Err(NotAnOrigin::Form);
        }
        let url = Url::parse(text).map_err(|_| NotAnOrigin::Form)?;
        // An origin has no path, or a single slash.
        let bare = url.path() == "/" && !behind.contains(['@', '?', '#']);
        if !bare || !matches!(url.scheme(), "http" | "https") {
            return Err(NotAnOrigin::Form);
        }
        Ok(Self(url.origin().ascii_serialization()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_written_as_browsers_send_it() {
        for (given, sent) in [
            ("https://chat.example", "https://chat.example"),
            ("https://chat.example:443", "https://chat.example"),
            ("http://chat.example:80/", "http://chat.example"),
            ("http://chat.example:443", "http://chat.example:443"),
            ("HTTPS://Chat.Example:8443", "https://chat.example:8443"),
            ("https://chat.example:", "https://chat.example"),
            ("https://chat.example:08443", "https://chat.example:8443"),
            ("https://bücher.example", "https://xn--bcher-kva.example"),
            ("https://XN--BCHER-KVA.example", "https://xn--bcher-kva.example"),
            ("http://localhost:3000", "http://localhost:3000"),
            ("http://127.0.0.1:1", "http://127.0.0.1:1"),
            ("http://[0:0:0:0:0:0:0:1]:8080", "http://[::1]:8080"),
        ] {
            assert_eq!(given.parse::<Origin>().map(|origin| origin.0), Ok(sent.to_owned()), "{given}");
        }
    }

    #[test]
    fn setting_that_matches_no_origin_is_rejected() {
        for bad in [
            "",
            "null",
            "chat.example",
            "chat.example:443",
            "https:chat.example",
            "https:///chat.example",
            "https:\\\\chat.example",
            " https://chat.example",
            "https://chat.exa\nmple",
            "https://",
            "https://chat.example:99999",
            "https://chat.example//",
            "https://chat.example/path",
            "https://chat.example?",
            "https://chat.example#",
            "https://@chat.example",
            "https://me:secret@chat.example",
            "https://chat.example,https://shop.example",
            "https://a b.example",
            "ftp://chat.example",
            "file:///etc",
        ] {
            assert_eq!(bad.parse::<Origin>(), Err(NotAnOrigin::Form), "{bad}");
        }
        for wildcard in ["*", "https://*", "https://*.chat.example", "http://localhost:*"] {
            assert_eq!(wildcard.parse::<Origin>(), Err(NotAnOrigin::Wildcard), "{wildcard}");
        }
    }

    #[test]
    fn a_loopback_origin_is_this_machine_by_any_name() {
        let loopback = |text: &str| text.parse::<Origin>().unwrap().is_loopback();
        assert!(
            ["http://localhost:3000", "http://127.0.0.1", "http://[::1]:8080", "http://a.localhost"]
                .into_iter()
                .all(loopback)
        );
        assert!(
            !["https://chat.example", "http://localhost.example", "http://127.0.0.1.example"]
                .into_iter()
                .any(loopback)
        );
    }
}
