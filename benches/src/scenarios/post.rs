//! Messages through POST, as clients send them: authenticated, with an idempotency key, committed to disk before the answer,
//! in many conversations. Then from POST to the other participant's screen.

use std::time::Duration;

use testkit::usage::Cpu;

use super::{Costs, GatewayUnderLoad, PATIENCE, Sizes};
use crate::{
    clock,
    fixtures::{self, Bench},
    load::{Order, Posting, Posts},
    report::{Percentiles, count, figure, heading, progress},
};

/// Clients that share a fixed rate: enough that none waits for its previous answer.
const SCREEN_CLIENTS: usize = 32;

pub async fn run(sizes: &Sizes) -> anyhow::Result<()> {
    let world = Bench::new().await;
    let sync = crate::machine::disk_sync(world.folder())?;
    figure("the disk keeps 8 KiB within", sync);
    let users = fixtures::make_users(&world, 2 * sizes.post_pairs).await?;
    let senders = fixtures::start_conversations(&world, &users).await?;
    let senders = fixtures::senders_file(&world, &senders)?;
    let api = world.api().ready().await;
    let post = |clients, length, per_second, begin| {
        let api = api.public();
        let (senders, length) = (senders.clone(), Some(length));
        Posting::start(&Posts { api, senders, clients, length, per_second, insist: false, begin })?.finish()
    };

    progress("warming up");
    let mut stored = post(4, Duration::from_secs(1), None, clock::soon())?.accepted;
    for &clients in &sizes.post_clients {
        let costs = Costs::now(&world, &api, None)?;
        let posted = post(clients, sizes.post_length, None, clock::soon())?;
        let mut costs = Costs::now(&world, &api, None)?.since(&costs);
        costs.load = Cpu(costs.load.0 + Duration::from_secs_f64(posted.cpu_seconds));
        let per_second = posted.accepted as f64 / (posted.took as f64 / 1e6);
        heading(format_args!("  POST by {clients} clients for {:?}", sizes.post_length));
        figure("messages a second", format_args!("{per_second:.0} ({} messages)", count(posted.accepted)));
        figure("from request to answer", Percentiles::of(posted.latencies));
        costs.say();
        let [api, postgres] = [costs.api, costs.postgres].map(|cpu| cpu.per(1e3, posted.accepted));
        figure("CPU ms per message", format_args!("api {api:.2}, Postgres {postgres:.2}"));
        stored += posted.accepted;
        anyhow::ensure!(messages(&world).await? == stored, "answered 201: {stored}; in Postgres are others");
    }

    let gateway = world.gateway(api.internal()).ready().await;
    let mut load = GatewayUnderLoad::open(&world, &users, &api, gateway, sizes)?;
    let begin = clock::soon();
    load.streams.order(&Order::Measure { since: begin })?;
    let costs = load.costs()?;
    let posted =
        post(SCREEN_CLIENTS.min(sizes.post_pairs), sizes.screen_length, Some(sizes.screen_rate), begin)?;
    let status =
        load.streams.until("all events arrive", PATIENCE, |status| status.events >= 2 * posted.accepted)?;
    let mut costs = load.costs()?.since(&costs);
    costs.load = Cpu(costs.load.0 + Duration::from_secs_f64(posted.cpu_seconds));
    let screens = Percentiles::of(load.streams.report()?.latencies);
    load.check_ledgers().await?;
    anyhow::ensure!(status.events == 2 * posted.accepted, "two events for each message: {status:?}");
    heading(format_args!(
        "  from POST to the other's screen, {}/s for {:?}, {} streams, everything as shipped",
        count(sizes.screen_rate.into()),
        sizes.screen_length,
        count(users.len() as u64),
    ));
    figure("messages", format_args!("{}; none lost, repeated or out of order", count(posted.accepted)));
    figure("from due to the 201", Percentiles::of(posted.latencies));
    figure("from due to the other's screen", screens);
    costs.say();
    load.print_complaints();
    Ok(())
}

async fn messages(world: &Bench) -> anyhow::Result<u64> {
    let count: i64 =
        sqlx::query_scalar("SELECT count(*) FROM messenger.messages").fetch_one(&world.sql).await?;
    Ok(count.cast_unsigned())
}
