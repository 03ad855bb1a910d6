//! The connection limits of a listener, in total and per client address. At a limit, the longest idle connection is closed.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex},
};

use prometheus_client::metrics::gauge::Gauge;
use tokio::{sync::Notify, time::Instant};

use super::{Limits, lock, watch::Watch};
use crate::client_address::{TrustedProxies, client_network};

pub(super) struct Connections {
    limit: usize,
    per_address: Option<usize>,
    proxies: TrustedProxies,
    open: Mutex<Open>,
    count: Gauge,
    /// A connection has ended or has become idle: a new one that found the listener full tries again.
    pub(super) changed: Arc<Notify>,
}

#[derive(Default)]
struct Open {
    next: u64,
    connections: HashMap<u64, OpenConnection>,
    by_address: HashMap<IpAddr, usize>,
}

struct OpenConnection {
    /// `None` for a proxy, which carries many clients.
    address: Option<IpAddr>,
    watch: Arc<Watch>,
}

pub(super) struct ConnectionPermit {
    connections: Arc<Connections>,
    number: u64,
}

#[derive(Debug, PartialEq, Eq)]
enum Refused {
    Full,
    Address,
}

impl Connections {
    pub(super) fn new(limits: &Limits, count: Gauge) -> Self {
        let per_address = (limits.per_address > 0).then_some(limits.per_address);
        Self {
            limit: limits.connections,
            // One address cannot fill the listener, even if the setting would allow it.
            per_address: per_address.map(|bound| bound.min(limits.connections / 2).max(1)),
            proxies: limits.proxies.clone(),
            open: Mutex::default(),
            count,
            changed: Arc::default(),
        }
    }

    /// Waits while the listener is full. `None`: the address has reached its limit.
    pub(super) async fn permit(
        self: &Arc<Self>,
        peer: IpAddr,
        watch: &Arc<Watch>,
    ) -> Option<ConnectionPermit> {
        loop {
            match self.admit(peer, watch) {
                Ok(permit) => return Some(permit),
                Err(Refused::Address) => return None,
                Err(Refused::Full) => self.changed.notified().await,
            }
        }
    }

    fn admit(self: &Arc<Self>, peer: IpAddr, watch: &Arc<Watch>) -> Result<ConnectionPermit, Refused> {
        let address = (!self.proxies.trusts(peer)).then(|| client_network(peer));
        let mut open = lock(&self.open);
        if let (Some(address), Some(bound)) = (address, self.per_address)
            && open.by_address.get(&address).is_some_and(|count| *count >= bound)
            && !open.make_room(Some(address))
        {
            return Err(Refused::Address);
        }
        if open.connections.len() >= self.limit && !open.make_room(None) {
            return Err(Refused::Full);
        }
        let number = open.next;
        open.next += 1;
        if let Some(address) = address {
            *open.by_address.entry(address).or_default() += 1;
        }
        open.connections.insert(number, OpenConnection { address, watch: watch.clone() });
        self.count.set(open.connections.len().cast_signed() as i64);
        Ok(ConnectionPermit { connections: self.clone(), number })
    }
}

impl Open {
    /// Closes the longest idle connection, of this address or of any, and stops counting it. `false`: none is idle.
    fn make_room(&mut self, of: Option<IpAddr>) -> bool {
        let candidates =
            self.connections.iter().filter(|(_, connection)| of.is_none() || connection.address == of);
        let idle =
            candidates.filter_map(|(number, connection)| Some((connection.watch.idle_since()?, *number)));
        let longest: Option<(Instant, u64)> = idle.min();
        let Some(connection) = longest.and_then(|(_, number)| self.remove(number)) else { return false };
        connection.watch.makes_room.notify_one();
        true
    }

    fn remove(&mut self, number: u64) -> Option<OpenConnection> {
        let connection = self.connections.remove(&number)?;
        if let Some(address) = connection.address
            && let Some(count) = self.by_address.get_mut(&address)
        {
            *count -= 1;
            if *count == 0 {
                self.by_address.remove(&address);
            }
        }
        Some(connection)
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut open = lock(&self.connections.open);
        // A closed idle connection is not in the map any more.
        open.remove(self.number);
        self.connections.count.set(open.connections.len().cast_signed() as i64);
        drop(open);
        self.connections.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::watch::Phase;

    fn connections(connections: usize, per_address: usize) -> Arc<Connections> {
        let proxies = "10.0.0.0/8".parse().unwrap();
        let limits = Limits { connections, per_address, proxies, ..Limits::default() };
        Arc::new(Connections::new(&limits, Gauge::default()))
    }

    fn open(connections: &Arc<Connections>, peer: &str) -> Result<(ConnectionPermit, Arc<Watch>), Refused> {
        let watch = Arc::new(Watch::default());
        connections.admit(peer.parse().unwrap(), &watch).map(|permit| (permit, watch))
    }

    #[test]
    fn an_address_is_limited_and_a_proxy_is_not() {
        let connections = connections(100, 2);
        let first = open(&connections, "192.0.2.1").ok().unwrap();
        let _second = open(&connections, "::ffff:192.0.2.1").ok().unwrap();
        assert_eq!(open(&connections, "192.0.2.1").err(), Some(Refused::Address));
        let _another = open(&connections, "192.0.2.2").ok().unwrap();
        let _proxied: Vec<_> = (0..10).map(|_| open(&connections, "10.1.2.3").ok().unwrap()).collect();
        // One network of IPv6 is one client.
        let _house = ["2001:db8::1", "2001:db8::2"].map(|peer| open(&connections, peer).ok().unwrap());
        assert_eq!(open(&connections, "2001:db8::3").err(), Some(Refused::Address));
        drop(first);
        assert!(open(&connections, "192.0.2.1").is_ok());
    }

    #[test]
    fn one_address_cannot_fill_a_listener() {
        let connections = connections(4, 1_000);
        let _half: Vec<_> = (0..2).map(|_| open(&connections, "192.0.2.1").ok().unwrap()).collect();
        assert_eq!(open(&connections, "192.0.2.1").err(), Some(Refused::Address));
    }

    #[test]
    fn without_a_limit_one_address_may_fill_a_listener() {
        let connections = connections(3, 0);
        let _all: Vec<_> = (0..3).map(|_| open(&connections, "192.0.2.1").ok().unwrap()).collect();
        assert_eq!(open(&connections, "192.0.2.2").err(), Some(Refused::Full));
    }

    #[tokio::test]
    async fn the_longest_idle_connection_is_closed_first() {
        let connections = connections(3, 0);
        let opened: Vec<_> = (0..3).map(|_| open(&connections, "192.0.2.1").ok().unwrap()).collect();
        for number in [1, 2, 0] {
            opened[number].1.enter(Phase::Idle);
        }
        let _new = open(&connections, "192.0.2.2").ok().unwrap();
        opened[1].1.makes_room.notified().await;
        let _newer = open(&connections, "192.0.2.2").ok().unwrap();
        opened[2].1.makes_room.notified().await;
        opened[0].1.enter(Phase::Serving);
        let mut opened = opened.into_iter();
        let _first = opened.next();
        drop(opened);
        // Connections that were closed to make room free nothing more when they end.
        assert_eq!(open(&connections, "192.0.2.2").err(), Some(Refused::Full));
    }
}
