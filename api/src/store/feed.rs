//! Reads feeds of many users in one query, and prunes them.

use std::time::Duration;

use chrono::{DateTime, Utc};
use protocol::{
    event::kind,
    feed::{KnownHead, Range, RangeAfter, UserHead},
    ids::{ConversationId, MessageId, UserId},
    position::{Position, Seq},
};
use serde::Serialize;
use service_kit::explain::RequestedEvent;
use sqlx::PgConnection;

use super::{
    conversations::{self, Moment},
    envelope, number, position,
    relay::published_data,
    to_json,
};
use crate::{
    config::Keep,
    domain::{
        conversation::{Conversation, Role},
        event::{
            ConversationRead, Event, MessageDeleted, MessageSent, ParticipantJoined, ParticipantLeft,
            ParticipantUpdated, ReceiptRead,
        },
        message::Message,
        user::User,
    },
};

/// About this many events in one answer, shared among its ranges.
const EVENTS_PER_ANSWER: usize = 4_000;
const EVENTS_PER_RANGE: std::ops::RangeInclusive<usize> = 4..=100;
/// The same for bytes of texts and of published data. Each range has its first event whatever its size, so an answer stays below the
/// 64 MiB that a gateway reads: data has 48 KiB at most, and a text of [`crate::config::LONGEST_MESSAGE`] less, with a control character
/// written as six bytes.
const BYTES_PER_ANSWER: usize = 4 << 20;

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

/// One row of a range: a position, and the event there if there is one.
struct RangeRow {
    nth: i64,
    epoch: Option<i64>,
    head_seq: Option<i64>,
    seq: Option<i64>,
    kind: Option<String>,
    conversation_id: Option<i64>,
    about_message_id: Option<i64>,
    about_user_id: Option<i64>,
    about_username: Option<String>,
    about_avatar_url: Option<String>,
    count: Option<i64>,
    number: Option<i64>,
    is_owner: Option<bool>,
    /// Of an event that another back end has published.
    data: Option<String>,
    message_id: Option<i64>,
    /// The receiver is in the conversation and may see the message's text.
    is_visible: Option<bool>,
    content: Option<String>,
    /// The range ends before it: no more room for its text.
    is_cut: Option<bool>,
    created_at: Option<DateTime<Utc>>,
    edited_at: Option<DateTime<Utc>>,
    deleted_at: Option<DateTime<Utc>>,
    sender_id: Option<i64>,
    sender_username: Option<String>,
    sender_avatar_url: Option<String>,
    /// The reader's in the conversation; `None` if they are not in it.
    unread_count: Option<i64>,
    event_at: Option<DateTime<Utc>>,
    request_id: Option<String>,
    traceparent: Option<String>,
}

