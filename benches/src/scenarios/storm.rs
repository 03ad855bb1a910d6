//! A gateway is killed, and all streams resume with events to backfill: first all together, without a limit on new streams; then
//! as browsers do, each after its `retry`, with the default limits.

use std::time::Duration;

use testkit::service::{Plan, Service};

use super::{GatewayUnderLoad, PATIENCE, Sizes, UNLIMITED};
use crate::{
    clock::now,
    fixtures::{self, Bench},
    load::Order,
    report::{Percentiles, count, figure, heading, progress},
    source::EventLoad,
};

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
    let gateway = settings(world.gateway(api.internal())).ready().await;
    let mut load = GatewayUnderLoad::open(&world, &users, &api, gateway, sizes)?;
    let mut source = EventLoad::new(&world, fixtures::ids(&users)).await?;
    source.one_each().await?;
    load.streams.until("all have an event", PATIENCE, |status| status.events >= total)?;

    progress("killing the gateway");
    load.streams.order(&Order::ComeBack { by_itself: as_browsers })?;
    let mut began = now();
    load.streams.order(&Order::Measure { since: began })?;
    load.gateway.kill();
    source.one_each().await?;
    load.gateway.restart().await;
    load.gateway.until_ready().await;
    if !as_browsers {
        load.streams.until("all have noticed", PATIENCE, |status| status.ready + status.opening == 0)?;
        began = now();
        load.streams.order(&Order::Measure { since: began })?;
    }
    let before = load.costs()?;
    let requests_before = backfill_requests(&api).await;
    if !as_browsers {
        load.streams.order(&Order::Reconnect)?;
    }
    let status = load.streams.until("all are back and complete", BACK_WITHIN, |status| {
        status.ready == users.len() && status.events >= total
    })?;
    let costs = load.costs()?.since(&before);
    let requests = backfill_requests(&api).await - requests_before;
    let back = Percentiles::of(load.streams.report()?.readies);
    load.check_ledgers().await?;

    let from = if as_browsers { "the kill" } else { "the reconnect" };
    figure(format_args!("{} back, from {from}", count(total)), back);
    let complete = status.last_event_at.saturating_sub(began) as f64 / 1e3;
    figure("all received what they missed", format_args!("{complete:.0} ms; none lost or repeated"));
    figure("requests to api", format_args!("{requests}"));
    let feeds = "messenger_gateway_backfill_requests_total";
    let requested = async |kind| count(load.gateway.metric_where(feeds, kind).await as u64);
    let (heads, ranges) = (requested("kind=\"heads\"").await, requested("kind=\"ranges\"").await);
    figure("feeds in them", format_args!("{heads} heads, {ranges} ranges"));
    figure("connections that ended meanwhile", status.endings());
    costs.say();
    load.print_complaints();
    Ok(())
}

async fn backfill_requests(api: &Service) -> f64 {
    api.metric_where("messenger_api_http_requests_total", "/internal/feed/").await
}
