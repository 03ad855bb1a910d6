//! Gateways, each with a process of clients. Every pair has a loopback network of its own, so ports do not run out.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use protocol::ids::{SessionId, UserId};
use testkit::{
    service::Service,
    usage::{Cpu, Memory},
};

use super::Million;
use crate::{
    clock::{Micros, now},
    fixtures::{self, Bench},
    load::{Audience, Opening, Order, Status, StreamLoad, Viewer, check},
    machine,
    report::progress,
    scenarios::{Costs, print_complaints},
};

/// Below the gateways' `ACCEPT_RATE`.
const PER_SECOND: u32 = 4_000;
const PORT: u16 = 8_090;
const OPENED_WITHIN: Duration = Duration::from_mins(1);
/// Growth stops here: the rest of the scenario needs room, too.
const ENOUGH: u64 = 2_500 << 20;
/// Without swap, less ends in the kernel's killing some process.
const LEAST: u64 = 1_500 << 20;
const LOOK_EVERY: Duration = Duration::from_millis(200);

pub struct Fleet<'a> {
    world: &'a Bench,
    api: &'a Service,
    million: &'a Million,
    members: Vec<Member>,
    opening: Duration,
    spent_by_killed: Duration,
}

struct Member {
    gateway: Service,
    streams: StreamLoad,
    users: Vec<UserId>,
}

pub struct FleetMemory {
    pub gateways: u64,
    pub load: u64,
    pub redis: u64,
    pub api: u64,
}

impl<'a> Fleet<'a> {
    pub fn new(world: &'a Bench, api: &'a Service, million: &'a Million) -> Self {
        Self {
            world,
            api,
            million,
            members: Vec::new(),
            opening: Duration::ZERO,
            spent_by_killed: Duration::ZERO,
        }
    }

    pub fn len(&self) -> usize {
        self.members.len()
    }

    pub fn streams(&self) -> usize {
        self.members.iter().map(|member| member.users.len()).sum()
    }

    pub fn opening(&self) -> Duration {
        self.opening
    }

    /// One more gateway with a stream for each of these. An error says what the machine has no more of.
    pub async fn grow(&mut self, sessions: &[(UserId, SessionId)]) -> anyhow::Result<()> {
        let available = machine::available_memory()?;
        anyhow::ensure!(available > ENOUGH, "memory: {} MB available", available >> 20);
        let network = u8::try_from(self.members.len() + 1)?;
        let gateway = self
            .world
            .gateway(self.api.internal())
            .env("LISTEN", format_args!("{}:{PORT}", Ipv4Addr::new(127, network, 1, 1)))
            .env("MAX_STREAMS", self.million.per_gateway)
            .env("HEARTBEAT_SECONDS", self.million.heartbeat.as_secs())
            .env("PROXY_IDLE_SECONDS", 90)
            .env("RECONCILE_SECONDS", self.million.reconcile.as_secs())
            .ready()
            .await;
        let viewers =
            sessions.iter().map(|&(user, session)| Viewer { user, token: self.world.token(user, session) });
        let viewers = fixtures::viewers_file(self.world.folder(), viewers)?;
        let mut streams = StreamLoad::start()?;
        streams.order(&Order::Viewers(Audience { network, ..Audience::of(viewers.clone()) }))?;
        std::fs::remove_file(viewers)?;
        let began = Instant::now();
        streams.order(&Order::Open(Opening::at_rate(gateway.public(), PER_SECOND)))?;
        let users = fixtures::ids_of(sessions);
        self.members.push(Member { gateway, streams, users });
        let total = self.streams();
        self.until("all streams are ready", OPENED_WITHIN, |status| status.ready == total)?;
        self.opening += began.elapsed();
        Ok(())
    }

    pub fn drop_last(&mut self) {
        self.members.pop();
    }

    pub fn order(&mut self, order: &Order) -> anyhow::Result<()> {
        self.members.iter_mut().try_for_each(|member| member.streams.order(order).map(drop))
    }

