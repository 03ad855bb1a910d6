//! A gateway is killed, and all streams resume with events to backfill: first all together, without a limit on new streams; then
//! as browsers do, each after its `retry`, with the default limits.

use std::time::Duration;

use testkit::service::{Plan, Service};

use super::{Costs, PATIENCE, Sizes, check_ledgers, open_streams, print_complaints};
use crate::{
    clock::now,
    fixtures::{self, Bench},
    load::Order,
    report::{Percentiles, count, figure, heading, progress},
    source::EventLoad,
};

/// New streams come faster than a gateway accepts by default.
const UNLIMITED: u32 = 1_000_000;
/// A rejected stream waits for up to two minutes.
const BACK_WITHIN: Duration = Duration::from_mins(4);

pub async fn run(sizes: &Sizes) -> anyhow::Result<()> {
    heading("  all together, no limit on new streams a second");
    storm(sizes, false, |plan| plan.env("ACCEPT_RATE", UNLIMITED)).await?;
    heading("  each after its `retry`, everything as shipped");
    storm(sizes, true, |plan| plan).await
}

async fn storm(sizes: &Sizes, as_browsers: bool, settings: impl Fn(Plan) -> Plan) -> anyhow::Result<()> {
    let world = Bench::new().await;
    let users = fixtures::make_users(&world, sizes.streams).await?;
    let total = users.len() as u64;
    let api = world.api().ready().await;
    let mut gateway = settings(world.gateway(api.internal())).ready().await;
    let mut streams = open_streams(&world, &gateway, &users, sizes).await?;
    let mut source = EventLoad::new(&world, &users).await?;
    source.one_each().await?;
    streams.until("all have an event", PATIENCE, |status| status.events >= total)?;

    progress("killing the gateway");
    streams.order(&Order::ComeBack { by_itself: as_browsers })?;
    let mut began = now();
    streams.order(&Order::Measure { since: began })?;
    gateway.kill();
    source.one_each().await?;
    gateway.restart().await;
    gateway.until_ready().await;
    if !as_browsers {
        streams.until("all have noticed", PATIENCE, |status| status.ready + status.opening == 0)?;
        began = now();
        streams.order(&Order::Measure { since: began })?;
    }
    let before = Costs::now(&world, &api, Some(&gateway), Some(&streams))?;
    let requests_before = backfill_requests(&api).await;
    if !as_browsers {
        streams.order(&Order::Reconnect)?;
    }
    let status = streams.until("all are back and complete", BACK_WITHIN, |status| {
        status.ready == users.len() && status.events >= total
    })?;
    let costs = Costs::now(&world, &api, Some(&gateway), Some(&streams))?.since(&before);
    let requests = backfill_requests(&api).await - requests_before;
    let back = Percentiles::of(streams.report()?.readies);
    check_ledgers(&world, &mut streams, &users).await?;

    let from = if as_browsers { "the kill" } else { "the reconnect" };
    figure(format_args!("{} back, from {from}", count(total)), back);
    let complete = status.last_event_at.saturating_sub(began) as f64 / 1e3;
    figure("all received what they missed", format_args!("{complete:.0} ms; none lost or repeated"));
    figure("requests to api", format_args!("{requests}"));
    let requested =
        async |kind| gateway.metric_where("messenger_gateway_backfill_requests_total", kind).await as u64;
    let (heads, ranges) = (requested("kind=\"heads\"").await, requested("kind=\"ranges\"").await);
    figure("feeds in them", format_args!("{} heads, {} ranges", count(heads), count(ranges)));
    let ended: Vec<_> = status.ended.iter().map(|(reason, times)| format!("{times} {reason}")).collect();
    figure(
        "connections that ended meanwhile",
        if ended.is_empty() { "none".into() } else { ended.join(", ") },
    );
    costs.say();
    print_complaints(&[&api, &gateway]);
    Ok(())
}

async fn backfill_requests(api: &Service) -> f64 {
    api.metric_where("messenger_api_http_requests_total", "/internal/feed/").await
}
