//! Events of other back ends: from a host's transaction to the screen, at a steady rate, beside a transaction that stays open, in batches
//! by SQL and by HTTP; what the relay costs while nothing happens; and the size of the table of staged events.

use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::{Costs, GatewayUnderLoad, PATIENCE, Sizes};
use crate::{
    clock,
    fixtures::{self, Bench},
    load::{HostReport, Hosting, Hosts, Order, Way},
    report::{Percentiles, count, figure, heading, megabytes, progress},
};

const TOKEN: &str = "msk_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
const SQL_CLIENTS: usize = 16;
const HTTP_CLIENTS: usize = 8;
/// Receivers in a request.
const BATCH: usize = 100;

#[derive(Debug, Clone)]
pub struct Publishing {
    pub users: usize,
    pub per_second: u32,
    pub length: Duration,
    /// Events of the backlog.
    pub backlog: u64,
    /// Events before the size of the table is looked at again.
    pub many: u64,
    pub idling: Duration,
}

impl Publishing {
    pub fn new(quick: bool) -> Self {
        Self {
            users: if quick { 50 } else { 1_000 },
            per_second: if quick { 100 } else { 1_000 },
            length: Duration::from_secs(if quick { 1 } else { 10 }),
            backlog: if quick { 5_000 } else { 200_000 },
            many: if quick { 20_000 } else { 10_000_000 },
            idling: Duration::from_secs(if quick { 1 } else { 20 }),
        }
    }
}

pub async fn run(sizes: &Sizes) -> anyhow::Result<()> {
    let size = &sizes.publishing;
    let world = Bench::new().await;
    figure("the disk keeps 8 KiB within", crate::machine::disk_sync(world.folder())?);
    let users = fixtures::make_users(&world, size.users).await?;
    let token = "INSERT INTO messenger.service_tokens (name, token_hash, scopes) VALUES ('bench', sha256(convert_to($1, 'UTF8')), '{publish}')";
    sqlx::query(token).bind(TOKEN).execute(&world.sql).await?;
    let api = world.api().ready().await;
    let gateway = world.gateway(api.internal()).ready().await;
    let mut load = GatewayUnderLoad::open(&world, &users, &api, gateway, sizes)?;
    let ids = fixtures::ids(&users);
    let hosts = |way: Way, clients: usize, per_second, begin| Hosts {
        way,
        clients,
        users: ids.clone(),
        length: size.length,
        per_second,
        begin,
    };
    let sql = Way::Sql { database_url: world.database_url() };
    let mut before = 0;

    idle(&load, size)?;
    for is_open in [false, true] {
        let mut slow = PgConnection::connect(&world.database_url()).await?;
        if is_open {
            // It has published itself, and keeps every dead row.
            let publish = format!("BEGIN; SELECT messenger.publish({}::bigint, 'bench.slow', '1')", ids[0]);
            sqlx::raw_sql(AssertSqlSafe(publish)).execute(&mut slow).await?;
        }
        let beside = if is_open { ", a transaction open" } else { "" };
        let title = format!("one event a transaction, {}/s{beside}", count(size.per_second.into()));
        let begin = clock::soon();
        let published = hosts(sql.clone(), SQL_CLIENTS, Some(size.per_second), begin);
        before += measure(&mut load, &title, &published, 1).await?;
        if is_open {
            sqlx::raw_sql("ROLLBACK").execute(&mut slow).await?;
        }
    }
    let begin = clock::soon();
    let http = Way::Http { api: api.public(), token: TOKEN.into(), receivers: BATCH };
    let published = hosts(http, HTTP_CLIENTS, None, begin);
    let title = format!("POST /api/events, batches of {BATCH}, {HTTP_CLIENTS} clients without a pause");
    before += measure(&mut load, &title, &published, BATCH as u64).await?;

    heading(format_args!("  {} events committed together", count(size.backlog)));
    before += backlog(&world, &mut load, size.backlog).await?;
    load.check_ledgers().await?;

    drop(load);
    heading(format_args!("  the table of staged events, around {} events", count(size.many)));
    let (first, began) = (table(&world).await?, Instant::now());
    let mut largest = first;
    while before < size.many && began.elapsed() < sizes.publishing_at_most {
        let some = 50_000.min(size.many - before);
        stage(&world, some).await?;
        until_relayed(&world).await?;
        before += some;
        largest = largest.max(table(&world).await?);
        progress(format_args!("{} events, {}", count(before), megabytes(largest)));
    }
    sqlx::query("VACUUM messenger.staged_events").execute(&world.sql).await?;
    figure("events in all", count(before));
    figure(
        "size with index, before and largest",
        format_args!("{}, {}", megabytes(first), megabytes(largest)),
    );
    let dead: i64 =
        sqlx::query_scalar("SELECT count(*) FROM messenger.staged_events").fetch_one(&world.sql).await?;
    anyhow::ensure!(dead == 0, "{dead} events were left");
    figure("size after them", megabytes(table(&world).await?));
    Ok(())
}

