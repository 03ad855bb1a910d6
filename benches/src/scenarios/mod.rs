//! The scenarios. Each has its own environment, is bounded in time, and fails if an event was lost, repeated or reordered.

mod deploy;
mod fanout;
mod group;
mod idle;
mod million;
mod opening;
mod peers;
mod post;
mod publish;
mod storm;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::ValueEnum;
use testkit::{
    service::{Plan, Service},
    usage::Cpu,
    user::TestUser,
};

pub use self::peers::Contender;

use crate::{
    clock::now,
    fixtures::{self, Bench},
    load::{Audience, Opening, Order, StreamLoad, check},
    machine,
    report::{figure, heading, progress, tally},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// Memory and CPU of a gateway with many idle streams
    Idle,
    /// Latency and CPU of events to single users at a steady rate, then faster until it fails
    Fanout,
    /// Messages per second through POST, and the time from POST to the other user's stream
    Post,
    /// Posts in groups of 100 and 1,000 members
    Group,
    /// Events of other back ends, by SQL and by HTTP
    Publish,
    /// All streams reconnect together after a gateway is killed
    Storm,
    /// A rolling restart and SIGKILLs of two apis and three gateways behind nginx, with all streams connected
    Deploy,
    /// Streams that a gateway opens per second, and the CPU time of each
    Opening,
    /// Ours and other servers side by side, in alternating rounds
    Peers,
    /// As many streams as the machine carries, at many gateways, of which some are killed
    Million,
}

impl Scenario {
    /// A scenario that takes longer hangs.
    pub fn longest(self) -> Duration {
        match self {
            Self::Peers | Self::Million | Self::Publish => Duration::from_mins(45),
            _ => Duration::from_mins(15),
        }
    }
}

/// A gateway to compare with others; `api` is always the one beside this program.
#[derive(Debug, Clone)]
pub struct GatewayBuild {
    pub name: String,
    /// `None`: the one beside this program.
    pub binary: Option<PathBuf>,
}

impl GatewayBuild {
    fn plan(&self, world: &Bench, api: &Service) -> Plan {
        let plan = world.gateway(api.internal());
        match &self.binary {
            Some(binary) => plan.binary(binary.clone()),
            None => plan,
        }
    }
}

#[derive(Debug, Clone)]
pub struct Sizes {
    pub streams: usize,
    pub gateways: Vec<GatewayBuild>,
    pub contenders: Vec<Contender>,
    pub rounds: usize,
    /// Before memory is read.
    pub settling: Duration,
    /// Events of the ceiling in `peers`.
    pub flood: u64,
    /// Events per second from one to many.
    pub many_rate: u32,
    pub million: million::Million,
    /// New streams per second where opening is not measured: below the gateway's limit.
    pub opened_per_second: u32,
    pub heartbeat: Duration,
    pub idling: Duration,
    pub fanout_rate: u32,
    pub fanout_length: Duration,
    pub ceiling_rates: Vec<u32>,
    pub ceiling_length: Duration,
    pub post_pairs: usize,
    pub post_clients: Vec<usize>,
    pub post_length: Duration,
    /// Members, and posts per second.
    pub groups: Vec<(usize, u32)>,
    pub screen_rate: u32,
    pub screen_length: Duration,
    pub publishing: publish::Publishing,
    /// Time for the many events after which the table's size is looked at.
    pub publishing_at_most: Duration,
    pub pace: deploy::Pace,
}

const CEILING_RATES: [u32; 8] = [10_000, 20_000, 40_000, 50_000, 60_000, 80_000, 100_000, 120_000];

impl Sizes {
    pub fn new(quick: bool, streams: Option<usize>) -> Self {
        Self {
            streams: streams.unwrap_or(if quick { 200 } else { 10_000 }),
            gateways: vec![GatewayBuild::own()],
            contenders: Contender::value_variants().into(),
            rounds: if quick { 1 } else { 2 },
            settling: Duration::from_millis(if quick { 100 } else { 3_000 }),
            flood: if quick { 10_000 } else { 300_000 },
            many_rate: 10,
            million: million::Million::new(quick, streams),
            opened_per_second: if quick { 500 } else { 1_500 },
            heartbeat: Duration::from_secs(if quick { 1 } else { 15 }),
            idling: Duration::from_secs(if quick { 2 } else { 60 }),
            fanout_rate: if quick { 500 } else { 5_000 },
            fanout_length: Duration::from_secs(if quick { 2 } else { 10 }),
            ceiling_rates: if quick { vec![1_000] } else { CEILING_RATES.into() },
            ceiling_length: Duration::from_secs(if quick { 1 } else { 5 }),
            post_pairs: if quick { 50 } else { 2_000 },
            post_clients: if quick { vec![1, 4] } else { vec![1, 8, 32, 64] },
            post_length: Duration::from_secs(if quick { 1 } else { 10 }),
            groups: if quick { vec![(10, 20)] } else { group::GROUPS.into() },
            screen_rate: if quick { 50 } else { 500 },
            screen_length: Duration::from_secs(if quick { 2 } else { 20 }),
            publishing: publish::Publishing::new(quick),
            publishing_at_most: Duration::from_mins(20),
            pace: deploy::Pace::new(quick),
        }
    }
}

