//! Events that other back ends have staged: the relay appends them to feeds.

use serde_json::value::RawValue;
use sqlx::PgConnection;

use super::{Appended, AppendedTo, envelope, unexpected};

/// What has been looked at, for the next turn. Only Postgres reads it.
#[derive(Debug, Clone)]
pub struct Looked {
    snapshot: String,
    from_xid: String,
    from_id: i64,
}

/// Of one turn, each reached by the first event at the earliest.
#[derive(Debug, Clone, Copy)]
pub struct TurnBounds {
    pub events: i64,
    pub receivers: i64,
    /// Of data, as often as it has receivers.
    pub bytes: i64,
}

#[derive(Debug)]
pub enum RelayOutcome {
    /// Another replica relays.
    Passive,
    Looked {
        looked: Looked,
        /// Staged events.
        taken: u64,
        /// Postgres has more.
        more: bool,
        events: Vec<Appended>,
    },
}

/// SQL `relay_events()`. `renew`: keeps the lease, or takes an expired one. `looked`: by the turn before, of this replica; `None`: looks
/// at all staged events. `issuer`: whose subjects SQL `publish()` knows from now on.
pub async fn relay_events(
    connection: &mut PgConnection,
    me: i64,
    renew: bool,
    issuer: Option<&str>,
    looked: Option<&Looked>,
    bounds: TurnBounds,
) -> sqlx::Result<RelayOutcome> {
    let rows = sqlx::query!(
        r#"SELECT outcome AS "outcome!", looked, from_xid, from_id, taken, more,
                  name, data, request_id, traceparent, created_at, receivers, epochs, seqs
           FROM messenger.relay_events($1, $2, $3, $4::text::pg_snapshot, $5::text::xid8, $6, $7, $8, $9)"#,
        me,
        renew,
        issuer,
        looked.map(|looked| looked.snapshot.as_str()),
        looked.map_or("0", |looked| &looked.from_xid),
        looked.map_or(0, |looked| looked.from_id),
        bounds.events,
        bounds.receivers,
        bounds.bytes,
    )
    .fetch_all(connection)
    .await?;
    let mut rows = rows.into_iter();
    let first = rows.next().ok_or(sqlx::Error::RowNotFound)?;
    if first.outcome == "passive" {
        return Ok(RelayOutcome::Passive);
    }
    let (Some(snapshot), Some(from_xid), Some(from_id)) = (first.looked, first.from_xid, first.from_id)
    else {
        return Err(unexpected(&first.outcome));
    };
    let mut events = Vec::new();
    for row in rows {
        let (Some(name), Some(data), Some(created_at)) = (row.name, row.data, row.created_at) else {
            return Err(unexpected(&row.outcome));
        };
        let appended = AppendedTo { receivers: row.receivers, epochs: row.epochs, seqs: row.seqs };
        let data = published_data(data);
        for (receiver, at) in appended.positions()? {
            let (request_id, traceparent) = (row.request_id.clone(), row.traceparent.clone());
            let envelope = envelope(at, name.clone(), data.clone(), created_at, request_id, traceparent);
            events.push(Appended { receiver, envelope });
        }
    }
    Ok(RelayOutcome::Looked {
        looked: Looked { snapshot, from_xid, from_id },
        taken: first.taken.unwrap_or(0).cast_unsigned(),
        more: first.more.unwrap_or(false),
        events,
    })
}

/// Another replica need not wait until the lease of this one has expired.
pub async fn resign(connection: &mut PgConnection, me: i64) -> sqlx::Result<()> {
    sqlx::query!("UPDATE messenger.relay SET renewed_at = '-infinity' WHERE holder = $1", me)
        .execute(connection)
        .await?;
    Ok(())
}

/// What `publish` and `POST /api/events` have checked. Whatever else somebody writes into the table must not stop the feed.
pub(super) fn published_data(data: String) -> Box<RawValue> {
    RawValue::from_string(data).unwrap_or_else(|error| {
        tracing::error!(%error, "data of a published event is not JSON; clients get null");
        RawValue::NULL.to_owned()
    })
}
