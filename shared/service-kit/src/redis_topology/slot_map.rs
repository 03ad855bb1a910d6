//! The slots of a Redis cluster and the nodes that own them.

use redis::{ConnectionAddr, ConnectionInfo, RedisResult, Value};

use super::{Node, connect_for_query};

const SLOTS: usize = 16_384;
/// In place of an index: no node owns the slot.
const UNASSIGNED: u16 = u16::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(u16);

impl Slot {
    pub fn of(name: &str) -> Self {
        Self(slot(name.as_bytes()))
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SlotMap {
    /// Sorted.
    nodes: Vec<Node>,
    /// By slot, an index into `nodes`. Empty if one node owns every slot, or nothing is known.
    node_by_slot: Vec<u16>,
}

impl SlotMap {
    pub fn single_node() -> Self {
        Self { nodes: vec![Node::Only], node_by_slot: Vec::new() }
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub fn covers_all_slots(&self) -> bool {
        !self.nodes.is_empty() && !self.node_by_slot.contains(&UNASSIGNED)
    }

    pub fn node_of(&self, name: &str) -> Option<&Node> {
        self.node_of_slot(Slot::of(name))
    }

    pub fn node_of_slot(&self, Slot(slot): Slot) -> Option<&Node> {
        match self.node_by_slot.get(usize::from(slot)) {
            Some(&index) => self.nodes.get(usize::from(index)),
            None => self.nodes.first(),
        }
    }

    /// The first of `names` whose slot this node owns.
    pub fn first_name_on(&self, node: &Node, names: impl Iterator<Item = String>) -> Option<String> {
        // Even a node with a single slot owns one name in 16,384.
        names.take(SLOTS * 16).find(|name| self.node_of(name) == Some(node))
    }

    /// From `(first slot, last slot, node)`.
    pub fn from_ranges(ranges: Vec<(u16, u16, Node)>) -> Self {
        let mut nodes: Vec<_> = ranges.iter().map(|(.., node)| node.clone()).collect();
        nodes.sort();
        nodes.dedup();
        let mut node_by_slot = vec![UNASSIGNED; SLOTS];
        for (first, last, node) in ranges {
            let index = nodes.binary_search(&node).ok().and_then(|index| u16::try_from(index).ok());
            if let Some(range) = node_by_slot.get_mut(usize::from(first)..=usize::from(last)) {
                range.fill(index.unwrap_or(UNASSIGNED));
            }
        }
        Self { nodes, node_by_slot }
    }
}

pub(super) struct ReportedSlotMap {
    pub(super) map: SlotMap,
    state_ok: bool,
    epoch: u64,
}

impl ReportedSlotMap {
    pub(super) async fn fetch(from: &ConnectionInfo) -> RedisResult<Self> {
        let mut connection = connect_for_query(from.clone()).await?;
        let mut query = redis::pipe();
        query.cmd("CLUSTER").arg("INFO").cmd("CLUSTER").arg("SLOTS");
        let (info, slots): (String, Value) = query.query_async(&mut connection).await?;
        let field =
            |name: &str| info.lines().find_map(|line| line.trim_end().strip_prefix(name)?.strip_prefix(':'));
        let host = match from.addr() {
            ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. } => host,
            _ => "",
        };
        Ok(Self {
            map: SlotMap::from_ranges(ranges(&slots, host)),
            state_ok: field("cluster_state") == Some("ok"),
            epoch: field("cluster_current_epoch").and_then(|epoch| epoch.parse().ok()).unwrap_or(0),
        })
    }

    /// Larger is newer. A node that is cut off from the others may report an old map.
    pub(super) fn version(&self) -> (bool, u64) {
        (self.state_ok, self.epoch)
    }
}

/// The answer of `queried` to `CLUSTER SLOTS`. The first node of each range is its primary.
fn ranges(slots: &Value, queried: &str) -> Vec<(u16, u16, Node)> {
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
        // A node that does not know its own host name.
        let host = if matches!(host, "" | "?") { queried } else { host };
        let port = u16::try_from(*port).ok()?;
        Some((u16::try_from(*first).ok()?, u16::try_from(*last).ok()?, Node::At(host.into(), port)))
    };
    ranges.iter().filter_map(range).collect()
}

/// CRC16 (XMODEM) of the name, or of its hash tag in braces.
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

    /// Expected values by `CLUSTER KEYSLOT`.
    #[test]
    fn slots_are_those_that_redis_computes() {
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
    fn slot_map_is_read_from_any_nodes_answer() {
        let slots = Value::Array(vec![
            range(12_000, 16_383, text("b"), 2),
            range(0, 5_999, text(""), 1),
            range(6_000, 11_999, Value::Nil, 3),
        ]);
        let map = SlotMap::from_ranges(ranges(&slots, "a-host"));
        let (one, two, three) =
            (Node::At("a-host".into(), 1), Node::At("b".into(), 2), Node::At("a-host".into(), 3));
        assert_eq!(map.nodes(), [one.clone(), three.clone(), two.clone()]);
        assert!(map.covers_all_slots());
        assert_eq!(map.node_of("123456789"), Some(&two));
        let names = || (0..).map(|number| format!("probe:{number}"));
        for node in [one, two, three] {
            let name = map.first_name_on(&node, names()).expect("each owns thousands of slots");
            assert_eq!(map.node_of(&name), Some(&node));
        }
        assert_eq!(map.first_name_on(&Node::At("none".into(), 1), names()), None);
    }

    #[test]
    fn unassigned_slots_have_no_node() {
        let map = SlotMap::from_ranges(ranges(&Value::Array(vec![range(0, 12_738, text("a"), 1)]), "a-host"));
        assert!(!map.covers_all_slots());
        assert_eq!(map.node_of("123456789"), None);
        assert!(!SlotMap::default().covers_all_slots());
        assert_eq!(SlotMap::default().node_of("x"), None);
        assert!(SlotMap::single_node().covers_all_slots());
        assert_eq!(SlotMap::single_node().node_of("x"), Some(&Node::Only));
        assert_eq!(SlotMap::from_ranges(ranges(&Value::Nil, "a-host")).node_of("x"), None);
    }
}
