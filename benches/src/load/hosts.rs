//! The process that publishes as other back ends do: each client a connection, to Postgres or to `api`, one transaction or request at a
//! time.

use std::{io::Write, net::SocketAddr, time::Duration};

use anyhow::Context as _;
use protocol::ids::UserId;
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection};
use tokio::task::JoinSet;

use crate::{
    clock::{Micros, micros, now, sleep_until},
    http::HttpConnection,
};

#[derive(Debug, Serialize, Deserialize)]
pub struct Hosts {
    pub way: Way,
    pub clients: usize,
    pub users: Vec<UserId>,
    pub length: Duration,
    /// Transactions per second of all clients together; without it each client continues after its last one.
    pub per_second: Option<u32>,
    /// The data of an event is the microsecond after it at which it was published.
    pub begin: Micros,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Way {
    /// One event in each transaction.
    Sql { database_url: String },
    /// So many receivers, one event each, in a request.
    Http { api: SocketAddr, token: String, receivers: usize },
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct HostReport {
    /// Committed transactions, or answered requests.
    pub committed: u64,
    /// Of each, from its begin to the commit or answer; microseconds.
    pub latencies: Vec<u32>,
    pub took: Micros,
    pub cpu_seconds: f64,
}

pub fn run(order: &str) -> anyhow::Result<()> {
    let hosts: Hosts = serde_json::from_str(order)?;
    let mut all = match hosts.way.clone() {
        Way::Sql { database_url } => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(publish_by_sql(hosts, &database_url))?
        }
        Way::Http { api, token, receivers } => publish_by_http(&hosts, api, &token, receivers)?,
    };
    all.cpu_seconds = testkit::usage::Cpu::of(std::process::id())?.seconds();
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", serde_json::to_string(&all)?)?;
    Ok(stdout.flush()?)
}

impl Hosts {
    /// When the nth turn of a client is due; `None`: it is over.
    fn due(&self, client: usize, turn: usize) -> Option<Micros> {
        let due = match self.per_second {
            Some(rate) => (turn * self.clients + client) as Micros * 1_000_000 / Micros::from(rate),
            None => now().saturating_sub(self.begin),
        };
        (due < micros(self.length)).then_some(due)
    }

    fn user(&self, nth: usize) -> UserId {
        // Spread, without a random number for each.
        self.users[nth.wrapping_mul(7_919) % self.users.len()]
    }
}

impl HostReport {
    fn add(&mut self, other: Self) {
        self.committed += other.committed;
        self.latencies.extend(other.latencies);
        self.took = self.took.max(other.took);
    }
}

async fn publish_by_sql(hosts: Hosts, database_url: &str) -> anyhow::Result<HostReport> {
    let hosts = std::sync::Arc::new(hosts);
    let mut clients = JoinSet::new();
    for client in 0..hosts.clients {
        let mut connection = PgConnection::connect(database_url).await?;
        let hosts = hosts.clone();
        clients.spawn(async move {
            let mut report = HostReport::default();
            for turn in 0.. {
                let Some(due) = hosts.due(client, turn) else { break };
                let wait = (hosts.begin + due).saturating_sub(now());
                tokio::time::sleep(Duration::from_micros(wait)).await;
                let began = now();
                sqlx::query("SELECT messenger.publish($1::bigint, 'bench.published', to_jsonb($2::bigint))")
                    .bind(hosts.user(turn * hosts.clients + client).0)
                    .bind(began.saturating_sub(hosts.begin) as i64)
                    .execute(&mut connection)
                    .await?;
                let committed = now();
                report.committed += 1;
                report.latencies.push((committed - began) as u32);
                report.took = committed - hosts.begin;
            }
            anyhow::Ok(report)
        });
    }
    let mut all = HostReport::default();
    while let Some(report) = clients.join_next().await {
        all.add(report??);
    }
    Ok(all)
}

fn publish_by_http(
    hosts: &Hosts,
    api: SocketAddr,
    token: &str,
    receivers: usize,
) -> anyhow::Result<HostReport> {
    let client = |client: usize| {
        let mut connection = HttpConnection::open(api)?;
        let mut report = HostReport::default();
        for turn in 0.. {
            let Some(due) = hosts.due(client, turn) else { break };
            sleep_until(hosts.begin + due);
            let began = now();
            let data = began.saturating_sub(hosts.begin);
            let first = (turn * hosts.clients + client) * receivers;
            let events: Vec<String> = (first..first + receivers)
                .map(|nth| {
                    let user = hosts.user(nth);
                    format!(r#"{{"to":[{{"userId":"{user}"}}],"event":"bench.published","data":{data}}}"#)
                })
                .collect();
            let body = format!(r#"{{"events":[{}]}}"#, events.join(","));
            let request = format!(
                "POST /api/events HTTP/1.1\r\nHost: {api}\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n\
                 Content-Length: {}\r\n\r\n{body}",
                body.len()
            );
            let answer = connection.exchange(request.as_bytes())?;
            anyhow::ensure!(answer.head.status == 200, "{}: {}", answer.head.status, answer.body);
            let answered = now();
            report.committed += 1;
            report.latencies.push((answered - began) as u32);
            report.took = answered - hosts.begin;
        }
        anyhow::Ok(report)
    };
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..hosts.clients).map(|number| scope.spawn(move || client(number))).collect();
        let mut all = HostReport::default();
        for joined in clients {
            all.add(joined.join().ok().context("a client panicked")??);
        }
        Ok(all)
    })
}
