//! The Redis that both services use: a single server, the primary that Sentinel names, or Redis Cluster.
//!
//! Every connection goes to where the settings point *now*: names are resolved and sentinels are queried again. The holder of a
//! connection must find out by itself that it has become the wrong one. On a cluster a [`SlotMap`] says which node owns which
//! slots; it is fetched every few seconds and on [`SlotMapWatch::refresh`]. A single server is one node that owns every slot.

mod keyed;
mod node_stream;
mod slot_map;

use std::{fmt, sync::Arc, time::Duration};

use futures_util::future::join_all;
use rand::seq::SliceRandom;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo,
    ProtocolVersion, RedisError, RedisResult, TlsMode,
    aio::MultiplexedConnection,
    sentinel::{SentinelClient, SentinelNodeConnectionInfo, SentinelServerType},
};
use thiserror::Error;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, sleep_until},
};

use self::slot_map::ReportedSlotMap;
pub use self::{
    keyed::KeyedRedis,
    node_stream::{NodeAddress, NodeStream},
    slot_map::{Slot, SlotMap},
};

/// Limit for connecting to a cluster node that is queried for the slot map, and for its answer.
const QUERY_TIMEOUT: Duration = Duration::from_secs(1);
/// Nodes that are queried for the slot map at the same time; the newest answer counts.
const QUERIED_AT_ONCE: usize = 3;
const MAX_QUERIED: usize = 12;
/// Between two fetches of the slot map, plus up to half as much again.
const FETCH_EVERY: Duration = Duration::from_secs(4);
/// Between two fetches of the slot map, however often a refresh is requested.
const MIN_FETCH_INTERVAL: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TopologyKind {
    Single,
    Sentinel,
    Cluster,
}

#[derive(Debug, Error)]
#[error("it must be single, sentinel or cluster")]
pub struct UnknownTopology;

impl std::str::FromStr for TopologyKind {
    type Err = UnknownTopology;

