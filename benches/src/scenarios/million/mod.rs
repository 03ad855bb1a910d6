//! As many streams as the machine carries, with both ends of each: many gateways, each with a load process. Then an event to each
//! stream, an idle minute, and some gateways killed, whose clients resume at others. All of it exactly once.

mod fleet;

use std::{thread::sleep, time::Duration};

use self::fleet::Fleet;
use super::Sizes;
use crate::{
    clock::now,
    fixtures::{self, Bench},
    load::Order,
    machine::{self, KernelMemory},
    report::{count, figure, heading, megabytes, progress},
    source::EventLoad,
};

/// Events in a million feeds take a while to commit, and to repair.
const PATIENCE: Duration = Duration::from_mins(5);
const GATEWAYS_KILLED: usize = 10;
/// Gateways between two lines of figures while the number grows.
const SAY_EVERY: usize = 10;

#[derive(Debug, Clone)]
pub struct Million {
    pub streams: usize,
    /// Bounded by the open files of a process: a gateway needs 3,612 besides its streams.
    pub per_gateway: usize,
    pub heartbeat: Duration,
    pub reconcile: Duration,
    pub idling: Duration,
}

impl Million {
    pub fn new(quick: bool, streams: Option<usize>) -> Self {
        let second = Duration::from_secs(1);
        if quick {
            let streams = streams.unwrap_or(200);
            return Self {
                streams,
                per_gateway: 60,
                heartbeat: second,
                reconcile: second,
                idling: 2 * second,
            };
        }
        Self {
            streams: streams.unwrap_or(1_000_000),
            per_gateway: 16_000,
            // The machine carries both ends: the clients' share of a heartbeat is as large as the gateway's.
            heartbeat: 30 * second,
            reconcile: 60 * second,
            idling: 60 * second,
        }
    }
}

pub async fn run(sizes: &Sizes) -> anyhow::Result<()> {
    let million = &sizes.million;
    let world = Bench::new().await;
    progress(format_args!("making {} users", count(million.streams as u64)));
    let sessions = fixtures::make_sessions(&world, million.streams).await?;
    let api = world.api().ready().await;
    let before = KernelMemory::now()?;

    let mut fleet = Fleet::new(&world, &api, million);
    let mut stopped_by = None;
    for some in sessions.chunks(million.per_gateway) {
        if let Err(why) = fleet.grow(some).await {
            fleet.drop_last();
            stopped_by = Some(why);
            break;
        }
        if fleet.len().is_multiple_of(SAY_EVERY) {
            let free = megabytes(machine::available_memory()?);
            figure(
                format_args!("{} streams", count(fleet.streams() as u64)),
                format_args!("{free} available"),
            );
        }
    }
    let total = fleet.streams();
    anyhow::ensure!(total > 0, "not even one gateway: {stopped_by:?}");
    heading(format_args!("  {} streams at {} gateways", count(total as u64), fleet.len()));
    figure(
        "more were stopped by",
        stopped_by.map_or_else(|| "nothing: as many as asked".into(), |why| format!("{why:#}")),
    );
    figure("to open one after the other", format_args!("{:.0} s", fleet.opening().as_secs_f64()));
    say_memory(&fleet, &before)?;

    heading("  one event to each");
    let users = fixtures::ids_of(&sessions[..total]);
    let mut source = EventLoad::new(&world, users.iter().copied()).await?;
    let began = now();
    fleet.order(&Order::Measure { since: began })?;
    source.one_each().await?;
    let all = fleet.until("all have the event", PATIENCE, |status| status.events >= total as u64)?;
    let took = all.last_event_at.saturating_sub(began) as f64 / 1e6;
    figure("all have it", format_args!("after {took:.0} s, with the commits to their feeds"));
    fleet.check_ledgers().await?;
    figure("ledgers", "each stream has it exactly once");
    say_memory(&fleet, &before)?;

    heading(format_args!("  idling for {:?}, a heartbeat each {:?}", million.idling, million.heartbeat));
    fleet.order(&Order::Measure { since: now() })?;
    let costs = fleet.costs()?;
    sleep(million.idling);
    fleet.costs()?.since(&costs).say();
    let all = fleet.until("all have a heartbeat", PATIENCE, |status| status.heartbeats == total)?;
    anyhow::ensure!(all.ended.is_empty(), "streams ended: {}", all.endings());
    figure("heartbeats", "each stream has one");

    let killed = GATEWAYS_KILLED.min(fleet.len().div_ceil(2));
    heading(format_args!("  {killed} gateways killed, an event to each user meanwhile"));
    fleet.order(&Order::Measure { since: now() })?;
    let away = fleet.kill(killed)?;
    let expected = total - away;
    fleet.until("all streams of killed gateways have noticed", PATIENCE, |status| {
        status.ready == expected && status.opening == 0
    })?;
    source.one_each().await?;
    fleet.until("the others have the event", PATIENCE, |status| status.events >= expected as u64)?;
    let began = fleet.resume(killed).await?;
    let all = fleet.until("all are back and complete", PATIENCE, |status| {
        status.ready == total && status.events >= total as u64
    })?;
    let took = all.last_event_at.saturating_sub(began) as f64 / 1e6;
    figure("streams that resumed at another gateway", count(away as u64));
    figure("all are back with what they missed", format_args!("{took:.1} s after the first reconnected"));
    figure("connections that ended meanwhile", all.endings());
    fleet.check_ledgers().await?;
    figure(
        "ledgers",
        format_args!("all {} streams end where their feeds end; none lost or repeated", count(total as u64)),
    );
    figure("a resync", "for none");
    fleet.print_complaints();
    Ok(())
}

fn say_memory(fleet: &Fleet<'_>, before: &KernelMemory) -> anyhow::Result<()> {
    let streams = fleet.streams() as f64;
    let each = |bytes: u64| format!("{:.0} bytes a stream", bytes as f64 / streams);
    let memory = fleet.memory()?;
    let kernel = KernelMemory::now()?;
    figure("gateways, PSS, processes included", each(memory.gateways));
    figure("kernel, slab, both ends", each(kernel.slab.saturating_sub(before.slab)));
    figure("kernel, sockets' buffers, both ends", each(kernel.sockets.saturating_sub(before.sockets)));
    figure("load processes, PSS", each(memory.load));
    figure("Redis, api: PSS", format_args!("{}, {}", each(memory.redis), each(memory.api)));
    figure(
        "the machine, all in, both ends",
        format_args!(
            "{}; {} available",
            each(before.available.saturating_sub(kernel.available)),
            megabytes(kernel.available)
        ),
    );
    Ok(())
}