pub async fn run(scenario: Scenario, sizes: &Sizes) -> anyhow::Result<()> {
    let name = scenario.to_possible_value().expect("no scenario is skipped");
    heading(format_args!("{} — load average {}", name.get_name(), machine::load_average()));
    match scenario {
        Scenario::Idle => idle::run(sizes).await,
        Scenario::Fanout => fanout::run(sizes).await,
        Scenario::Post => post::run(sizes).await,
        Scenario::Group => group::run(sizes).await,
        Scenario::Publish => publish::run(sizes).await,
        Scenario::Storm => storm::run(sizes).await,
        Scenario::Deploy => deploy::run(sizes).await,
        Scenario::Opening => opening::run(sizes).await,
        Scenario::Peers => peers::run(sizes).await,
        Scenario::Million => million::run(sizes).await,
    }
}

const PATIENCE: Duration = Duration::from_mins(1);
/// For `ACCEPT_RATE`, where clients come faster than a gateway accepts by default.
const UNLIMITED: u32 = 1_000_000;

/// One gateway, and a stream for each user.
struct GatewayUnderLoad<'a> {
    streams: StreamLoad,
    gateway: Service,
    world: &'a Bench,
    users: &'a [TestUser],
    api: &'a Service,
}

impl<'a> GatewayUnderLoad<'a> {
    fn open(
        world: &'a Bench,
        users: &'a [TestUser],
        api: &'a Service,
        gateway: Service,
        sizes: &Sizes,
    ) -> anyhow::Result<Self> {
        let mut streams = StreamLoad::start()?;
        open_streams(&mut streams, world, gateway.public(), users, sizes)?;
        streams.order(&Order::Measure { since: now() })?;
        Ok(Self { streams, gateway, world, users, api })
    }

    fn costs(&self) -> anyhow::Result<Costs> {
        Costs::now(self.world, self.api, Some((&self.gateway, &self.streams)))
    }

    async fn check_ledgers(&mut self) -> anyhow::Result<()> {
        check(&self.streams.report()?, &fixtures::heads(self.world, &fixtures::ids(self.users)).await?)
    }

    fn print_complaints(&self) {
        print_complaints([self.api, &self.gateway]);
    }
}

fn open_streams(
    streams: &mut StreamLoad,
    world: &Bench,
    gateway: SocketAddr,
    users: &[TestUser],
    sizes: &Sizes,
) -> anyhow::Result<()> {
    progress(format_args!("opening {} streams", users.len()));
    let viewers = fixtures::viewers_file(world.folder(), fixtures::viewers(users))?;
    streams.order(&Order::Viewers(Audience::of(viewers)))?;
    streams.order(&Order::Open(Opening::at_rate(gateway, sizes.opened_per_second)))?;
    streams.until("all streams are ready", PATIENCE, |status| status.ready == users.len())?;
    Ok(())
}

struct Costs {
    gateway: Cpu,
    api: Cpu,
    postgres: Cpu,
    redis: Cpu,
    load: Cpu,
}

impl Costs {
    fn now(world: &Bench, api: &Service, streaming: Option<(&Service, &StreamLoad)>) -> anyhow::Result<Self> {
        let (gateway, streams) = match streaming {
            Some((gateway, streams)) => (gateway.cpu()?, streams.cpu()?),
            None => (Cpu(Duration::ZERO), Cpu(Duration::ZERO)),
        };
        Ok(Self {
            gateway,
            api: api.cpu()?,
            postgres: world.postgres_cpu()?,
            redis: world.redis_cpu()?,
            load: Cpu(Cpu::of(std::process::id())?.0 + streams.0),
        })
    }

    fn since(&self, earlier: &Self) -> Self {
        Self {
            gateway: self.gateway - earlier.gateway,
            api: self.api - earlier.api,
            postgres: self.postgres - earlier.postgres,
            redis: self.redis - earlier.redis,
            load: self.load - earlier.load,
        }
    }

    fn say(&self) {
        let Self { gateway, api, postgres, redis, load } = self;
        let [gateway, api, postgres, redis, load] =
            [gateway, api, postgres, redis, load].map(|cpu| format!("{:.2}", cpu.seconds()));
        let all = format!("gateway {gateway}, api {api}, Postgres {postgres}, Redis {redis}, load {load}");
        figure("CPU seconds", all);
    }
}

/// Warnings and errors do not invalidate a figure, but its reader should know.
fn print_complaints<'a>(services: impl IntoIterator<Item = &'a Service>) {
    tally("logged", services.into_iter().flat_map(|service| service.log().complaints()));
}