    fn from_str(text: &str) -> Result<Self, UnknownTopology> {
        match text {
            "single" => Ok(Self::Single),
            "sentinel" => Ok(Self::Sentinel),
            "cluster" => Ok(Self::Cluster),
            _ => Err(UnknownTopology),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Node {
    /// The single server, or the primary that Sentinel names.
    Only,
    /// A node of a cluster, by the address that the cluster announces.
    At(Arc<str>, u16),
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Only => f.write_str("redis"),
            Self::At(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

/// Reaches Redis. Cheap to clone.
#[derive(Clone)]
pub struct RedisTopology(Arc<Topology>);

enum Topology {
    Single(Client),
    Sentinel { service: String, primary: SentinelNodeConnectionInfo, sentinels: Vec<ConnectionInfo> },
    Cluster { seeds: Vec<ConnectionInfo> },
}

impl fmt::Debug for RedisTopology {
    /// Without the URLs, which hold passwords.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self.0 {
            Topology::Single(_) => "Single",
            Topology::Sentinel { .. } => "Sentinel",
            Topology::Cluster { .. } => "Cluster",
        })
    }
}

impl RedisTopology {
    /// From `REDIS_TOPOLOGY`, `REDIS_URL` and `REDIS_SENTINELS`. The error is a sentence about them.
    pub fn new(
        kind: TopologyKind,
        mut urls: Vec<ConnectionInfo>,
        sentinels: Vec<ConnectionInfo>,
    ) -> Result<Self, String> {
        if urls.is_empty() || kind != TopologyKind::Cluster && urls.len() != 1 {
            let count = urls.len();
            return Err(format!(
                "REDIS_URL names {count} servers; only REDIS_TOPOLOGY=cluster takes several"
            ));
        }
        if (kind == TopologyKind::Sentinel) == sentinels.is_empty() {
            return Err("REDIS_SENTINELS must be set if REDIS_TOPOLOGY is sentinel, and only then".into());
        }
        if kind == TopologyKind::Cluster && urls.iter().any(|url| url.redis_settings().db() != 0) {
            return Err("REDIS_URL names a database; Redis Cluster has only database 0".into());
        }
        Ok(match kind {
            // The error may hold the URL, and that a password.
            TopologyKind::Single => Self::single(urls.remove(0)).map_err(|_| "REDIS_URL cannot be used")?,
            TopologyKind::Sentinel => {
                let (service, primary) = sentinel_service(&urls[0]);
                Self(Arc::new(Topology::Sentinel { service, primary, sentinels }))
            }
            TopologyKind::Cluster => Self(Arc::new(Topology::Cluster { seeds: urls })),
        })
    }

    pub fn single(url: impl IntoConnectionInfo) -> RedisResult<Self> {
        Ok(Self(Arc::new(Topology::Single(Client::open(with_resp3(url.into_connection_info()?))?))))
    }

    /// Whether channels belong to slots: `SSUBSCRIBE` and `SPUBLISH` in place of `SUBSCRIBE` and `PUBLISH`.
    pub fn is_sharded(&self) -> bool {
        matches!(*self.0, Topology::Cluster { .. })
    }

    pub fn publish_command(&self) -> redis::Cmd {
        redis::cmd(if self.is_sharded() { "SPUBLISH" } else { "PUBLISH" })
    }

    pub async fn connect(
        &self,
        node: &Node,
        config: &AsyncConnectionConfig,
    ) -> RedisResult<MultiplexedConnection> {
        let info = self.find(node).await?;
        Client::open(info)?.get_multiplexed_async_connection_with_config(config).await
    }

    /// Where the node is now, for a connection whose bytes the caller reads.
    pub async fn address(&self, node: &Node) -> RedisResult<NodeAddress> {
        NodeAddress::new(self.find(node).await?)
    }

    async fn find(&self, node: &Node) -> RedisResult<ConnectionInfo> {
        Ok(match &*self.0 {
            Topology::Single(client) => client.get_connection_info().clone(),
            // A client per connection: a cached one would serialize callers, and try sentinel connections that have broken.
            Topology::Sentinel { service, primary, sentinels } => {
                let (sentinels, primary) = (sentinels.clone(), Some(primary.clone()));
                let mut sentinels =
                    SentinelClient::build(sentinels, service, primary, SentinelServerType::Master)?;
                sentinels.async_get_client().await?.get_connection_info().clone()
            }
            Topology::Cluster { seeds } => match node {
                Node::Only => seeds[0].clone(),
                Node::At(host, port) => with_address(&seeds[0], host, *port),
            },
        })
    }

    /// The slot map as the cluster reports it now. Nodes of `known` are queried first, then those in the settings.
    pub async fn fetch_slot_map(&self, known: &SlotMap) -> RedisResult<SlotMap> {
        let Topology::Cluster { seeds } = &*self.0 else { return Ok(SlotMap::single_node()) };
        let mut queried: Vec<ConnectionInfo> = known
            .nodes()
            .iter()
            .filter_map(|node| match node {
                Node::Only => None,
                Node::At(host, port) => Some(with_address(&seeds[0], host, *port)),
            })
            .collect();
        let mut seeds = seeds.clone();
        for list in [&mut queried, &mut seeds] {
            list.shuffle(&mut rand::rng());
            list.truncate(MAX_QUERIED / 2);
        }
        queried.append(&mut seeds);
        let mut failed = None;
        for some in queried.chunks(QUERIED_AT_ONCE) {
            let mut newest: Option<ReportedSlotMap> = None;
            for answer in join_all(some.iter().map(ReportedSlotMap::fetch)).await {
                match answer {
                    Ok(map) if newest.as_ref().is_none_or(|newest| newest.version() < map.version()) => {
                        newest = Some(map);
                    }
                    Ok(_) => {}
                    Err(error) => failed = Some(error),
                }
            }
            if let Some(newest) = newest {
                return Ok(newest.map);
            }
        }
        Err(failed.unwrap_or_else(|| RedisError::from((ErrorKind::Io, "no node of the cluster answers"))))
    }

    /// The slot map, and the future that keeps it current while it is polled.
    pub fn watch_slot_map(
        &self,
    ) -> (SlotMapWatch, impl Future<Output = std::convert::Infallible> + Send + use<>) {
        let first = if self.is_sharded() { SlotMap::default() } else { SlotMap::single_node() };
        let (sender, receiver) = watch::channel(Arc::new(first));
        let refresh = Arc::new(Notify::new());
        let slot_maps = SlotMapWatch { slot_maps: receiver, refresh: refresh.clone() };
        let topology = self.clone();
        let following = async move {
            if !topology.is_sharded() {
                return std::future::pending().await;
            }
            loop {
                let known = sender.borrow().clone();
                match topology.fetch_slot_map(&known).await {
                    Ok(map) if map == *known => {}
                    Ok(map) => {
                        tracing::info!(
                            nodes = map.nodes().len(),
                            covers_all_slots = map.covers_all_slots(),
                            "redis cluster slot map changed"
                        );
                        sender.send_replace(Arc::new(map));
                    }
                    Err(error) => tracing::warn!(%error, "failed to refresh the redis cluster slot map"),
                }
                sleep(MIN_FETCH_INTERVAL).await;
                let next = Instant::now() + FETCH_EVERY.mul_f64(rand::random_range(1.0..1.5));
                tokio::select! {
                    () = sleep_until(next) => {}
                    () = refresh.notified() => {}
                }
            }
        };
        (slot_maps, following)
    }
}

#[derive(Clone)]
pub struct SlotMapWatch {
    slot_maps: watch::Receiver<Arc<SlotMap>>,
    refresh: Arc<Notify>,
}

impl SlotMapWatch {
    pub fn now(&mut self) -> Arc<SlotMap> {
        self.slot_maps.borrow_and_update().clone()
    }

    /// Returns when there is a newer map than [`Self::now`] returned.
    pub async fn changed(&mut self) {
        if self.slot_maps.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// After a redirect or a failure: fetches the slot map again soon.
    pub fn refresh(&self) {
        self.refresh.notify_one();
    }
}

/// The node that a `MOVED` or `ASK` answer of `by` points to.
pub fn redirect_target(error: &RedisError, by: &Node) -> Option<Node> {
    let (address, _) = error.redirect_node()?;
    let (host, port) = address.rsplit_once(':')?;
    let port = port.parse().ok()?;
    match (host, by) {
        // The node does not know its own name.
        ("", Node::At(same, _)) => Some(Node::At(same.clone(), port)),
        ("", Node::Only) => None,
        (host, _) => Some(Node::At(host.into(), port)),
    }
}

/// The log line of both services for [`is_access_denied`]; docs/runbook.md explains it.
pub const ACCESS_DENIED: &str = "redis authentication or ACL failure; delivery falls back to reconciliation";

/// Whether Redis refuses our user, password or permissions, which a retry does not fix.
pub fn is_access_denied(error: &RedisError) -> bool {
    use redis::ServerErrorKind::NoPerm;
    matches!(error.kind(), ErrorKind::AuthenticationFailed | ErrorKind::Server(NoPerm))
        || matches!(error.code(), Some("WRONGPASS" | "NOAUTH" | "NOPERM"))
}

/// Whether the server answered with an error, so that the connection still works.
pub fn is_server_error(error: &RedisError) -> bool {
    matches!(error.kind(), ErrorKind::Server(_) | ErrorKind::Extension)
}

pub fn servers(list: &str) -> Result<Vec<ConnectionInfo>, NotRedisUrls> {
    let urls = list.split(',').map(str::trim).filter(|url| !url.is_empty());
    // The error may hold the URL, and that a password.
    urls.map(|url| url.into_connection_info().map(with_resp3).map_err(|_| NotRedisUrls)).collect()
}

#[derive(Debug, Error)]
#[error("it must have the form redis://[user:password@]host:port, or rediss:// for TLS")]
pub struct NotRedisUrls;

/// RESP3, so that published messages and command replies share a connection.
fn with_resp3(info: ConnectionInfo) -> ConnectionInfo {
    let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    info.set_redis_settings(settings)
}

fn with_address(info: &ConnectionInfo, host: &str, port: u16) -> ConnectionInfo {
    let addr = match info.addr().clone() {
        ConnectionAddr::TcpTls { insecure, tls_params, .. } => {
            ConnectionAddr::TcpTls { host: host.to_owned(), port, insecure, tls_params }
        }
        _ => ConnectionAddr::Tcp(host.to_owned(), port),
    };
    info.clone().set_addr(addr)
}

/// The service name of Sentinel, which is the host of the URL, and how to connect to its primary.
fn sentinel_service(url: &ConnectionInfo) -> (String, SentinelNodeConnectionInfo) {
    let primary =
        SentinelNodeConnectionInfo::default().set_redis_connection_info(url.redis_settings().clone());
    match url.addr() {
        ConnectionAddr::TcpTls { host, insecure, .. } => {
            let mode = if *insecure { TlsMode::Insecure } else { TlsMode::Secure };
            (host.clone(), primary.set_tls_mode(mode))
        }
        ConnectionAddr::Tcp(host, _) => (host.clone(), primary),
        other => (other.to_string(), primary),
    }
}

async fn connect_for_query(info: ConnectionInfo) -> RedisResult<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(QUERY_TIMEOUT))
        .set_response_timeout(Some(QUERY_TIMEOUT));
    Client::open(info)?.get_multiplexed_async_connection_with_config(&config).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(kind: &str, url: &str, sentinels: &str) -> Option<String> {
        let parsed = || {
            let kind = kind.parse().map_err(|error: UnknownTopology| error.to_string())?;
            let [url, sentinels] =
                [url, sentinels].map(|list| servers(list).map_err(|error| error.to_string()));
            RedisTopology::new(kind, url?, sentinels?)
        };
        parsed().err()
    }

    #[test]
    fn invalid_settings_are_reported_without_passwords() {
        assert_eq!(problem("single", "redis://a", ""), None);
        assert_eq!(problem("cluster", "rediss://u:p@a:1,rediss://u:p@b:2", ""), None);
        assert_eq!(problem("sentinel", "redis://u:p@main", "redis://s1:26379,redis://s2:26379"), None);
        for (topology, url, sentinels) in [
            ("ring", "redis://hunter2@a", ""),
            ("single", "redis://a,redis://b", ""),
            ("single", "http://x:hunter2@a", ""),
            ("single", "redis://a", "redis://s1"),
            ("sentinel", "redis://main", ""),
            ("sentinel", "redis://main,redis://other", "redis://s1"),
            ("cluster", "redis://a", "redis://s1"),
            ("cluster", "redis://a/1", ""),
            ("cluster", "", ""),
        ] {
            let said = problem(topology, url, sentinels).unwrap_or_default();
            assert!(!said.is_empty() && !said.contains("hunter2"), "{topology} {url}: {said}");
        }
    }
}