    /// Sums over all; ends early when memory runs out.
    pub fn until(
        &mut self,
        what: &str,
        within: Duration,
        enough: impl Fn(&Status) -> bool,
    ) -> anyhow::Result<Status> {
        let deadline = Instant::now() + within;
        loop {
            let mut all = Status::default();
            for member in &mut self.members {
                add(&mut all, member.streams.status()?);
            }
            if enough(&all) {
                return Ok(all);
            }
            let available = machine::available_memory()?;
            anyhow::ensure!(available > LEAST, "memory: {} MB available, {what}: {all:?}", available >> 20);
            if Instant::now() >= deadline {
                let fault = self.first_fault()?;
                anyhow::bail!("waited {within:?} in vain: {what}: {all:?}; the first fault: {fault:?}");
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn first_fault(&mut self) -> anyhow::Result<Option<String>> {
        for member in &mut self.members {
            if let Some(fault) = member.streams.report()?.first_fault {
                return Ok(Some(fault));
            }
        }
        Ok(None)
    }

    /// The first gateways, all together. Returns the number of their streams, which wait.
    pub fn kill(&mut self, count: usize) -> anyhow::Result<usize> {
        let mut away = 0;
        for Member { gateway, streams, users, .. } in &mut self.members[..count] {
            streams.order(&Order::ComeBack { by_itself: false })?;
            self.spent_by_killed += gateway.cpu()?.0;
            away += users.len();
        }
        self.members[..count].iter_mut().for_each(|member| member.gateway.kill());
        Ok(away)
    }

    /// Starts them again; each one's clients resume at the next one. Returns when that began.
    pub async fn resume(&mut self, count: usize) -> anyhow::Result<Micros> {
        progress("starting the killed gateways");
        for member in &mut self.members[..count] {
            member.gateway.restart().await;
        }
        for member in &self.members[..count] {
            member.gateway.until_ready().await;
        }
        let began = now();
        for index in 0..count {
            let server = self.members[(index + 1) % count].gateway.public();
            let streams = &mut self.members[index].streams;
            streams.order(&Order::ComeBack { by_itself: true })?;
            streams.order(&Order::Open(Opening::at_rate(server, PER_SECOND)))?;
        }
        Ok(began)
    }

    pub async fn check_ledgers(&mut self) -> anyhow::Result<()> {
        for Member { streams, users, .. } in &mut self.members {
            check(&streams.report()?, &fixtures::heads(self.world, users).await?)?;
        }
        Ok(())
    }

    pub fn memory(&self) -> anyhow::Result<FleetMemory> {
        let mut memory = FleetMemory {
            gateways: 0,
            load: 0,
            redis: Memory::of(self.world.redis.id())?.pss,
            api: self.api.memory()?.pss,
        };
        for member in &self.members {
            memory.gateways += member.gateway.memory()?.pss;
            memory.load += member.streams.memory()?.pss;
        }
        Ok(memory)
    }

    pub fn costs(&self) -> anyhow::Result<Costs> {
        let mut costs = Costs::now(self.world, self.api, None)?;
        costs.gateway.0 += self.spent_by_killed;
        for member in &self.members {
            costs.gateway.0 += member.gateway.cpu()?.0;
            costs.load = Cpu(costs.load.0 + member.streams.cpu()?.0);
        }
        Ok(costs)
    }

    pub fn print_complaints(&self) {
        print_complaints(self.members.iter().map(|member| &member.gateway).chain([self.api]));
    }
}

fn add(all: &mut Status, one: Status) {
    all.ready += one.ready;
    all.opening += one.opening;
    all.events += one.events;
    all.last_event_at = all.last_event_at.max(one.last_event_at);
    all.heartbeats += one.heartbeats;
    for (reason, times) in one.ended {
        *all.ended.entry(reason).or_default() += times;
    }
}
