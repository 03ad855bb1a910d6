//! The cost of an idle stream with everything on: authentication, limits, subscriptions, heartbeats, reconcile.

use std::thread::sleep;

use testkit::usage::Memory;

use super::{GatewayUnderLoad, PATIENCE, Sizes};
use crate::{
    clock::now,
    fixtures::{self, Bench},
    load::Order,
    report::{count, figure, megabytes, progress},
    source::EventLoad,
};

/// Bytes of the gateway's memory per stream.
const ALLOWED: f64 = 1_536.0;

pub async fn run(sizes: &Sizes) -> anyhow::Result<()> {
    let world = Bench::new().await;
    let users = fixtures::make_users(&world, sizes.streams).await?;
    let api = world.api().ready().await;
    let gateway =
        world.gateway(api.internal()).env("HEARTBEAT_SECONDS", sizes.heartbeat.as_secs()).ready().await;
    let before = gateway.memory()?;
    let each = |memory: Memory| {
        let bytes = memory.pss.saturating_sub(before.pss) as f64 / sizes.streams as f64;
        format!("{:<10} {bytes:.0} bytes a stream; RSS {}", megabytes(memory.pss), megabytes(memory.rss))
    };
    figure("PSS before", format_args!("{}; RSS {}", megabytes(before.pss), megabytes(before.rss)));

    let cpu = gateway.cpu()?;
    let mut load = GatewayUnderLoad::open(&world, &users, &api, gateway, sizes)?;
    let opening = load.gateway.cpu()? - cpu;
    let opened = load.gateway.memory()?;
    figure(format_args!("PSS with {} streams", count(sizes.streams as u64)), each(opened));
    figure(
        "CPU of the gateway to open a stream",
        format_args!("{:.0} µs", opening.per(1e6, sizes.streams as u64)),
    );

    progress("one event to each");
    EventLoad::new(&world, fixtures::ids(&users)).await?.one_each().await?;
    load.streams.until("all have the event", PATIENCE, |status| status.events >= users.len() as u64)?;
    figure("PSS after an event to each", each(load.gateway.memory()?));

    progress("a round of heartbeats");
    load.streams.order(&Order::Measure { since: now() })?;
    load.streams.until("all have a heartbeat", PATIENCE, |status| status.heartbeats == users.len())?;
    let heartbeats = load.gateway.memory()?;
    figure("PSS after a round of heartbeats", each(heartbeats));

    progress(format_args!("idling for {:?}", sizes.idling));
    let costs = load.costs()?;
    sleep(sizes.idling);
    let idle = load.costs()?.since(&costs);
    let after = load.gateway.memory()?;
    figure(format_args!("PSS after idling for {:?}", sizes.idling), each(after));
    idle.say();

    let status = load.streams.status()?;
    anyhow::ensure!(status.ended.is_empty(), "streams ended: {:?}", status.ended);
    load.check_ledgers().await?;
    let most = [opened, heartbeats, after].map(|memory| memory.pss).into_iter().max().unwrap_or_default();
    let bytes = most.saturating_sub(before.pss) as f64 / sizes.streams as f64;
    let verdict = if bytes <= ALLOWED { "kept" } else { "NOT KEPT" };
    figure("at most 1.5 KB a stream", format_args!("{verdict}: {bytes:.0} bytes at the most"));
    load.print_complaints();
    Ok(())
}
