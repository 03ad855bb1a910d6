//! How fast one gateway opens streams, and what each costs, when all clients come together: the first time with tokens that it has
//! never seen, then again with the same ones, as after a lost network.

use std::time::{Duration, Instant};

use testkit::{service::Service, user::TestUser};

use super::{Costs, GatewayBuild, PATIENCE, Sizes, UNLIMITED, print_complaints};
use crate::{
    clock::now,
    fixtures::{self, Bench},
    load::{Audience, Opening, Order, StreamLoad, check},
    report::{Percentiles, count, figure, heading, progress},
};

/// The gateway forgets a user some time after the last stream.
const BETWEEN: Duration = Duration::from_secs(3);

pub async fn run(sizes: &Sizes) -> anyhow::Result<()> {
    for round in 0..sizes.rounds {
        let mut builds: Vec<&GatewayBuild> = sizes.gateways.iter().collect();
        if round % 2 == 1 {
            builds.reverse();
        }
        for build in builds {
            heading(format_args!("  {}, round {} of {}", build.name, round + 1, sizes.rounds));
            measure(build, sizes).await?;
        }
    }
    Ok(())
}

async fn measure(build: &GatewayBuild, sizes: &Sizes) -> anyhow::Result<()> {
    let world = Bench::new().await;
    let users = fixtures::make_users(&world, sizes.streams).await?;
    let api = world.api().ready().await;
    let gateway = build.plan(&world, &api).env("ACCEPT_RATE", UNLIMITED).ready().await;
    for pass in ["new tokens", "the same tokens again", "and again"] {
        progress(format_args!("opening {} streams: {pass}", users.len()));
        open(&world, &users, &api, &gateway, pass).await?;
        let began = Instant::now();
        while gateway.metric("messenger_gateway_streams").await > 0.0 {
            anyhow::ensure!(began.elapsed() < PATIENCE, "the gateway keeps streams that are closed");
        }
        std::thread::sleep(BETWEEN);
    }
    print_complaints([&api, &gateway]);
    Ok(())
}

async fn open(
    world: &Bench,
    users: &[TestUser],
    api: &Service,
    gateway: &Service,
    pass: &str,
) -> anyhow::Result<()> {
    let mut streams = StreamLoad::start()?;
    let viewers = fixtures::viewers_file(world.folder(), fixtures::viewers(users))?;
    streams.order(&Order::Viewers(Audience::of(viewers)))?;
    let costs = Costs::now(world, api, Some((gateway, &streams)))?;
    streams.order(&Order::Measure { since: now() })?;
    streams.order(&Order::Open(Opening::at_full_speed(gateway.public())))?;
    streams.until("all streams are ready", PATIENCE, |status| status.ready == users.len())?;
    let costs = Costs::now(world, api, Some((gateway, &streams)))?.since(&costs);
    let report = streams.report()?;
    check(&report, &fixtures::heads(world, &fixtures::ids(users)).await?)?;
    let rate = users.len() as f64 / report.last_ready().as_secs_f64();
    let Costs { gateway, api, postgres, redis, load } = costs;
    let [gateway, api, postgres, redis, load] =
        [gateway, api, postgres, redis, load].map(|cpu| cpu.per(1e6, users.len() as u64));
    figure(format_args!("{} streams, {pass}", count(users.len() as u64)), format_args!("{rate:.0} opened/s"));
    figure(
        "CPU µs per stream",
        format_args!(
            "gateway {gateway:.0}, api {api:.0}, Postgres {postgres:.0}, Redis {redis:.0}, load {load:.0}"
        ),
    );
    figure("ready, from the first connection", Percentiles::of(report.readies));
    Ok(())
}