fn idle(load: &GatewayUnderLoad, size: &Publishing) -> anyhow::Result<()> {
    std::thread::sleep(Duration::from_secs(1));
    let costs = load.costs()?;
    std::thread::sleep(size.idling);
    let costs = load.costs()?.since(&costs);
    heading(format_args!("  nothing happens for {:?}", size.idling));
    let share = |cpu: testkit::usage::Cpu| 100.0 * cpu.seconds() / size.idling.as_secs_f64();
    figure(
        "percent of a core",
        format_args!("api {:.2}, Postgres {:.2}", share(costs.api), share(costs.postgres)),
    );
    Ok(())
}

/// `each`: events of one transaction. How many there were.
async fn measure(
    load: &mut GatewayUnderLoad<'_>,
    title: &str,
    hosts: &Hosts,
    each: u64,
) -> anyhow::Result<u64> {
    load.streams.order(&Order::Measure { since: hosts.begin })?;
    let costs = load.costs()?;
    let HostReport { committed, latencies, cpu_seconds, took } = Hosting::start(hosts)?.finish()?;
    let events = committed * each;
    let status = load.streams.until("all events arrive", PATIENCE, |status| status.events >= events)?;
    let mut costs: Costs = load.costs()?.since(&costs);
    costs.load = testkit::usage::Cpu(costs.load.0 + Duration::from_secs_f64(cpu_seconds));
    let seconds = (status.last_event_at.max(hosts.begin + took) - hosts.begin) as f64 / 1e6;
    let screens = Percentiles::of(load.streams.report()?.latencies);
    heading(format_args!("  {title}"));
    figure("events", format_args!("{}; none lost, repeated or out of order", count(events)));
    figure("a second, until the last one is on its screen", format_args!("{:.0}", events as f64 / seconds));
    figure("of a transaction or request", Percentiles::of(latencies));
    figure("from its begin to each screen", screens);
    costs.say();
    let [api, postgres, redis, gateway] =
        [costs.api, costs.postgres, costs.redis, costs.gateway].map(|cpu| cpu.per(1e6, events));
    figure(
        "CPU µs per event",
        format_args!("api {api:.1}, Postgres {postgres:.1}, Redis {redis:.1}, gateway {gateway:.1}"),
    );
    load.check_ledgers().await?;
    Ok(events)
}

async fn backlog(world: &Bench, load: &mut GatewayUnderLoad<'_>, events: u64) -> anyhow::Result<u64> {
    load.streams.order(&Order::Measure { since: clock::now() })?;
    let costs = load.costs()?;
    stage(world, events).await?;
    let began = Instant::now();
    until_relayed(world).await?;
    let relayed = began.elapsed().as_secs_f64();
    load.streams.until("all events arrive", PATIENCE, |status| status.events >= events)?;
    let costs = load.costs()?.since(&costs);
    figure("appended a second", format_args!("{:.0}", events as f64 / relayed));
    figure("on all screens after", format_args!("{:.1} s", began.elapsed().as_secs_f64()));
    costs.say();
    Ok(events)
}

/// Commits so many events in one transaction.
async fn stage(world: &Bench, events: u64) -> anyhow::Result<()> {
    let sql = "SELECT count(messenger.publish(u.id, 'bench.published', '1'))
               FROM generate_series(1, $1) AS n
               JOIN (SELECT id, row_number() OVER () AS nth, count(*) OVER () AS users FROM messenger.users) AS u
                 ON u.nth = n % u.users + 1";
    let mut host = PgConnection::connect(&world.database_url()).await?;
    sqlx::query(sql).bind(events as i64).execute(&mut host).await?;
    Ok(host.close().await?)
}

async fn until_relayed(world: &Bench) -> anyhow::Result<()> {
    let waits = "SELECT EXISTS (SELECT FROM messenger.staged_events)";
    let began = Instant::now();
    while sqlx::query_scalar::<_, bool>(waits).fetch_one(&world.sql).await? {
        anyhow::ensure!(began.elapsed() < PATIENCE, "the relay is too slow");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

async fn table(world: &Bench) -> anyhow::Result<u64> {
    let size: i64 = sqlx::query_scalar("SELECT pg_total_relation_size('messenger.staged_events')")
        .fetch_one(&world.sql)
        .await?;
    Ok(size.cast_unsigned())
}
