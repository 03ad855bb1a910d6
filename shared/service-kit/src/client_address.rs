//! The address of the client behind our proxies.
//!
//! Each proxy appends the address of its peer to `X-Forwarded-For`. The header is read from its right end and only while the
//! addresses are trusted proxies, because a client can forge everything further left. It is ignored if the peer is not a trusted
//! proxy.
//!
//! `Forwarded` (RFC 7239) is not read: a proxy sets one of the two headers and passes the other through from the client.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use http::HeaderMap;
use ipnet::IpNet;
use thiserror::Error;

const FORWARDED_FOR: &str = "x-forwarded-for";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientAddress(pub IpAddr);

/// The networks of our own proxies. If empty, the peer is the client.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustedProxies(Vec<IpNet>);

#[derive(Debug, Error)]
#[error("it must be a list of networks or addresses, such as 10.0.0.0/8,fd00::/8,192.0.2.1")]
pub struct InvalidNetworks;

impl FromStr for TrustedProxies {
    type Err = InvalidNetworks;

    fn from_str(text: &str) -> Result<Self, InvalidNetworks> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let networks = parts.map(|part| {
            let address = || part.parse::<IpAddr>().map(IpNet::from);
            part.parse().or_else(|_| address())
        });
        networks.collect::<Result<_, _>>().map(Self).map_err(|_| InvalidNetworks)
    }
}

impl TrustedProxies {
    pub fn trusts(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.contains(&address))
    }

    /// The nearest address that is not a trusted proxy. If all are trusted, the farthest; if a trusted proxy sent an invalid
    /// address, that proxy.
    pub fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let mut nearest = peer.to_canonical();
        let hops = headers.get_all(FORWARDED_FOR).iter().rev();
        // A value that is not text ends the walk.
        let mut hops = hops.flat_map(|value| value.to_str().unwrap_or_default().rsplit(','));
        while self.trusts(nearest) {
            let Some(address) = hops.next().and_then(hop) else { break };
            nearest = address;
        }
        nearest
    }

    /// Whether an untrusted peer forwards a request: a forged header, or an ingress that is missing in the settings.
    pub fn is_from_untrusted_proxy(&self, peer: IpAddr, headers: &HeaderMap) -> bool {
        headers.contains_key(FORWARDED_FOR) && !self.trusts(peer)
    }
}

/// `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:80`.
fn hop(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse::<Ipv6Addr>().ok();
    let address = text
        .parse::<IpAddr>()
        .ok()
        .or_else(|| text.parse::<SocketAddr>().ok().map(|address| address.ip()))
        .or_else(|| bracketed().map(IpAddr::V6))?;
    Some(address.to_canonical())
}

