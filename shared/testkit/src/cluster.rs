//! A real Redis Cluster: three nodes that own a third of the slots each, with replicas on request. Nodes detect a
//! dead one within two seconds instead of the usual fifteen.

use std::{thread::sleep, time::Duration};

use crate::{
    ports::free_port,
    servers::{Redis, wait},
};

const SLOTS: usize = 16_384;
const NODES: usize = 3;
/// Between two requests for a failover: a request in progress must finish, or the next one would revert it.
const FAILOVERS_APART: Duration = Duration::from_millis(200);

pub struct Cluster {
    pub nodes: Vec<Redis>,
    bus_ports: Vec<u16>,
}

impl Cluster {
    pub fn start() -> Self {
        let mut cluster = Self { nodes: Vec::new(), bus_ports: Vec::new() };
        for index in 0..NODES {
            let node = cluster.add();
            let (first, last) = (index * SLOTS / NODES, (index + 1) * SLOTS / NODES - 1);
            node.tell(&["CLUSTER", "SET-CONFIG-EPOCH", &(index + 1).to_string()]);
            node.tell(&["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &last.to_string()]);
        }
        cluster.meet();
        cluster.until_whole();
        cluster
    }

    fn add(&mut self) -> &Redis {
        let bus_port = free_port();
        let node = Redis::start_with(|_| {
            let port = bus_port.to_string();
            let options =
                ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-port", &port];
            options.map(str::to_owned).into()
        });
        self.nodes.push(node);
        self.bus_ports.push(bus_port);
        self.nodes.last().expect("one was just added")
    }

    fn meet(&self) {
        for (node, bus_port) in self.nodes.iter().zip(&self.bus_ports).skip(1) {
            let (port, bus_port) = (node.address().port().to_string(), bus_port.to_string());
            self.nodes[0].tell(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus_port]);
        }
    }

    pub fn until_whole(&self) {
        wait("the cluster is whole", || {
            self.nodes.iter().all(|node| {
                node.command(&["CLUSTER", "INFO"]).is_ok_and(|info| {
                    let says = |line: &str| info.lines().any(|other| other.trim_end() == line);
                    says("cluster_state:ok") && says(&format!("cluster_known_nodes:{}", self.nodes.len()))
                })
            })
        });
    }

    pub fn urls(&self) -> String {
        self.nodes.iter().map(Redis::url).collect::<Vec<_>>().join(",")
    }

    fn owner_by(&self, by: usize, name: &str) -> Option<usize> {
        let slot: u32 = self.slot(by, name)?.parse().ok()?;
        let nodes = self.nodes[by].command(&["CLUSTER", "NODES"]).ok()?;
        let owns = |range: &str| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let within = |first: u32, last: u32| (first..=last).contains(&slot);
            first.parse().is_ok_and(|first| last.parse().is_ok_and(|last| within(first, last)))
        };
        let owner = nodes.lines().find(|line| line.split(' ').skip(8).any(owns))?;
        let address = owner.split(' ').nth(1)?.split('@').next()?;
        self.nodes.iter().position(|node| node.address().to_string() == address)
    }

    fn slot(&self, by: usize, name: &str) -> Option<String> {
        let answer = self.nodes[by].command(&["CLUSTER", "KEYSLOT", name]).ok()?;
        answer.strip_prefix(':').map(str::to_owned)
    }

    pub fn owner(&self, name: &str) -> usize {
        (0..self.nodes.len()).find_map(|by| self.owner_by(by, name)).expect("a node answers")
    }

    pub fn add_replica(&mut self, of: usize) {
        let id = self.id(of);
        self.add();
        self.meet();
        self.until_whole();
        let replica = self.nodes.last().expect("one was just added");
        // It may not know its future master yet.
        wait("the replica follows", || {
            replica.command(&["CLUSTER", "REPLICATE", &id]).is_ok_and(|answer| answer == "+OK")
        });
        wait("the replica is in step", || is_in_step(replica));
        wait("all know of the replica", || {
            let known = |node: &Redis| {
                node.command(&["CLUSTER", "NODES"])
                    .is_ok_and(|nodes| nodes.lines().any(|line| line.contains("slave") && line.contains(&id)))
            };
            self.nodes.iter().all(known)
        });
    }

    fn id(&self, of: usize) -> String {
        self.nodes[of].command(&["CLUSTER", "MYID"]).expect("the node answers")
    }

