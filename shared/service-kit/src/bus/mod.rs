//! Redis as the services meet it: one server, the one that Sentinel names, or a cluster whose nodes share the names by slots.
//!
//! Every connection is made to where the settings point *now*: a name is resolved again, sentinels are asked again. Who keeps a
//! connection must find out by itself that it has become the wrong one. On a cluster, which node owns a name is a [`Map`], asked
//! for again every few seconds and whenever somebody doubts it. A single server is a cluster of one node that owns everything.

mod map;
mod sentinel;

use std::{fmt, sync::Arc, time::Duration};

use futures_util::future::join_all;
use rand::seq::SliceRandom;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo,
    ProtocolVersion, RedisError, RedisResult, aio::MultiplexedConnection,
};
use thiserror::Error;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, sleep_until},
};

pub use self::map::{Map, Slot};
use self::{map::View, sentinel::Sentinels};
use crate::config::Problems;

/// For connecting to a node or a sentinel that is asked where things are, and for its answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// Nodes that are asked at once which of them owns what; the newest view counts.
const VIEWS: usize = 3;
/// Nodes that are asked before we say that none answers.
const MOST_ASKED: usize = 12;
/// Between two looks at the cluster's map: this, and up to half as much again. At least the other, whoever doubts.
const LOOK_EVERY: Duration = Duration::from_secs(4);
const LOOK_APART: Duration = Duration::from_millis(200);

/// What REDIS_TOPOLOGY says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Topology {
    Single,
    Sentinel,
    Cluster,
}

#[derive(Debug, Error)]
#[error("it is single, sentinel or cluster")]
pub struct NotATopology;

impl std::str::FromStr for Topology {
    type Err = NotATopology;

    fn from_str(text: &str) -> Result<Self, NotATopology> {
        match text {
            "single" => Ok(Self::Single),
            "sentinel" => Ok(Self::Sentinel),
            "cluster" => Ok(Self::Cluster),
            _ => Err(NotATopology),
        }
    }
}

/// A server that can be connected to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Node {
    /// The only one, wherever that is.
    Only,
    /// A node of a cluster, as the cluster calls it.
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

/// How to reach Redis. Cheap to clone.
#[derive(Clone)]
pub struct Bus(Arc<Kind>);

enum Kind {
    Single(Client),
    Sentinel(Sentinels),
    Cluster { seeds: Vec<ConnectionInfo> },
}

impl fmt::Debug for Bus {
    /// Nothing of the URLs, which hold passwords.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self.0 {
            Kind::Single(_) => "Single",
            Kind::Sentinel(_) => "Sentinel",
            Kind::Cluster { .. } => "Cluster",
        })
    }
}

impl Bus {
    /// From `REDIS_TOPOLOGY`, `REDIS_URL` and `REDIS_SENTINELS`.
    pub fn from_settings(
        p: &mut Problems,
        topology: &str,
        url: Option<&str>,
        sentinels: &str,
    ) -> Option<Self> {
        let topology = p.parse("REDIS_TOPOLOGY", topology);
        let urls = p.require("REDIS_URL", url).map(str::to_owned);
        let urls = servers(p, "REDIS_URL", &urls?);
        let watchers = servers(p, "REDIS_SENTINELS", sentinels)?;
        let (topology, mut urls) = (topology?, urls?);
        if topology != Topology::Cluster && urls.len() != 1 {
            p.add(format!("REDIS_URL names {} servers, and REDIS_TOPOLOGY is not cluster", urls.len()));
            return None;
        }
        if (topology == Topology::Sentinel) == watchers.is_empty() {
            p.add("REDIS_SENTINELS is for REDIS_TOPOLOGY sentinel, which needs it");
            return None;
        }
        if topology == Topology::Cluster && urls.iter().any(|url| url.redis_settings().db() != 0) {
            p.add("REDIS_URL names a database, and a cluster has only the first");
            return None;
        }
        Some(match topology {
            Topology::Single => Self::single(urls.remove(0)).ok()?,
            Topology::Sentinel => Self(Arc::new(Kind::Sentinel(Sentinels::new(urls.remove(0), watchers)))),
            Topology::Cluster => Self(Arc::new(Kind::Cluster { seeds: urls })),
        })
    }

    /// One server, at this URL.
    pub fn single(url: impl IntoConnectionInfo) -> RedisResult<Self> {
        Ok(Self(Arc::new(Kind::Single(Client::open(with_resp3(url.into_connection_info()?))?))))
    }

    /// Whether channels belong to slots: `SSUBSCRIBE` and `SPUBLISH` in place of `SUBSCRIBE` and `PUBLISH`.
    pub fn is_sharded(&self) -> bool {
        matches!(*self.0, Kind::Cluster { .. })
    }

    /// The command that announces on a channel.
    pub fn publish(&self) -> redis::Cmd {
        redis::cmd(if self.is_sharded() { "SPUBLISH" } else { "PUBLISH" })
    }

    /// A connection made anew.
    pub async fn connect(
        &self,
        node: &Node,
        config: &AsyncConnectionConfig,
    ) -> RedisResult<MultiplexedConnection> {
        match &*self.0 {
            Kind::Single(client) => client.get_multiplexed_async_connection_with_config(config).await,
            Kind::Sentinel(sentinels) => sentinels.connect(config).await,
            Kind::Cluster { seeds } => {
                let info = match node {
                    Node::Only => seeds[0].clone(),
                    Node::At(host, port) => at(&seeds[0], host, *port),
                };
                Client::open(info)?.get_multiplexed_async_connection_with_config(config).await
            }
        }
    }

