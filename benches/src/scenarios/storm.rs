//! A gateway is killed, and everybody comes back with a cursor and something to be told: once all at the same moment, which is
//! worse than life, and once as browsers do it, each after the `retry` that it was given, against the limits as shipped.

use std::time::Duration;

use super::{Costs, PATIENCE, Sizes, check_ledgers, open_streams, say_complaints};
use crate::{
    clock::now,
    load::Order,
    people,
    report::{Percentiles, count, figure, heading, progress},
    service::{Plan, Service},
    source::Source,
    world::World,
};

/// No limit on new streams a second: they come faster than any gateway as shipped lets them in.
const UNLIMITED: u32 = 1_000_000;
/// Those who are turned away stay away for up to two minutes.
const BACK_WITHIN: Duration = Duration::from_mins(4);

pub async fn run(sizes: &Sizes) -> anyhow::Result<()> {
    heading("  all at once, no limit on new streams a second");
    storm(sizes, false, |plan| plan.env("ACCEPT_RATE", UNLIMITED)).await?;
    heading("  each after its `retry`, everything as shipped");
    storm(sizes, true, |plan| plan).await
}

async fn storm(sizes: &Sizes, as_browsers: bool, settings: impl Fn(Plan) -> Plan) -> anyhow::Result<()> {
    let world = World::new().await?;
    let people = people::make(&world, sizes.streams).await?;
    let everybody = people.len() as u64;
    let api = world.api()?.start()?;
    let mut gateway = settings(world.gateway(&api)?).start()?;
    let mut streams = open_streams(&world, &gateway, &people, sizes).await?;
    let mut source = Source::new(&world, &people).await?;
    source.one_each().await?;
    streams.until("everybody has an event", PATIENCE, |status| status.events >= everybody)?;

    progress("killing the gateway");
    streams.order(&Order::ComeBack { by_itself: as_browsers })?;
    let mut began = now();
    streams.order(&Order::Measure { since: began })?;
    gateway.kill();
    source.one_each().await?;
    let gateway = gateway.start_again()?;
    if !as_browsers {
        streams.until("all have noticed", PATIENCE, |status| status.ready + status.opening == 0)?;
        began = now();
        streams.order(&Order::Measure { since: began })?;
    }
    let before = Costs::now(&world, &api, Some(&gateway), Some(&streams))?;
    let asked_before = questions(&api)?;
    if !as_browsers {
        streams.order(&Order::Reconnect)?;
    }
    let status = streams.until("all are back and told", BACK_WITHIN, |status| {
        status.ready == people.len() && status.events >= everybody
    })?;
    let costs = Costs::now(&world, &api, Some(&gateway), Some(&streams))?.since(&before);
    let requests = questions(&api)? - asked_before;
    let back = Percentiles::of(streams.report()?.readies);
    check_ledgers(&world, &mut streams, &people).await?;

    let from = if as_browsers { "the kill" } else { "the moment" };
    figure(format_args!("{} back, from {from}", count(everybody)), back);
    let told = status.last_event_at.saturating_sub(began) as f64 / 1e3;
    figure("all told what they missed", format_args!("{told:.0} ms; none lost or repeated"));
    figure("requests to api", format_args!("{requests}"));
    let users = |question| gateway.metric("messenger_gateway_backfill_requests_total", question);
    let (heads, ranges) = (users("question=\"heads\"")?, users("question=\"ranges\"")?);
    figure("questions in them", format_args!("{} heads, {} ranges", count(heads), count(ranges)));
    let ended: Vec<_> = status.ended.iter().map(|(reason, times)| format!("{times} {reason}")).collect();
    figure(
        "connections that ended meanwhile",
        if ended.is_empty() { "none".into() } else { ended.join(", ") },
    );
    costs.say();
    say_complaints(&[&api, &gateway]);
    Ok(())
}

/// Answered requests of the internal listener about feeds.
fn questions(api: &Service) -> anyhow::Result<u64> {
    api.metric("messenger_api_http_requests_total", "/internal/feed/")
}
