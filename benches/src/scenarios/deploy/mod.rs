//! Two apis and three gateways behind nginx, with all streams connected and continuous posts: a rolling restart, each process
//! killed in turn, and all killed together. As in browsers, streams reconnect after their `retry`, and unanswered messages are
//! posted again with their key.

mod phase;
mod site;

use std::{collections::BTreeMap, time::Duration};

use anyhow::Context as _;
use protocol::position::Position;
use sqlx::Row as _;
use tokio::time::sleep;

use self::site::Deployment;
use super::{PATIENCE, Sizes, open_streams, print_complaints};
use crate::{
    clock::{self, HEAD_START},
    fixtures::{self, Bench},
    load::{Order, Posting, Posts, Report, check, digest},
    report::{count, figure, heading},
};

/// Clients that share the rate: one that waits for a killed api delays few others.
const SENDERS: usize = 64;

#[derive(Debug, Clone)]
pub struct Pace {
    pub messages_per_second: u32,
    pub calm: Duration,
    /// As in `k8s/base`.
    pub drain_wait: Duration,
    pub drain_window: Duration,
    pub api_wait: Duration,
    pub down: Duration,
    pub pause: Duration,
    /// Checks the rate of drains, which means nothing with few streams.
    pub keeps_to_rates: bool,
}

impl Pace {
    pub fn new(quick: bool) -> Self {
        Self {
            messages_per_second: if quick { 100 } else { 300 },
            calm: Duration::from_secs(if quick { 1 } else { 30 }),
            drain_wait: Duration::from_secs(if quick { 0 } else { 10 }),
            drain_window: Duration::from_secs(if quick { 1 } else { 30 }),
            api_wait: Duration::from_secs(if quick { 0 } else { 10 }),
            down: Duration::from_millis(if quick { 300 } else { 3_000 }),
            pause: Duration::from_millis(if quick { 300 } else { 10_000 }),
            keeps_to_rates: !quick,
        }
    }
}

pub async fn run(sizes: &Sizes) -> anyhow::Result<()> {
    let world = Bench::new().await;
    let users = fixtures::make_users(&world, sizes.streams).await?;
    let senders = fixtures::start_conversations(&world, &users).await?;
    let senders = fixtures::senders_file(&world, &senders)?;
    let pace = &sizes.pace;
    let mut site = Deployment::open(&world, pace, users.len()).await?;

    open_streams(&mut site.streams, &world, site.nginx.address(), &users, sizes)?;
    site.streams.order(&Order::ComeBack { by_itself: true })?;
    let begin = clock::soon();
    let posting = Posting::start(&Posts {
        api: site.nginx.address(),
        senders,
        clients: SENDERS.min(users.len() / 2),
        length: None,
        per_second: Some(pace.messages_per_second),
        insist: true,
        begin,
    })?;
    sleep(2 * HEAD_START).await;

    let phases = [
        site.phase("calm", Deployment::leave_alone).await?,
        site.phase("a rolling restart, gateways first", Deployment::roll).await?,
        site.phase("SIGKILL to each, one after the other", Deployment::kill_each).await?,
        site.phase("SIGKILL to all together", Deployment::kill_all).await?,
    ];

    let posted = posting.finish()?;
    let (messages, events): (i64, i64) = sqlx::query_as(
        "SELECT (SELECT count(*) FROM messenger.messages), (SELECT sum(head_seq)::bigint FROM messenger.feed_heads)",
    )
    .fetch_one(&world.sql)
    .await?;
    anyhow::ensure!(
        (messages, events) == (posted.accepted.cast_signed(), 2 * posted.accepted.cast_signed()),
        "answered 201: {}; in Postgres are {messages} messages, {events} events",
        posted.accepted
    );
    let all = 2 * posted.accepted;
    let arrived = site.streams.until("all events arrive", PATIENCE, |status| status.events_ever >= all);
    let report = site.streams.report()?;
    for phase in &phases {
        phase.say(&posted, begin, pace);
    }
    heading("  in total");
    check(&report, &fixtures::heads(&world, &fixtures::ids(&users)).await?)?;
    arrived?;
    check_contents(&world, &report).await?;
    figure("messages", format_args!("{}, each stored once", count(posted.accepted)));
    figure(
        "events",
        format_args!(
            "{}: none lost, repeated or out of order; every ledger is its feed, text by text",
            count(all)
        ),
    );
    let statuses: Vec<_> =
        report.statuses.iter().map(|(status, times)| format!("{times} × {status}")).collect();
    figure("answers on the stream", statuses.join(", "));
    for (complaint, times) in site.nginx.complaints() {
        figure(format_args!("nginx logged {times} times"), complaint);
    }
    print_complaints(site.services());
    for phase in &phases {
        phase.judge(pace)?;
    }
    Ok(())
}

/// Each stream received exactly its feed from its first `ready` on.
async fn check_contents(world: &Bench, report: &Report) -> anyhow::Result<()> {
    let rows = sqlx::query(
        "SELECT f.user_id, f.seq, CASE WHEN m.sender_id = f.user_id THEN 'message.sent' ELSE 'message' END AS kind, m.id, m.content
         FROM messenger.feed AS f JOIN messenger.messages AS m ON m.id = f.event_id ORDER BY f.user_id, f.seq",
    )
    .fetch_all(&world.sql)
    .await?;
    let mut feeds = BTreeMap::<i64, Vec<_>>::new();
    for row in &rows {
        let (seq, kind): (i64, &str) = (row.get("seq"), row.get("kind"));
        let (id, content): (i64, &str) = (row.get("id"), row.get("content"));
        let identity = format!(r#"{{"id":"{id}","content":{},"#, serde_json::to_string(content)?);
        feeds.entry(row.get("user_id")).or_default().push((seq.cast_unsigned(), kind, identity));
    }
    for summary in &report.summaries {
        let began: Position = summary.began.as_ref().context("every stream was ready")?.parse()?;
        let events = feeds.get(&summary.user.0).into_iter().flatten().filter(|(seq, ..)| *seq > began.seq);
        let expected = events.fold(0, |before, (seq, kind, identity)| digest(before, *seq, kind, identity));
        anyhow::ensure!(expected == summary.digest, "the stream of {} differs from its feed", summary.user);
    }
    Ok(())
}