/// The network that counts as one client: an IPv6 customer has at least a /64.
pub fn client_network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(trusted: &str, peer: &str, forwarded_for: &[&str]) -> String {
        let mut headers = HeaderMap::new();
        for value in forwarded_for {
            headers.append(FORWARDED_FOR, http::HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        trusted.parse::<TrustedProxies>().unwrap().client(peer.parse().unwrap(), &headers).to_string()
    }

    #[test]
    fn client_is_the_nearest_untrusted_address() {
        const OURS: &str = "10.0.0.0/8, 127.0.0.1,fd00::/8";
        for (peer, forwarded_for, expected) in [
            // The peer is not a trusted proxy, so it is the client.
            ("203.0.113.9", &[][..], "203.0.113.9"),
            ("203.0.113.9", &["198.51.100.1"], "203.0.113.9"),
            ("11.0.0.1", &["10.0.0.1"], "11.0.0.1"),
            ("127.0.0.2", &["198.51.100.1"], "127.0.0.2"),
            // One proxy, two, three.
            ("10.0.0.1", &["198.51.100.1"], "198.51.100.1"),
            ("10.0.0.1", &["198.51.100.1, 10.9.9.9"], "198.51.100.1"),
            ("127.0.0.1", &["198.51.100.1,10.9.9.9 ,fd00::5"], "198.51.100.1"),
            // Several headers are one list.
            ("10.0.0.1", &["198.51.100.1", "10.9.9.9"], "198.51.100.1"),
            ("10.0.0.1", &["192.0.2.7, 198.51.100.1", "10.9.9.9, 10.1.1.1"], "198.51.100.1"),
            // The client made up the entries left of the one that our proxy saw.
            ("10.0.0.1", &["192.0.2.66, 198.51.100.1"], "198.51.100.1"),
            ("10.0.0.1", &["10.0.0.3, 192.0.2.66", "198.51.100.1"], "198.51.100.1"),
            ("10.0.0.1", &["garbage, 198.51.100.1"], "198.51.100.1"),
            // Ports and brackets.
            ("10.0.0.1", &["198.51.100.1:55555"], "198.51.100.1"),
            ("10.0.0.1", &["2001:db8::1"], "2001:db8::1"),
            ("10.0.0.1", &["[2001:db8::1]"], "2001:db8::1"),
            ("10.0.0.1", &["[2001:db8::1]:443 , [fd00::1]:80"], "2001:db8::1"),
            // IPv4 in IPv6, as sockets that listen on both give it.
            ("::ffff:10.0.0.1", &["::ffff:198.51.100.1"], "198.51.100.1"),
            ("::ffff:203.0.113.9", &["198.51.100.1"], "203.0.113.9"),
            // A proxy that sends an invalid entry is the last known address; entries left of it are not trusted.
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &[""], "10.0.0.1"),
            ("10.0.0.1", &["unknown"], "10.0.0.1"),
            ("10.0.0.1", &["198.51.100.1, unknown"], "10.0.0.1"),
            ("10.0.0.1", &["198.51.100.1,"], "10.0.0.1"),
            ("10.0.0.1", &["198.51.100.1, unknown, 10.2.2.2"], "10.2.2.2"),
            ("10.0.0.1", &["198.51.100.1", "\u{e9}"], "10.0.0.1"),
            ("10.0.0.1", &["300.1.1.1"], "10.0.0.1"),
            ("10.0.0.1", &["[198.51.100.1]"], "10.0.0.1"),
            ("10.0.0.1", &["198.51.100.1:99999"], "10.0.0.1"),
            // An internal client: the farthest address that our proxies report.
            ("10.0.0.1", &["10.5.5.5, 10.9.9.9"], "10.5.5.5"),
        ] {
            assert_eq!(client(OURS, peer, forwarded_for), expected, "{peer} {forwarded_for:?}");
        }
        assert_eq!(client("", "10.0.0.1", &["198.51.100.1"]), "10.0.0.1", "nobody is trusted by default");
        assert_eq!(client("0.0.0.0/0", "10.0.0.1", &["192.0.2.1, 198.51.100.1"]), "192.0.2.1");
    }

    #[test]
    fn networks_are_read_and_nothing_else() {
        for good in ["", " , ", "10.0.0.0/8", "10.0.0.1", "fd00::/8,::1, 10.0.0.0/8"] {
            assert!(good.parse::<TrustedProxies>().is_ok(), "{good}");
        }
        for bad in ["10.0.0.0/33", "10/8", "localhost", "10.0.0.0/8;fd00::/8", "*", "10.0.0.1:80"] {
            assert!(bad.parse::<TrustedProxies>().is_err(), "{bad}");
        }
    }

    #[test]
    fn untrusted_proxy_is_detected() {
        let proxies: TrustedProxies = "10.0.0.0/8".parse().unwrap();
        let forwarded = HeaderMap::from_iter([(
            http::HeaderName::from_static(FORWARDED_FOR),
            http::HeaderValue::from_static("192.0.2.1"),
        )]);
        let [ours, other] = ["10.0.0.1", "172.16.0.1"].map(|address| address.parse().unwrap());
        assert!(proxies.is_from_untrusted_proxy(other, &forwarded));
        assert!(!proxies.is_from_untrusted_proxy(ours, &forwarded));
        assert!(!proxies.is_from_untrusted_proxy(other, &HeaderMap::new()));
    }

    #[test]
    fn an_ipv6_64_is_one_client() {
        let one = |address: &str| client_network(address.parse().unwrap()).to_string();
        assert_eq!(one("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(one("2001:db8:1:2::"), "2001:db8:1:2::");
        assert_ne!(one("2001:db8:1:3::"), one("2001:db8:1:2::"));
        assert_eq!(one("192.0.2.1"), "192.0.2.1");
        assert_eq!(one("::ffff:192.0.2.1"), "192.0.2.1");
    }
}
