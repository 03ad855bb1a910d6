//! The server that sentinels name. All of them are asked, each time: one that was cut off may still name the one before.

use futures_util::future::join_all;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, ErrorKind, RedisError, RedisResult, Value,
    aio::MultiplexedConnection,
};

use super::{at, briefly, is_answer};

pub(super) struct Sentinels {
    /// What they call the server.
    name: String,
    /// How to speak to it.
    like: ConnectionInfo,
    sentinels: Vec<ConnectionInfo>,
}

impl Sentinels {
    /// The URL's host is the name.
    pub(super) fn new(url: ConnectionInfo, sentinels: Vec<ConnectionInfo>) -> Self {
        let name = match url.addr() {
            ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. } => host.clone(),
            other => other.to_string(),
        };
        Self { name, like: url, sentinels }
    }

    /// To the one that most of them name, if it takes itself for that; else to the next.
    pub(super) async fn connect(&self, config: &AsyncConnectionConfig) -> RedisResult<MultiplexedConnection> {
        let mut named: Vec<((String, u16), usize)> = Vec::new();
        let mut failed = RedisError::from((ErrorKind::Io, "no sentinel knows the server by this name"));
        for answer in join_all(self.sentinels.iter().map(|sentinel| self.ask(sentinel))).await {
            match answer {
                Ok(Some(address)) => match named.iter_mut().find(|(other, _)| *other == address) {
                    Some((_, votes)) => *votes += 1,
                    None => named.push((address, 1)),
                },
                Ok(None) => {}
                Err(error) => failed = error,
            }
        }
        named.sort_by_key(|(_, votes)| std::cmp::Reverse(*votes));
        for ((host, port), _) in named {
            match self.master(&host, port, config).await {
                Ok(connection) => return Ok(connection),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    async fn ask(&self, sentinel: &ConnectionInfo) -> RedisResult<Option<(String, u16)>> {
        let mut connection = briefly(sentinel.clone()).await?;
        let mut ask = redis::cmd("SENTINEL");
        ask.arg("GET-MASTER-ADDR-BY-NAME").arg(&self.name).query_async(&mut connection).await
    }

    async fn master(
        &self,
        host: &str,
        port: u16,
        config: &AsyncConnectionConfig,
    ) -> RedisResult<MultiplexedConnection> {
        let client = Client::open(at(&self.like, host, port))?;
        let mut connection = client.get_multiplexed_async_connection_with_config(config).await?;
        match redis::cmd("ROLE").query_async::<Vec<Value>>(&mut connection).await {
            Ok(role) if role.first() == Some(&Value::BulkString(b"master".into())) => Ok(connection),
            // It does not say: what sentinels say counts, and what comes of it.
            Err(error) if is_answer(&error) => Ok(connection),
            Err(error) => Err(error),
            Ok(_) => Err(RedisError::from((ErrorKind::Io, "what sentinels name is a replica"))),
        }
    }
}
