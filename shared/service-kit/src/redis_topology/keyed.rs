//! Commands on single keys, each on the server that owns its key.
//!
//! Bounded in time and in connections: one for each server, opened when first needed, by one caller at a time. After a failure to connect,
//! all callers are refused for a moment; they may try again later.

use std::{collections::HashMap, sync::Arc, time::Duration};

use redis::{
    AsyncConnectionConfig, Cmd, ErrorKind, FromRedisValue, RedisError, RedisResult,
    ServerErrorKind::{Ask, BusyLoading, ClusterDown, MasterDown, Moved, ReadOnly, TryAgain},
    aio::MultiplexedConnection,
};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};

use super::{Node, RedisTopology, SlotMap, redirect_target};

/// Limits an answer.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Limits connecting, with the search for the server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Between a failure to connect and the next attempt.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Attempts of one command: the slot map may be outdated, and a server may have been restarted.
const ATTEMPTS: usize = 3;

/// Cheap to clone.
#[derive(Clone)]
pub struct KeyedRedis {
    topology: RedisTopology,
    state: Arc<Mutex<Connected>>,
}

#[derive(Default)]
struct Connected {
    /// `None`: to be fetched.
    map: Option<SlotMap>,
    nodes: HashMap<Node, MultiplexedConnection>,
    failed_at: Option<Instant>,
}

impl KeyedRedis {
    pub fn new(topology: RedisTopology) -> Self {
        Self { topology, state: Arc::default() }
    }

    /// Runs a command whose only key is `key`. It may run twice.
    pub async fn query<T: FromRedisValue>(&self, key: &str, command: &Cmd) -> RedisResult<T> {
        let (mut asked, mut attempt) = (None, 0);
        loop {
            attempt += 1;
            let (node, mut connection) = self.connection(key, asked.clone()).await?;
            let answer = if asked.take().is_some() {
                let mut pipeline = redis::pipe();
                pipeline.cmd("ASKING").ignore().add_command(command.clone());
                pipeline.query_async::<(T,)>(&mut connection).await.map(|(answer,)| answer)
            } else {
                command.query_async(&mut connection).await
            };
            let error = match answer {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let (reconnect, retry) = match error.kind() {
                // The slot is being migrated to another node.
                ErrorKind::Server(Ask) => (false, true),
                // The slot has moved, or the server has become a replica.
                ErrorKind::Server(Moved | ReadOnly) => (true, true),
                ErrorKind::Server(BusyLoading | TryAgain | ClusterDown | MasterDown) => (true, false),
                ErrorKind::Server(_) | ErrorKind::Extension => (false, false),
                _ => (true, !error.is_timeout()),
            };
            if reconnect {
                self.forget(&node).await;
            }
            if !retry || attempt == ATTEMPTS {
                return Err(error);
            }
            asked = redirect_target(&error, &node).filter(|_| !reconnect);
        }
    }

    async fn connection(&self, key: &str, at: Option<Node>) -> RedisResult<(Node, MultiplexedConnection)> {
        let mut state = self.state.lock().await;
        if state.failed_at.is_some_and(|failed| failed.elapsed() < RETRY_AFTER) {
            return Err(RedisError::from((ErrorKind::Io, "the last attempt to connect has just failed")));
        }
        let slow = |_| RedisError::from((ErrorKind::Io, "no connection in time"));
        let connected = timeout(CONNECT_TIMEOUT, self.connect(&mut state, key, at)).await;
        let connected = connected.map_err(slow).flatten();
        state.failed_at = connected.is_err().then(Instant::now);
        connected
    }

    async fn connect(
        &self,
        state: &mut Connected,
        key: &str,
        at: Option<Node>,
    ) -> RedisResult<(Node, MultiplexedConnection)> {
        let node = match (at, &mut state.map) {
            (Some(node), _) => node,
            (None, Some(map)) => node_of(map, key)?,
            (None, map) => {
                node_of(map.insert(self.topology.fetch_slot_map(&SlotMap::default()).await?), key)?
            }
        };
        if let Some(connection) = state.nodes.get(&node) {
            return Ok((node, connection.clone()));
        }
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(TIMEOUT))
            .set_response_timeout(Some(TIMEOUT));
        // A node that cannot be reached may have lost its slots.
        let map = state.map.take();
        let connection = self.topology.connect(&node, &config).await?;
        state.map = map;
        state.nodes.insert(node.clone(), connection.clone());
        Ok((node, connection))
    }

    async fn forget(&self, node: &Node) {
        let mut state = self.state.lock().await;
        state.map = None;
        state.nodes.remove(node);
    }
}

fn node_of(map: &SlotMap, key: &str) -> RedisResult<Node> {
    let absent = || RedisError::from((ErrorKind::Io, "no node owns the slot of the key"));
    map.node_of(key).cloned().ok_or_else(absent)
}
