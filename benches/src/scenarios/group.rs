//! Messages in groups: each is an event for every member, in one transaction. At a steady rate, then as fast as it goes, with a
//! stream for each member.

use std::time::Duration;

use super::{GatewayUnderLoad, PATIENCE, Sizes};
use crate::{
    clock,
    fixtures::{self, Bench},
    load::{Order, Posting, Posts},
    report::{Percentiles, count, figure, heading},
};

/// Members, and posts per second of the steady part.
pub const GROUPS: [(usize, u32); 2] = [(100, 50), (1_000, 5)];

const CLIENTS: usize = 8;

pub async fn run(sizes: &Sizes) -> anyhow::Result<()> {
    for &(members, rate) in &sizes.groups {
        let world = Bench::new().await;
        let users = fixtures::make_users(&world, members).await?;
        let senders = fixtures::senders_file(&world, &fixtures::make_group(&world, &users).await?)?;
        let api = world.api().ready().await;
        let gateway = world.gateway(api.internal()).ready().await;
        let mut load = GatewayUnderLoad::open(&world, &users, &api, gateway, sizes)?;
        for per_second in [Some(rate), None] {
            let begin = clock::soon();
            load.streams.order(&Order::Measure { since: begin })?;
            let costs = load.costs()?;
            let (api, senders, length) = (api.public(), senders.clone(), Some(sizes.post_length));
            let clients = CLIENTS.min(members / 2);
            let posts = Posts { api, senders, clients, length, per_second, insist: false, begin };
            let posted = Posting::start(&posts)?.finish()?;
            let new = posted.accepted * members as u64;
            load.streams.until("all events arrive", PATIENCE, |status| status.events >= new)?;
            let costs = load.costs()?.since(&costs);
            let screens = Percentiles::of(load.streams.report()?.latencies);
            if let Some(rate) = per_second {
                heading(format_args!("  a group of {members}, {rate} posts a second"));
            } else {
                let rate = posted.accepted as f64 / Duration::from_micros(posted.took).as_secs_f64();
                heading(format_args!("  a group of {members}, {clients} clients without a pause"));
                figure("posts a second", format_args!("{rate:.0} ({:.0} events)", rate * members as f64));
            }
            figure("events", format_args!("{}; none lost, repeated or out of order", count(new)));
            figure("from due to the 201", Percentiles::of(posted.latencies));
            figure("from due to each screen", screens);
            costs.say();
            let [api, postgres, redis, gateway] =
                [costs.api, costs.postgres, costs.redis, costs.gateway].map(|cpu| cpu.per(1e6, new));
            figure(
                "CPU µs per event",
                format_args!("api {api:.1}, Postgres {postgres:.1}, Redis {redis:.1}, gateway {gateway:.1}"),
            );
            load.check_ledgers().await?;
        }
        load.print_complaints();
    }
    Ok(())
}
