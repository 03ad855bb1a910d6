//! Reads feeds of many users in one query, and prunes them.

use chrono::{DateTime, Utc};
use protocol::{
    feed::{KnownHead, Range, RangeAfter, UserHead},
    ids::{MessageId, UserId},
    position::{Epoch, Position, Seq},
};
use serde::Serialize;
use service_kit::explain::RequestedEvent;
use sqlx::PgConnection;

use super::{envelope, number};
use crate::config::Keep;

/// About this many events in one answer, shared among its ranges.
const EVENTS_PER_ANSWER: usize = 4_000;
const EVENTS_PER_RANGE: std::ops::RangeInclusive<usize> = 4..=100;

/// Returns the heads that differ from the requester's.
///
/// Here and below each requested row is looked up by its key (`LATERAL … LIMIT 1`): for a thousand rows the planner otherwise reads the
/// whole table, which takes ten times as long.
pub async fn heads(connection: &mut PgConnection, known: &[KnownHead]) -> sqlx::Result<Vec<UserHead>> {
    if known.is_empty() {
        return Ok(Vec::new());
    }
    let users: Vec<i64> = known.iter().map(|known| known.user.0).collect();
    let epochs: Vec<Option<i64>> =
        known.iter().map(|known| known.head.map(|head| head.epoch.to_sql())).collect();
    let seqs: Vec<Option<i64>> = known.iter().map(|known| known.head.map(|head| bigint(head.seq))).collect();
    let rows = sqlx::query!(
        r#"SELECT known.user_id AS "user_id!", h.epoch AS "epoch?", h.head_seq AS "head_seq?"
           FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS known (user_id, epoch, seq)
           LEFT JOIN LATERAL (SELECT * FROM messenger.feed_heads WHERE feed_heads.user_id = known.user_id LIMIT 1) AS h ON true
           WHERE h.user_id IS NULL OR known.seq IS NULL OR (h.epoch, h.head_seq) <> (known.epoch, known.seq)"#,
        &users,
        &epochs as &[Option<i64>],
        &seqs as &[Option<i64>],
    )
    .fetch_all(connection)
    .await?;
    rows.into_iter()
        .map(|row| Ok(UserHead { user: UserId(row.user_id), head: head(row.epoch, row.head_seq)? }))
        .collect()
}

/// The events after each position, in the order of the request. One statement, so one snapshot: a head and its rows agree.
pub async fn ranges(connection: &mut PgConnection, requested: &[RangeAfter]) -> sqlx::Result<Vec<Range>> {
    if requested.is_empty() {
        return Ok(Vec::new());
    }
    let users: Vec<i64> = requested.iter().map(|range| range.user.0).collect();
    let afters: Vec<i64> = requested.iter().map(|range| bigint(range.after)).collect();
    let limit =
        (EVENTS_PER_ANSWER / requested.len()).clamp(*EVENTS_PER_RANGE.start(), *EVENTS_PER_RANGE.end());
    let rows = sqlx::query!(
        r#"SELECT requested.ordinality AS "nth!", h.epoch AS "epoch?", h.head_seq AS "head_seq?",
                  f.seq AS "seq?", f.kind AS "kind?", f.payload AS "payload?", f.created_at AS "created_at?",
                  f.request_id, f.traceparent
           FROM unnest($1::bigint[], $2::bigint[]) WITH ORDINALITY AS requested (user_id, after, ordinality)
           LEFT JOIN LATERAL (SELECT * FROM messenger.feed_heads WHERE feed_heads.user_id = requested.user_id LIMIT 1) AS h ON true
           LEFT JOIN LATERAL (
               SELECT * FROM messenger.feed WHERE feed.user_id = h.user_id AND feed.seq > requested.after ORDER BY feed.seq LIMIT $3
           ) AS f ON true
           ORDER BY requested.ordinality, f.seq"#,
        &users,
        &afters,
        i64::try_from(limit).expect("at most 100"),
    )
    .fetch_all(connection)
    .await?;

    let mut ranges: Vec<Range> = requested
        .iter()
        .map(|&RangeAfter { user, after }| Range { user, after, head: None, events: Vec::new(), more: false })
        .collect();
    for row in rows {
        let range = usize::try_from(row.nth)
            .ok()
            .and_then(|nth| ranges.get_mut(nth.checked_sub(1)?))
            .ok_or(sqlx::Error::RowNotFound)?;
        range.head = head(row.epoch, row.head_seq)?;
        if let (Some(epoch), Some(seq), Some(kind), Some(payload), Some(at)) =
            (row.epoch, row.seq, row.kind, row.payload, row.created_at)
        {
            range.events.push(envelope(epoch, seq, kind, payload, at, row.request_id, row.traceparent)?);
        }
    }
    for range in &mut ranges {
        range.more = match (&range.head, range.events.last()) {
            (Some(head), Some(last)) => last.seq < head.seq,
            _ => false,
        };
    }
    Ok(ranges)
}

