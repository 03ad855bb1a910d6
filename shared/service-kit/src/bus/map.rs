//! Which node of a cluster owns which names, by slot.

use redis::{ConnectionAddr, ConnectionInfo, RedisResult, Value};

use super::{Node, briefly};

const SLOTS: usize = 16_384;
/// In place of an index: nobody owns the slot.
const NOBODY: u16 = u16::MAX;

/// Where a name is kept on a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(u16);

impl Slot {
    pub fn of(name: &str) -> Self {
        Self(slot(name.as_bytes()))
    }
}

/// Which node owns which names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Map {
    /// Sorted.
    nodes: Vec<Node>,
    /// By slot, an index into `nodes`. Empty where one owns everything, or nothing is known.
    owners: Vec<u16>,
}

impl Map {
    /// One server that owns everything.
    pub fn of_one() -> Self {
        Self { nodes: vec![Node::Only], owners: Vec::new() }
    }

    /// Those that own something.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Whether every name has an owner.
    pub fn is_whole(&self) -> bool {
        !self.nodes.is_empty() && !self.owners.contains(&NOBODY)
    }

    pub fn owner(&self, name: &str) -> Option<&Node> {
        self.owner_of(Slot::of(name))
    }

    pub fn owner_of(&self, Slot(slot): Slot) -> Option<&Node> {
        match self.owners.get(usize::from(slot)) {
            Some(&owner) => self.nodes.get(usize::from(owner)),
            None => self.nodes.first(),
        }
    }

    /// The first of these names that this node owns.
    pub fn name_of(&self, node: &Node, names: impl Iterator<Item = String>) -> Option<String> {
        // A node with a single slot is met every 16,384 names.
        names.take(SLOTS * 16).find(|name| self.owner(name) == Some(node))
    }

    /// From `(first slot, last slot, owner)`.
    pub fn of_ranges(ranges: Vec<(u16, u16, Node)>) -> Self {
        let mut nodes: Vec<_> = ranges.iter().map(|(.., node)| node.clone()).collect();
        nodes.sort();
        nodes.dedup();
        let mut owners = vec![NOBODY; SLOTS];
        for (first, last, node) in ranges {
            let index = nodes.binary_search(&node).ok().and_then(|index| u16::try_from(index).ok());
            if let Some(range) = owners.get_mut(usize::from(first)..=usize::from(last)) {
                range.fill(index.unwrap_or(NOBODY));
            }
        }
        Self { nodes, owners }
    }
}

/// What one node says.
pub(super) struct View {
    pub(super) map: Map,
    in_order: bool,
    epoch: u64,
}

impl View {
    pub(super) async fn ask(of: &ConnectionInfo) -> RedisResult<Self> {
        let mut connection = briefly(of.clone()).await?;
        let mut ask = redis::pipe();
        ask.cmd("CLUSTER").arg("INFO").cmd("CLUSTER").arg("SLOTS");
        let (info, slots): (String, Value) = ask.query_async(&mut connection).await?;
        let said =
            |name: &str| info.lines().find_map(|line| line.trim_end().strip_prefix(name)?.strip_prefix(':'));
        let host = match of.addr() {
            ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. } => host,
            _ => "",
        };
        Ok(Self {
            map: Map::of_ranges(ranges(&slots, host)),
            in_order: said("cluster_state") == Some("ok"),
            epoch: said("cluster_current_epoch").and_then(|epoch| epoch.parse().ok()).unwrap_or(0),
        })
    }

    /// Larger is newer. A node that is cut off from the others may remember what is long over.
    pub(super) fn age(&self) -> (bool, u64) {
        (self.in_order, self.epoch)
    }
}

