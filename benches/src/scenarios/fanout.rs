//! One to one over many streams: each event goes to one user, and users take turns at random. First at a steady rate with
//! everything as shipped; then faster, step by step, until something gives.

use std::time::Duration;

use anyhow::Context as _;
use testkit::{service::Service, user::User};

use super::{Costs, PATIENCE, Sizes, check_ledgers, open_streams, print_complaints};
use crate::{
    fixtures::{self, Bench},
    load::{Order, StreamLoad},
    report::{Percentiles, count, figure, heading, progress},
    source::{Commits, EventLoad, PublishReport},
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
    let mut streams = open_streams(&world, &gateway, &users, sizes).await?;
    let scene = FanoutRun { world: &world, users: &users, api: &api, gateway: &gateway };
    scene.warm_up(&mut streams, sizes).await?;
    heading(format_args!(
        "  {}/s for {:?} over {} streams, everything as shipped; events are committed moments before they are published",
        count(sizes.fanout_rate.into()),
        sizes.fanout_length,
        count(users.len() as u64),
    ));
    scene.step(&mut streams, sizes.fanout_rate, sizes.fanout_length, Commits::Meanwhile).await?;
    print_complaints(&[&api, &gateway]);
    drop((streams, gateway));

    let gateway = world.gateway(api.internal()).env("RECONCILE_SECONDS", NO_RECONCILE).ready().await;
    let mut streams = open_streams(&world, &gateway, &users, sizes).await?;
    let scene = FanoutRun { world: &world, users: &users, api: &api, gateway: &gateway };
    scene.warm_up(&mut streams, sizes).await?;
    for &rate in &sizes.ceiling_rates {
        heading(format_args!(
            "  {}/s for {:?}; all events committed before, no reconcile meanwhile",
            count(rate.into()),
            sizes.ceiling_length
        ));
        if !scene.step(&mut streams, rate, sizes.ceiling_length, Commits::Before).await? {
            figure("the ceiling", format_args!("below {}/s", count(rate.into())));
            break;
        }
    }
    print_complaints(&[&api, &gateway]);
    Ok(())
}

struct FanoutRun<'a> {
    world: &'a Bench,
    users: &'a [User],
    api: &'a Service,
    gateway: &'a Service,
}

impl FanoutRun<'_> {
    async fn warm_up(&self, streams: &mut StreamLoad, sizes: &Sizes) -> anyhow::Result<()> {
        progress("warming up");
        let mut source = EventLoad::new(self.world, self.users).await?;
        let warm_up = Duration::from_secs(1);
        let published = source.steady(sizes.fanout_rate, warm_up, Commits::Meanwhile, |_| Ok(())).await?;
        let arrived = |status: &crate::load::Status| status.events >= published.events;
        streams.until("the first events arrive", PATIENCE, arrived)?;
        Ok(())
    }

    /// `false`: the rate was too much.
    async fn step(
        &self,
        streams: &mut StreamLoad,
        rate: u32,
        length: Duration,
        commits: Commits,
    ) -> anyhow::Result<bool> {
        let mut source = EventLoad::new(self.world, self.users).await?;
        let mut at_start = None;
        let detours = self.detours().await;
        let published = source
            .steady(rate, length, commits, |since| {
                streams.order(&Order::Measure { since })?;
                at_start = Some((since, self.costs(streams)?));
                Ok(())
            })
            .await?;
        let (since, costs) = at_start.context("the source begins")?;
        let PublishReport { events, latest, heard } = published;
        let status = streams.until("all events arrive", PATIENCE, |status| status.events >= events)?;
        let costs = self.costs(streams)?.since(&costs);
        let detours = self.detours().await - detours;
        let latency = Percentiles::of(streams.report()?.latencies);
        check_ledgers(self.world, streams, self.users).await?;

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
        figure(
            "CPU seconds per 100k deliveries",
            format_args!(
                "gateway {:.2}, Redis {:.2}",
                costs.gateway.per(1e5, events),
                costs.redis.per(1e5, events)
            ),
        );
        Ok(latency.p99 < TOO_LATE_MICROS && delivered > 0.95 * f64::from(rate))
    }

    fn costs(&self, streams: &StreamLoad) -> anyhow::Result<Costs> {
        Costs::now(self.world, self.api, Some(self.gateway), Some(streams))
    }

    async fn detours(&self) -> f64 {
        let by = |path| self.gateway.metric_where("messenger_gateway_events_delivered_total", path);
        by("path=\"repair\"").await + by("path=\"replay\"").await
    }
}