    pub fn move_slot_of(&self, name: &str, to: usize) {
        let from = self.owner(name);
        let slot = self.slot(from, name).expect("the node answers");
        let (from_id, to_id) = (self.id(from), self.id(to));
        self.nodes[to].tell(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &from_id]);
        self.nodes[from].tell(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &to_id]);
        let to_node = &self.nodes[to];
        to_node.tell(&["CLUSTER", "SETSLOT", &slot, "NODE", &to_id]);
        // Refused while the slot still has keys, which expire soon here.
        wait("the slot is given away", || {
            self.nodes[from]
                .command(&["CLUSTER", "SETSLOT", &slot, "NODE", &to_id])
                .is_ok_and(|answer| answer == "+OK")
        });
        wait("all know of the move", || (0..self.nodes.len()).all(|by| self.owner_by(by, name) == Some(to)));
    }
}

/// A master, its replica, and three sentinels that promote the replica when the master is gone for half a second.
pub struct Sentinels {
    pub servers: [Redis; 2],
    pub sentinels: Vec<Redis>,
}

impl Sentinels {
    pub const NAME: &str = "main";

    pub fn start() -> Self {
        let servers = [Redis::start(), Redis::start()];
        let port = servers[0].address().port().to_string();
        servers[1].tell(&["REPLICAOF", "127.0.0.1", &port]);
        wait("the replica is in step", || is_in_step(&servers[1]));
        let sentinel = || {
            Redis::start_with(|folder| {
                let file = folder.join("sentinel.conf");
                let notes = format!(
                    "sentinel monitor {name} 127.0.0.1 {port} 2\n\
                     sentinel down-after-milliseconds {name} 500\n\
                     sentinel failover-timeout {name} 1500\n",
                    name = Self::NAME
                );
                std::fs::write(&file, notes).expect("the folder is ours");
                vec![file.display().to_string(), "--sentinel".to_owned()]
            })
        };
        let watched = Self { sentinels: (0..3).map(|_| sentinel()).collect(), servers };
        wait("the sentinels know of all", || {
            watched.sentinels.iter().all(|sentinel| {
                sentinel
                    .command(&["INFO", "sentinel"])
                    .is_ok_and(|info| info.contains("slaves=1,sentinels=3"))
            })
        });
        watched
    }

    pub fn settings(&self) -> [(&'static str, String); 3] {
        let sentinels: Vec<_> = self.sentinels.iter().map(Redis::url).collect();
        [
            ("REDIS_TOPOLOGY", "sentinel".to_owned()),
            ("REDIS_URL", format!("redis://{}", Self::NAME)),
            ("REDIS_SENTINELS", sentinels.join(",")),
        ]
    }

    pub fn leader(&self) -> Option<usize> {
        let named: Vec<_> = self.sentinels.iter().map(|sentinel| self.named_by(sentinel)).collect();
        let first = (*named.first()?)?;
        let leads = |server: &Redis| {
            server.command(&["INFO", "replication"]).is_ok_and(|info| info.contains("role:master"))
        };
        (named.iter().all(|named| *named == Some(first)) && leads(&self.servers[first])).then_some(first)
    }

    fn named_by(&self, sentinel: &Redis) -> Option<usize> {
        let info = sentinel.command(&["INFO", "sentinel"]).ok()?;
        let line = info.lines().find(|line| line.starts_with("master0:"))?;
        let address = line.split(',').find_map(|part| part.strip_prefix("address="))?;
        self.servers.iter().position(|server| server.address().to_string() == address)
    }

    pub fn until_leader(&self, leader: usize) {
        wait("the sentinels have made it the server", || self.leader() == Some(leader));
    }

    /// Requests failovers until this one is the master and the other its replica.
    pub fn hand_over(&self, to: usize) {
        wait("the sentinels hand over", || {
            if self.named_by(&self.sentinels[0]) != Some(to) {
                // Refused while one is in progress.
                let _ = self.sentinels[0].command(&["SENTINEL", "FAILOVER", Self::NAME]);
                sleep(FAILOVERS_APART);
            }
            self.leader() == Some(to)
        });
        wait("the other follows", || is_in_step(&self.servers[1 - to]));
    }
}

fn is_in_step(replica: &Redis) -> bool {
    replica.command(&["INFO", "replication"]).is_ok_and(|info| info.contains("master_link_status:up"))
}