/// The answer to `CLUSTER SLOTS`: of each range its first node, which is the one that is not a replica.
fn ranges(slots: &Value, asked: &str) -> Vec<(u16, u16, Node)> {
    let Value::Array(ranges) = slots else { return Vec::new() };
    let range = |range: &Value| {
        let Value::Array(range) = range else { return None };
        let [Value::Int(first), Value::Int(last), Value::Array(node), ..] = range.as_slice() else {
            return None;
        };
        let [host, Value::Int(port), ..] = node.as_slice() else { return None };
        let host = match host {
            Value::BulkString(host) => std::str::from_utf8(host).ok()?,
            _ => "",
        };
        // A node that does not know its own name is where it was asked.
        let host = if matches!(host, "" | "?") { asked } else { host };
        let port = u16::try_from(*port).ok()?;
        Some((u16::try_from(*first).ok()?, u16::try_from(*last).ok()?, Node::At(host.into(), port)))
    };
    ranges.iter().filter_map(range).collect()
}

/// CRC16 (XMODEM) of the name, or of what is in its first braces.
fn slot(name: &[u8]) -> u16 {
    let tag = name.iter().position(|byte| *byte == b'{').and_then(|open| {
        let rest = &name[open + 1..];
        let length = rest.iter().position(|byte| *byte == b'}').filter(|length| *length > 0)?;
        Some(&rest[..length])
    });
    let crc = tag.unwrap_or(name).iter().fold(0u16, |crc, byte| {
        (0..8).fold(crc ^ (u16::from(*byte) << 8), |crc, _| {
            if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 }
        })
    });
    crc % SLOTS as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `CLUSTER KEYSLOT` says.
    #[test]
    fn a_name_has_the_slot_that_redis_gives_it() {
        for (name, wanted) in [
            ("123456789", 12_739),
            ("user:1", 10_778),
            ("{user}:1", 5_474),
            ("a{user}:1", 5_474),
            ("a{b}{c}", 3_300),
            ("{}user:1", 8_914),
            ("{unclosed", 470),
        ] {
            assert_eq!(slot(name.as_bytes()), wanted, "{name}");
        }
    }

    fn text(text: &str) -> Value {
        Value::BulkString(text.into())
    }

    fn range(first: i64, last: i64, host: Value, port: i64) -> Value {
        let node = |host, port| Value::Array(vec![host, Value::Int(port), text("id"), Value::Array(vec![])]);
        Value::Array(vec![Value::Int(first), Value::Int(last), node(host, port), node(text("replica"), 1)])
    }

    #[test]
    fn a_map_is_read_from_any_nodes_answer() {
        let slots = Value::Array(vec![
            range(12_000, 16_383, text("b"), 2),
            range(0, 5_999, text(""), 1),
            range(6_000, 11_999, Value::Nil, 3),
        ]);
        let map = Map::of_ranges(ranges(&slots, "asked"));
        let (one, two, three) =
            (Node::At("asked".into(), 1), Node::At("b".into(), 2), Node::At("asked".into(), 3));
        assert_eq!(map.nodes(), [one.clone(), three.clone(), two.clone()]);
        assert!(map.is_whole());
        assert_eq!(map.owner("123456789"), Some(&two));
        let names = || (0..).map(|number| format!("beat:{number}"));
        for node in [one, two, three] {
            let name = map.name_of(&node, names()).expect("each owns thousands of slots");
            assert_eq!(map.owner(&name), Some(&node));
        }
        assert_eq!(map.name_of(&Node::At("none".into(), 1), names()), None);
    }

    #[test]
    fn what_nobody_owns_has_no_owner() {
        let map = Map::of_ranges(ranges(&Value::Array(vec![range(0, 12_738, text("a"), 1)]), "asked"));
        assert!(!map.is_whole());
        assert_eq!(map.owner("123456789"), None);
        assert!(!Map::default().is_whole());
        assert_eq!(Map::default().owner("x"), None);
        assert!(Map::of_one().is_whole());
        assert_eq!(Map::of_one().owner("x"), Some(&Node::Only));
        assert_eq!(Map::of_ranges(ranges(&Value::Nil, "asked")).owner("x"), None);
    }
}