/// The events after each position, in the order of the request. A head and its rows are of one snapshot, so they agree.
///
/// A body that is gone ends what is kept of a feed, as if everything up to it were pruned. Pruning deletes bodies only long after the
/// feed's rows, so this repairs what was deleted by hand.
pub async fn ranges(connection: &mut PgConnection, requested: &[RangeAfter]) -> sqlx::Result<Vec<Range>> {
    if requested.is_empty() {
        return Ok(Vec::new());
    }
    let users: Vec<i64> = requested.iter().map(|range| range.user.0).collect();
    let afters: Vec<i64> = requested.iter().map(|range| bigint(range.after)).collect();
    let limit =
        (EVENTS_PER_ANSWER / requested.len()).clamp(*EVENTS_PER_RANGE.start(), *EVENTS_PER_RANGE.end());
    let bytes = BYTES_PER_ANSWER / requested.len();
    let rows = sqlx::query_as!(
        RangeRow,
        r#"SELECT requested.ordinality AS "nth!", h.epoch AS "epoch?", h.head_seq AS "head_seq?",
                  f.seq AS "seq?", e.kind AS "kind?", coalesce(e.conversation_id, m.conversation_id) AS conversation_id,
                  e.message_id AS about_message_id, e.user_id AS about_user_id, about.username AS "about_username?", about.avatar_url AS about_avatar_url,
                  e.count, e.number, e.is_owner, m.id AS "message_id?", p.joined_number < m.number AND m.hidden_from IS DISTINCT FROM h.user_id AND m.text_hidden_from IS DISTINCT FROM h.user_id AS is_visible,
                  sum(octet_length(coalesce(e.data, m.content))) OVER earlier > $4 AND row_number() OVER earlier > 1 AS is_cut,
                  CASE WHEN sum(octet_length(coalesce(e.data, m.content))) OVER earlier <= $4 OR row_number() OVER earlier = 1 THEN m.content
                  END AS content,
                  CASE WHEN sum(octet_length(coalesce(e.data, m.content))) OVER earlier <= $4 OR row_number() OVER earlier = 1 THEN e.data
                  END AS data,
                  m.created_at AS "created_at?",
                  CASE WHEN m.text_hidden_from = h.user_id THEN NULL ELSE m.edited_at END AS edited_at,
                  CASE WHEN m.text_hidden_from = h.user_id THEN m.edited_at ELSE m.deleted_at END AS deleted_at,
                  m.sender_id AS "sender_id?", u.username AS "sender_username?", u.avatar_url AS sender_avatar_url,
                  p.unread_count AS "unread_count?",
                  coalesce(e.created_at, m.created_at) AS event_at,
                  coalesce(e.request_id, m.request_id) AS request_id, coalesce(e.traceparent, m.traceparent) AS traceparent
           FROM unnest($1::bigint[], $2::bigint[]) WITH ORDINALITY AS requested (user_id, after, ordinality)
           LEFT JOIN LATERAL (SELECT * FROM messenger.feed_heads WHERE feed_heads.user_id = requested.user_id LIMIT 1) AS h ON true
           LEFT JOIN LATERAL (
               SELECT * FROM messenger.feed WHERE feed.user_id = h.user_id AND feed.seq > requested.after ORDER BY feed.seq LIMIT $3
           ) AS f ON true
           LEFT JOIN LATERAL (SELECT * FROM messenger.events WHERE events.id = -f.event_id LIMIT 1) AS e ON true
           LEFT JOIN LATERAL (
               SELECT * FROM messenger.messages WHERE messages.id = coalesce(e.message_id, f.event_id) LIMIT 1
           ) AS m ON true
           LEFT JOIN LATERAL (SELECT * FROM messenger.users WHERE users.id = m.sender_id LIMIT 1) AS u ON true
           LEFT JOIN LATERAL (SELECT * FROM messenger.users WHERE users.id = e.user_id LIMIT 1) AS about ON true
           LEFT JOIN LATERAL (
               SELECT * FROM messenger.participants
               WHERE participants.conversation_id = coalesce(e.conversation_id, m.conversation_id) AND participants.user_id = h.user_id LIMIT 1
           ) AS p ON true
           WINDOW earlier AS (PARTITION BY requested.ordinality ORDER BY f.seq)
           ORDER BY requested.ordinality, f.seq"#,
        &users,
        &afters,
        i64::try_from(limit).expect("at most 100"),
        i64::try_from(bytes).expect("at most 4 MiB"),
    )
    .fetch_all(&mut *connection)
    .await?;

    let mut ranges: Vec<Range> = requested
        .iter()
        .map(|&RangeAfter { user, after }| Range { user, after, head: None, events: Vec::new(), more: false })
        .collect();
    let mut of_row = Vec::with_capacity(rows.len());
    for row in &rows {
        let nth = usize::try_from(row.nth).ok().and_then(|nth| nth.checked_sub(1));
        let nth = nth.filter(|nth| *nth < ranges.len()).ok_or(sqlx::Error::RowNotFound)?;
        ranges[nth].head = head(row.epoch, row.head_seq)?;
        of_row.push(nth);
    }
    let moments: Vec<Moment> =
        rows.iter().zip(&of_row).filter_map(|(row, nth)| row.moment(ranges[*nth].user)).collect();
    let mut conversations = conversations::as_of(connection, &moments).await?.into_iter();

    for (row, nth) in rows.into_iter().zip(of_row) {
        let Range { user, events, .. } = &mut ranges[nth];
        let (Some(epoch), Some(seq)) = (row.epoch, row.seq) else { continue };
        let conversation = row.moment(*user).and_then(|_| conversations.next());
        if row.is_cut == Some(true) {
            continue;
        }
        let (at, traced) = (row.event_at, (row.request_id.clone(), row.traceparent.clone()));
        let event = match row {
            RangeRow { kind: Some(name), data: Some(data), .. } => Some((name, published_data(data))),
            row => match event_of(*user, row, conversation) {
                Some(event) => Some((event.name().to_owned(), to_json(&event)?)),
                None => None,
            },
        };
        match (event, at) {
            (Some((name, data)), Some(at)) => {
                let (request_id, traceparent) = traced;
                let position = position(epoch, seq)?;
                events.push(envelope(position, name, data, at, request_id, traceparent));
            }
            _ => events.clear(),
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

impl RangeRow {
    /// Of an event that shows its conversation.
    fn moment(&self, receiver: UserId) -> Option<Moment> {
        let shows =
            matches!(self.kind.as_deref(), Some(kind::CONVERSATION_CREATED | kind::CONVERSATION_UPDATED));
        Some(Moment {
            receiver,
            conversation: ConversationId(self.conversation_id.filter(|_| shows)?),
            number: self.number.unwrap_or(0),
            participant_count: self.count?,
        })
    }
}

/// `None`: its body is gone.
fn event_of(receiver: UserId, row: RangeRow, conversation: Option<Conversation>) -> Option<Event> {
    if row.kind.as_deref() == Some(kind::USER_UPDATED) {
        return Some(Event::UserUpdated(User::stored(
            row.about_user_id?,
            row.about_username,
            row.about_avatar_url,
        )));
    }
    let conversation_id = ConversationId(row.conversation_id?);
    let about = row.about_message_id.map(MessageId);
    match row.kind.as_deref() {
        None | Some(kind::MESSAGE_UPDATED) => {
            let sender = row.sender_id?;
            let mine = sender == receiver.0;
            let message = Message {
                id: MessageId(row.message_id?),
                content: row.content.filter(|_| row.is_visible == Some(true)).unwrap_or_default(),
                conversation_id: Some(conversation_id),
                sender: User::stored(sender, row.sender_username, row.sender_avatar_url),
                created_at: row.created_at?,
                edited_at: row.edited_at,
                deleted_at: row.deleted_at,
                mine,
            };
            Some(if row.kind.is_some() {
                Event::MessageUpdated(message)
            } else if mine {
                Event::MessageSent(MessageSent { message, idempotency_key: None })
            } else {
                Event::Message(message)
            })
        }
        // The row of the message may be gone by now.
        Some(kind::MESSAGE_DELETED) => Some(Event::MessageDeleted(MessageDeleted {
            id: about?,
            conversation_id,
            deleted_at: row.event_at?,
            unread_count: row.unread_count.unwrap_or(0),
        })),
        Some(kind::CONVERSATION_CREATED) => Some(Event::ConversationCreated(Box::new(conversation?))),
        Some(kind::CONVERSATION_UPDATED) => Some(Event::ConversationUpdated(Box::new(conversation?))),
        Some(kind::PARTICIPANT_JOINED) => Some(Event::ParticipantJoined(ParticipantJoined {
            conversation_id,
            user: User::stored(row.about_user_id?, row.about_username, row.about_avatar_url),
            role: Role::stored(row.is_owner?),
        })),
        Some(kind::PARTICIPANT_LEFT) => Some(Event::ParticipantLeft(ParticipantLeft {
            conversation_id,
            user_id: UserId(row.about_user_id?),
        })),
        Some(kind::PARTICIPANT_UPDATED) => Some(Event::ParticipantUpdated(ParticipantUpdated {
            conversation_id,
            user_id: UserId(row.about_user_id?),
            role: Role::stored(row.is_owner?),
        })),
        Some(kind::CONVERSATION_READ) => Some(Event::ConversationRead(ConversationRead {
            conversation_id,
            last_read_message_id: about?,
            unread_count: row.count?,
        })),
        Some(kind::RECEIPT_READ) => Some(Event::ReceiptRead(ReceiptRead {
            conversation_id,
            user_id: UserId(row.about_user_id?),
            last_read_message_id: about?,
        })),
        Some(_) => None,
    }
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

/// For operators: finding a message's event reads the whole feed.
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
                  f.seq AS "seq?", coalesce(e.kind, CASE WHEN m.sender_id = u.id THEN 'message.sent' WHEN m.id IS NOT NULL THEN 'message' END) AS kind,
                  coalesce(e.message_id, m.id) AS message_id, coalesce(e.created_at, m.created_at) AS created_at,
                  coalesce(e.request_id, m.request_id) AS request_id, coalesce(e.traceparent, m.traceparent) AS traceparent
           FROM messenger.users AS u
           JOIN messenger.feed_heads AS h ON h.user_id = u.id
           LEFT JOIN LATERAL (
               SELECT * FROM messenger.feed WHERE feed.user_id = u.id AND (feed.seq = $2 OR feed.event_id = $3) ORDER BY feed.seq LIMIT 1
           ) AS f ON true
           LEFT JOIN messenger.events AS e ON e.id = -f.event_id
           LEFT JOIN messenger.messages AS m ON m.id = f.event_id
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
        head: position(row.epoch, row.head_seq)?,
        first: row.first_seq.map(number).transpose()?,
        event,
    }))
}

