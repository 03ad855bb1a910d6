//! One to one over many streams: each event goes to one user, and users take turns at random. First at a steady rate with
//! everything as shipped; then faster, step by step, until something gives.

use std::time::Duration;

use anyhow::Context as _;

use super::{GatewayUnderLoad, PATIENCE, Sizes};
use crate::{
    fixtures::{self, Bench},
    load::{Order, Status},
    publisher::PublishReport,
    report::{Percentiles, count, figure, heading, progress},
    source::{Commits, EventLoad},
};

/// Longer than a step: a reconcile would deliver the events that Redis is measured by.
const NO_RECONCILE: u64 = 300;
/// A higher 99th percentile means that the rate is too much for the machine.
const TOO_LATE_MICROS: u32 = 1_000_000;

pub async fn run(sizes: &Sizes) -> anyhow::Result<()> {
    let world = Bench::new().await;
    let users = fixtures::make_users(&world, sizes.streams).await?;
    let api = world.api().ready().await;

    let gateway = world.gateway(api.internal()).ready().await;
    let mut load = GatewayUnderLoad::open(&world, &users, &api, gateway, sizes)?;
    load.warm_up(sizes).await?;
    heading(format_args!(
        "  {}/s for {:?} over {} streams, everything as shipped; events are committed moments before they are published",
        count(sizes.fanout_rate.into()),
        sizes.fanout_length,
        count(users.len() as u64),
    ));
    load.step(sizes.fanout_rate, sizes.fanout_length, Commits::Meanwhile).await?;
    load.print_complaints();
    drop(load);

    let gateway = world.gateway(api.internal()).env("RECONCILE_SECONDS", NO_RECONCILE).ready().await;
    let mut load = GatewayUnderLoad::open(&world, &users, &api, gateway, sizes)?;
    load.warm_up(sizes).await?;
    for &rate in &sizes.ceiling_rates {
        let (length, rate_text) = (sizes.ceiling_length, count(rate.into()));
        heading(format_args!(
            "  {rate_text}/s for {length:?}; all events committed before, no reconcile meanwhile"
        ));
        if !load.step(rate, length, Commits::Before).await? {
            figure("the ceiling", format_args!("below {rate_text}/s"));
            break;
        }
    }
    load.print_complaints();
    Ok(())
}

impl GatewayUnderLoad<'_> {
    async fn warm_up(&mut self, sizes: &Sizes) -> anyhow::Result<()> {
        progress("warming up");
        let mut source = EventLoad::new(self.world, fixtures::ids(self.users)).await?;
        let warm_up = Duration::from_secs(1);
        let published = source.steady(sizes.fanout_rate, warm_up, Commits::Meanwhile, |_| Ok(())).await?;
        let enough = |status: &Status| status.events >= published.events;
        self.streams.until("the first events arrive", PATIENCE, enough)?;
        Ok(())
    }

    /// `false`: the rate was too much.
    async fn step(&mut self, rate: u32, length: Duration, commits: Commits) -> anyhow::Result<bool> {
        let mut source = EventLoad::new(self.world, fixtures::ids(self.users)).await?;
        let mut at_start = None;
        let detours = self.detours().await;
        let published = source
            .steady(rate, length, commits, |since| {
                self.streams.order(&Order::Measure { since })?;
                at_start = Some((since, self.costs()?));
                Ok(())
            })
            .await?;
        let (since, costs) = at_start.context("the source begins")?;
        let PublishReport { events, latest, heard, .. } = published;
        let status = self.streams.until("all events arrive", PATIENCE, |status| status.events >= events)?;
        let costs = self.costs()?.since(&costs);
        let detours = self.detours().await - detours;
        let latency = Percentiles::of(self.streams.report()?.latencies);
        self.check_ledgers().await?;

        let took = (status.last_event_at - since) as f64 / 1e6;
        let delivered = events as f64 / took;
        figure(
            "delivered",
            format_args!("{} events, {delivered:.0}/s; none lost, repeated or out of order", count(events)),
        );
        figure("from due to arrival", latency);
        figure("the source was late by at most", format_args!("{:.1} ms", latest as f64 / 1e3));
        figure(
            "delivered by repair or replay",
            format_args!("{detours} events; Redis had {heard} receivers"),
        );
        costs.say();
        let [gateway, redis] = [costs.gateway, costs.redis].map(|cpu| cpu.per(1e5, events));
        figure("CPU seconds per 100k deliveries", format_args!("gateway {gateway:.2}, Redis {redis:.2}"));
        Ok(latency.p99 < TOO_LATE_MICROS && delivered > 0.95 * f64::from(rate))
    }

    async fn detours(&self) -> f64 {
        let by = |path| self.gateway.metric_where("messenger_gateway_events_delivered_total", path);
        by("path=\"repair\"").await + by("path=\"replay\"").await
    }
}
