//! The scenarios. Each has its own environment, is bounded in time, and fails if an event was lost, repeated or reordered.

mod deploy;
mod fanout;
mod idle;
mod post;
mod storm;

use std::{collections::BTreeMap, time::Duration};

use clap::ValueEnum;
use testkit::{service::Service, usage::Cpu, user::User};

use crate::{
    clock::now,
    fixtures::{self, Bench},
    load::{Order, StreamLoad, check},
    machine,
    report::{figure, heading, progress},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// Memory and CPU of a gateway with many idle streams
    Idle,
    /// Latency and CPU of events to single users at a steady rate, then faster until it fails
    Fanout,
    /// Messages per second through POST, and the time from POST to the other user's stream
    Post,
    /// All streams reconnect together after a gateway is killed
    Storm,
    /// A rolling restart and SIGKILLs of two apis and three gateways behind nginx, with all streams connected
    Deploy,
}

#[derive(Debug, Clone)]
pub struct Sizes {
    pub streams: usize,
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
    pub screen_rate: u32,
    pub screen_length: Duration,
    pub pace: deploy::Pace,
}

impl Sizes {
    pub fn full(streams: usize) -> Self {
        Self {
            streams,
            opened_per_second: 1_500,
            heartbeat: Duration::from_secs(15),
            idling: Duration::from_mins(1),
            fanout_rate: 5_000,
            fanout_length: Duration::from_secs(10),
            ceiling_rates: vec![10_000, 20_000, 40_000, 50_000, 60_000, 80_000, 100_000, 120_000],
            ceiling_length: Duration::from_secs(5),
            post_pairs: 2_000,
            post_clients: vec![1, 8, 32, 64],
            post_length: Duration::from_secs(10),
            screen_rate: 500,
            screen_length: Duration::from_secs(20),
            pace: deploy::Pace::full(),
        }
    }

    pub fn quick(streams: usize) -> Self {
        Self {
            streams,
            opened_per_second: 500,
            heartbeat: Duration::from_secs(1),
            idling: Duration::from_secs(2),
            fanout_rate: 500,
            fanout_length: Duration::from_secs(2),
            ceiling_rates: vec![1_000],
            ceiling_length: Duration::from_secs(1),
            post_pairs: 50,
            post_clients: vec![1, 4],
            post_length: Duration::from_secs(1),
            screen_rate: 50,
            screen_length: Duration::from_secs(2),
            pace: deploy::Pace::quick(),
        }
    }
}

pub async fn run(scenario: Scenario, sizes: &Sizes) -> anyhow::Result<()> {
    heading(format_args!("{} — load average {}", scenario.name(), machine::load_average()));
    match scenario {
        Scenario::Idle => idle::run(sizes).await,
        Scenario::Fanout => fanout::run(sizes).await,
        Scenario::Post => post::run(sizes).await,
        Scenario::Storm => storm::run(sizes).await,
        Scenario::Deploy => deploy::run(sizes).await,
    }
}

impl Scenario {
    fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Fanout => "fanout",
            Self::Post => "post",
            Self::Storm => "storm",
            Self::Deploy => "deploy",
        }
    }
}

const PATIENCE: Duration = Duration::from_mins(1);

async fn open_streams(
    world: &Bench,
    gateway: &Service,
    users: &[User],
    sizes: &Sizes,
) -> anyhow::Result<StreamLoad> {
    progress(format_args!("opening {} streams", users.len()));
    let viewers = fixtures::viewers_file(world, users)?;
    let mut streams = StreamLoad::start()?;
    let per_second = sizes.opened_per_second;
    streams.order(&Order::Open { gateway: gateway.public(), viewers, per_second })?;
    streams.until("all streams are ready", PATIENCE, |status| status.ready == users.len())?;
    streams.order(&Order::Measure { since: now() })?;
    Ok(streams)
}

async fn check_ledgers(world: &Bench, streams: &mut StreamLoad, users: &[User]) -> anyhow::Result<()> {
    check(&streams.report()?, &fixtures::heads(world, users).await?)
}

struct Costs {
    gateway: Cpu,
    api: Cpu,
    postgres: Cpu,
    redis: Cpu,
    load: Cpu,
}

impl Costs {
    fn now(
        world: &Bench,
        api: &Service,
        gateway: Option<&Service>,
        streams: Option<&StreamLoad>,
    ) -> anyhow::Result<Self> {
        let none = Cpu(Duration::ZERO);
        let own = Cpu::of(std::process::id())?;
        let streams = streams.map_or(Ok(none), StreamLoad::cpu)?;
        Ok(Self {
            gateway: gateway.map_or(Ok(none), Service::cpu)?,
            api: api.cpu()?,
            postgres: world.postgres_cpu()?,
            redis: world.redis_cpu()?,
            load: Cpu(own.0 + streams.0),
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
fn print_complaints(services: &[&Service]) {
    let mut times = BTreeMap::<String, usize>::new();
    for complaint in services.iter().flat_map(|service| service.log().complaints()) {
        *times.entry(complaint).or_default() += 1;
    }
    for (complaint, times) in times {
        figure(format_args!("logged {times} times"), complaint);
    }
}