pub struct FeedSummary {
    pub username: String,
    pub head: Position,
    pub first: Option<Seq>,
    pub event: Option<StoredEvent>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredEvent {
    pub seq: Seq,
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message_id: Option<MessageId>,
    pub created_at: DateTime<Utc>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
}

/// For operators: finding an event by its message reads the whole feed.
pub async fn look_up(
    connection: &mut PgConnection,
    user: UserId,
    event: RequestedEvent,
) -> sqlx::Result<Option<FeedSummary>> {
    let (seq, message) = match event {
        RequestedEvent::Seq(seq) => (Some(bigint(seq)), None),
        RequestedEvent::Message(message) => (None, Some(message.0)),
    };
    let found = sqlx::query!(
        r#"SELECT u.username, h.epoch, h.head_seq,
                  (SELECT min(oldest.seq) FROM messenger.feed AS oldest WHERE oldest.user_id = u.id) AS first_seq,
                  f.seq AS "seq?", f.kind AS "kind?", f.message_id, f.created_at AS "created_at?", f.request_id, f.traceparent
           FROM messenger.users AS u
           JOIN messenger.feed_heads AS h ON h.user_id = u.id
           LEFT JOIN LATERAL (
               SELECT * FROM messenger.feed WHERE feed.user_id = u.id AND (feed.seq = $2 OR feed.message_id = $3) ORDER BY feed.seq LIMIT 1
           ) AS f ON true
           WHERE u.id = $1"#,
        user.0,
        seq,
        message,
    )
    .fetch_optional(connection)
    .await?;
    let Some(row) = found else { return Ok(None) };
    let event = match (row.seq, row.kind, row.created_at) {
        (Some(seq), Some(name), Some(created_at)) => Some(StoredEvent {
            seq: number(seq)?,
            name,
            message_id: row.message_id.map(MessageId),
            created_at,
            request_id: row.request_id,
            traceparent: row.traceparent,
        }),
        _ => None,
    };
    Ok(Some(FeedSummary {
        username: row.username,
        head: Position { epoch: Epoch::from_sql(row.epoch), seq: number(row.head_seq)? },
        first: row.first_seq.map(number).transpose()?,
        event,
    }))
}

/// A number from outside may be larger than any in the database: nothing follows it, as nothing follows the largest.
fn bigint(seq: Seq) -> i64 {
    i64::try_from(seq).unwrap_or(i64::MAX)
}

fn head(epoch: Option<i64>, seq: Option<i64>) -> sqlx::Result<Option<Position>> {
    epoch
        .zip(seq)
        .map(|(epoch, seq)| Ok(Position { epoch: Epoch::from_sql(epoch), seq: number(seq)? }))
        .transpose()
}

/// The old end of one feed: everything up to `seq`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OldPrefix {
    pub user: UserId,
    pub seq: i64,
}

/// Looks at the oldest `rows` events of the next `users` feeds after `after`. Returns their old prefixes, and the last user looked at;
/// `None` if there are no more users.
///
/// An event is old if it and all before it are beyond the count or the age, so a clock that was once wrong leaves no gap.
pub async fn old_prefixes(
    connection: &mut PgConnection,
    keep: Keep,
    after: UserId,
    users: i64,
    rows: i64,
) -> sqlx::Result<(Vec<OldPrefix>, Option<UserId>)> {
    let found = sqlx::query!(
        r#"WITH scanned AS MATERIALIZED (
               SELECT user_id, head_seq FROM messenger.feed_heads WHERE user_id > $1 ORDER BY user_id LIMIT $2
           )
           SELECT l.user_id, old.seq AS "seq?"
           FROM scanned AS l
           LEFT JOIN LATERAL (
               SELECT max(aged.seq) AS seq
               FROM (
                   SELECT oldest.seq,
                          bool_and(oldest.seq <= l.head_seq - $3
                                   OR oldest.created_at < now() - make_interval(secs => $4))
                              OVER (ORDER BY oldest.seq) AS is_old
                   FROM (SELECT f.seq, f.created_at FROM messenger.feed AS f
                         WHERE f.user_id = l.user_id ORDER BY f.seq LIMIT $5) AS oldest
               ) AS aged
               WHERE aged.is_old
           ) AS old ON true
           ORDER BY l.user_id"#,
        after.0,
        users,
        i64::try_from(keep.events).unwrap_or(i64::MAX),
        keep.age.as_secs_f64(),
        rows,
    )
    .fetch_all(connection)
    .await?;
    let last = found.last().map(|row| UserId(row.user_id));
    let old =
        found.into_iter().filter_map(|row| Some(OldPrefix { user: UserId(row.user_id), seq: row.seq? }));
    Ok((old.collect(), last))
}

/// May be repeated, and run on several replicas concurrently.
pub async fn delete_prefix(connection: &mut PgConnection, prefix: OldPrefix) -> sqlx::Result<u64> {
    let done = sqlx::query!(
        "DELETE FROM messenger.feed WHERE user_id = $1 AND seq <= $2",
        prefix.user.0,
        prefix.seq
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

/// Starts a new history of every feed: earlier cursors no longer match.
pub async fn redraw_epochs(connection: &mut PgConnection) -> sqlx::Result<u64> {
    let done = sqlx::query!("UPDATE messenger.feed_heads SET epoch = messenger.random_epoch()")
        .execute(connection)
        .await?;
    Ok(done.rows_affected())
}