/// A number from outside may be larger than any in the database: nothing follows it, as nothing follows the largest.
fn bigint(seq: Seq) -> i64 {
    i64::try_from(seq).unwrap_or(i64::MAX)
}

fn head(epoch: Option<i64>, seq: Option<i64>) -> sqlx::Result<Option<Position>> {
    epoch.zip(seq).map(|(epoch, seq)| position(epoch, seq)).transpose()
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
/// An event is old if it and all before it are beyond the count or the age, so a clock that was once wrong leaves no gap. The scan ends
/// at the first event that is kept, so a user without old ones costs one row.
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
               SELECT f.seq FROM messenger.feed AS f WHERE f.user_id = l.user_id ORDER BY f.seq LIMIT 1
           ) AS first ON true
           LEFT JOIN LATERAL (
               SELECT oldest.seq
               FROM (SELECT f.seq, f.event_id FROM messenger.feed AS f
                     WHERE f.user_id = l.user_id ORDER BY f.seq LIMIT $5) AS oldest
               WHERE oldest.seq > l.head_seq - $3
                 AND coalesce((SELECT m.created_at FROM messenger.messages AS m WHERE m.id = oldest.event_id),
                              (SELECT e.created_at FROM messenger.events AS e WHERE e.id = -oldest.event_id))
                     >= now() - make_interval(secs => $4)
               ORDER BY oldest.seq LIMIT 1
           ) AS kept ON true
           LEFT JOIN LATERAL (
               SELECT coalesce(kept.seq - 1, (
                   SELECT max(oldest.seq)
                   FROM (SELECT f.seq FROM messenger.feed AS f WHERE f.user_id = l.user_id ORDER BY f.seq LIMIT $5) AS oldest
               )) AS seq
               WHERE kept.seq IS DISTINCT FROM first.seq
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

/// With the keys of its events. May be repeated, and run on several replicas concurrently.
pub async fn delete_prefix(connection: &mut PgConnection, prefix: OldPrefix) -> sqlx::Result<u64> {
    let done = sqlx::query!(
        "WITH keys AS (DELETE FROM messenger.event_keys WHERE user_id = $1 AND seq <= $2)
         DELETE FROM messenger.feed WHERE user_id = $1 AND seq <= $2",
        prefix.user.0,
        prefix.seq
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

/// Feeds are pruned in hours; a body stays for longer than any row that refers to it.
pub(super) const BODY_MARGIN: Duration = Duration::from_hours(24);

/// Deletes the bodies, among the oldest `rows`, of events that no feed keeps any more. Those of messages are the messages.
pub async fn delete_old_bodies(connection: &mut PgConnection, keep: Keep, rows: i64) -> sqlx::Result<u64> {
    let done = sqlx::query!(
        "DELETE FROM messenger.events WHERE id IN (
             SELECT oldest.id
             FROM (SELECT id, created_at FROM messenger.events ORDER BY id LIMIT $2) AS oldest
             WHERE oldest.created_at < now() - make_interval(secs => $1)
         )",
        (keep.age + BODY_MARGIN).as_secs_f64(),
        rows,
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