    /// Who owns what, as the cluster says now.
    pub async fn look(&self, known: &Map) -> RedisResult<Map> {
        let Kind::Cluster { seeds } = &*self.0 else { return Ok(Map::of_one()) };
        let mut asked: Vec<ConnectionInfo> = known
            .nodes()
            .iter()
            .filter_map(|node| match node {
                Node::Only => None,
                Node::At(host, port) => Some(at(&seeds[0], host, *port)),
            })
            .collect();
        let mut seeds = seeds.clone();
        for list in [&mut asked, &mut seeds] {
            list.shuffle(&mut rand::rng());
            list.truncate(MOST_ASKED / 2);
        }
        asked.append(&mut seeds);
        let mut failed = None;
        for some in asked.chunks(VIEWS) {
            let mut newest: Option<View> = None;
            for answer in join_all(some.iter().map(View::ask)).await {
                match answer {
                    Ok(view) if newest.as_ref().is_none_or(|newest| newest.age() < view.age()) => {
                        newest = Some(view);
                    }
                    Ok(_) => {}
                    Err(error) => failed = Some(error),
                }
            }
            if let Some(view) = newest {
                return Ok(view.map);
            }
        }
        Err(failed.unwrap_or_else(|| RedisError::from((ErrorKind::Io, "no node of the cluster answers"))))
    }

    /// The map, and the task that keeps it up for as long as it is polled.
    pub fn follow(&self) -> (Maps, impl Future<Output = std::convert::Infallible> + Send + use<>) {
        let first = if self.is_sharded() { Map::default() } else { Map::of_one() };
        let (sender, receiver) = watch::channel(Arc::new(first));
        let doubted = Arc::new(Notify::new());
        let maps = Maps { maps: receiver, doubted: doubted.clone() };
        let bus = self.clone();
        let following = async move {
            if !bus.is_sharded() {
                return std::future::pending().await;
            }
            loop {
                let known = sender.borrow().clone();
                match bus.look(&known).await {
                    Ok(map) if map == *known => {}
                    Ok(map) => {
                        tracing::info!(
                            nodes = map.nodes().len(),
                            whole = map.is_whole(),
                            "the cluster's slots"
                        );
                        sender.send_replace(Arc::new(map));
                    }
                    Err(error) => tracing::warn!(%error, "cannot ask the cluster who owns what"),
                }
                sleep(LOOK_APART).await;
                let next = Instant::now() + LOOK_EVERY.mul_f64(rand::random_range(1.0..1.5));
                tokio::select! {
                    () = sleep_until(next) => {}
                    () = doubted.notified() => {}
                }
            }
        };
        (maps, following)
    }
}

/// The cluster's map as it is known now.
#[derive(Clone)]
pub struct Maps {
    maps: watch::Receiver<Arc<Map>>,
    doubted: Arc<Notify>,
}

impl Maps {
    pub fn now(&mut self) -> Arc<Map> {
        self.maps.borrow_and_update().clone()
    }

    /// When there is another than [`Self::now`] has told.
    pub async fn changed(&mut self) {
        if self.maps.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Somebody was sent elsewhere, or nobody answered: look again soon.
    pub fn doubt(&self) {
        self.doubted.notify_one();
    }
}

/// Where `MOVED` or `ASK` sends who asked this node.
pub fn sent_to(error: &RedisError, by: &Node) -> Option<Node> {
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

/// Whether Redis says no to who we are, which waiting does not mend.
pub fn is_refusal(error: &RedisError) -> bool {
    use redis::ServerErrorKind::NoPerm;
    matches!(error.kind(), ErrorKind::AuthenticationFailed | ErrorKind::Server(NoPerm))
        || matches!(error.code(), Some("WRONGPASS" | "NOAUTH" | "NOPERM"))
}

/// Whether the server answered, though with an error: the connection to it lives.
pub fn is_answer(error: &RedisError) -> bool {
    matches!(error.kind(), ErrorKind::Server(_) | ErrorKind::Extension)
}

fn servers(p: &mut Problems, name: &str, list: &str) -> Option<Vec<ConnectionInfo>> {
    let urls = list.split(',').map(str::trim).filter(|url| !url.is_empty());
    // The error may hold the URL, and that a password.
    let infos = urls.map(|url| url.into_connection_info().map(with_resp3)).collect::<RedisResult<_>>();
    infos
        .map_err(|_| {
            p.add(format!(
                "{name} must have the form redis://[user:password@]host:port, or rediss:// for TLS"
            ));
        })
        .ok()
}

/// So that messages and command replies share a connection.
fn with_resp3(info: ConnectionInfo) -> ConnectionInfo {
    let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    info.set_redis_settings(settings)
}

/// Another server that is spoken to in the same way: TLS or not, user, password.
fn at(like: &ConnectionInfo, host: &str, port: u16) -> ConnectionInfo {
    let addr = match like.addr().clone() {
        ConnectionAddr::TcpTls { insecure, tls_params, .. } => {
            ConnectionAddr::TcpTls { host: host.to_owned(), port, insecure, tls_params }
        }
        _ => ConnectionAddr::Tcp(host.to_owned(), port),
    };
    like.clone().set_addr(addr)
}

/// For who is asked where things are: no more than a moment.
async fn briefly(info: ConnectionInfo) -> RedisResult<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(ANSWER_WITHIN))
        .set_response_timeout(Some(ANSWER_WITHIN));
    Client::open(info)?.get_multiplexed_async_connection_with_config(&config).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(topology: &str, url: &str, sentinels: &str) -> Option<String> {
        let mut problems = Problems::default();
        let bus = Bus::from_settings(&mut problems, topology, Some(url), sentinels);
        problems.finish(|| bus.map(drop)).err().map(|problems| problems.to_string())
    }

    #[test]
    fn what_cannot_be_is_refused_and_no_password_is_repeated() {
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
            assert!(said.contains("REDIS_") && !said.contains("hunter2"), "{topology} {url}: {said}");
        }
    }
}
