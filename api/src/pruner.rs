//! Deletes expired rows in small statements: the beginnings of feeds beyond the age and count that are kept (a client whose
//! cursor is older resyncs) and later the bodies of their events, sessions that ended some days ago, idempotency keys, and unused
//! codes of logins. Removes the texts of messages that are too old, and of groups without members, and later their rows.
//!
//! Replicas do this independently: a repeated deletion does nothing.

use std::time::Duration;

use protocol::ids::{ConversationId, SessionId, UserId};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Keep,
    erasing::erase_next,
    metrics::Metrics,
    publisher::Publisher,
    store::{Database, StoreError, feed, identities, messages, retention, sessions},
};

const USERS: i64 = 500;
const ROWS: i64 = 1_000;
const SESSIONS: i64 = 1_000;
const CONVERSATIONS: i64 = 500;
/// Texts removed in one statement, which holds the lock of their conversation.
const TEXTS: i32 = 200;
/// The same in a group that nobody uses any more.
const TEXTS_OF_LEFT_GROUP: i32 = 2_000;
/// Texts of a group are gone a minute after its last member has left.
const LEFT_GROUPS_EVERY: Duration = Duration::from_secs(10);
/// Operators can look at an ended session for this long.
const ENDED_KEEP: Duration = Duration::from_hours(168);
/// Between two steps of a walk, and between two walks.
const STEP_PAUSE: Duration = Duration::from_secs(1);
const WALK_PAUSE: Duration = Duration::from_mins(10);

#[derive(Debug, PartialEq, Eq)]
pub struct PruneStep {
    pub deleted: u64,
    /// The start of the next step; `None` after the last user.
    pub next: Option<UserId>,
}

/// One step of a walk: the users after this one.
pub async fn prune_after(database: &Database, keep: Keep, after: UserId) -> Result<PruneStep, StoreError> {
    let (prefixes, last) = database
        .run(async |connection| feed::old_prefixes(connection, keep, after, USERS, ROWS).await)
        .await?;
    let mut deleted = 0;
    let mut full = None;
    for prefix in prefixes {
        let rows = database.run(async |connection| feed::delete_prefix(connection, prefix).await).await?;
        deleted += rows;
        // This user may have more: the next step begins with them.
        if rows >= ROWS.cast_unsigned() && full.is_none() {
            full = Some(UserId(prefix.user.0 - 1));
        }
    }
    Ok(PruneStep { deleted, next: full.or(last) })
}

pub async fn prune_bodies(database: &Database, keep: Keep) -> Result<u64, StoreError> {
    database.run(async |connection| feed::delete_old_bodies(connection, keep, ROWS).await).await
}

pub async fn prune_keys(database: &Database, keep: Keep) -> Result<u64, StoreError> {
    let age = keep.idempotency_keys;
    database.run(async |connection| messages::delete_old_keys(connection, age, ROWS).await).await
}

pub async fn prune_codes(database: &Database) -> Result<u64, StoreError> {
    database.run(async |connection| identities::delete_expired_codes(connection, ROWS).await).await
}

/// The messages of one step: how many texts were removed, how many rows deleted, and where the next step begins; `None` after the last
/// conversation.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ExpireStep {
    pub texts: u64,
    pub rows: u64,
    pub next: Option<ConversationId>,
}

/// One step of a walk over the conversations after this one. `publisher`: tells those who had some of the messages unread; without one,
/// gateways find the events by reconciling.
pub async fn expire_after(
    database: &Database,
    publisher: Option<&Publisher>,
    keep: Keep,
    after: ConversationId,
) -> Result<ExpireStep, StoreError> {
    let Some(age) = keep.messages else { return Ok(ExpireStep::default()) };
    let (old, last) = database
        .run(async |connection| {
            retention::conversations_with_old_texts(connection, age, after, CONVERSATIONS).await
        })
        .await?;
    let mut texts = 0;
    let mut full = None;
    for conversation in old {
        let (expired, events) = database
            .run(async |connection| retention::expire_messages(connection, conversation, age, TEXTS).await)
            .await?;
        if let Some(publisher) = publisher {
            publisher.publish(events);
        }
        texts += expired;
        // This conversation may have more: the next step begins with it.
        if expired >= u64::from(TEXTS.cast_unsigned()) && full.is_none() {
            full = Some(ConversationId(conversation.0 - 1));
        }
    }
    let (rows, _) = database
        .run(async |connection| {
            retention::delete_old_rows(connection, keep, after, CONVERSATIONS, i64::from(TEXTS)).await
        })
        .await?;
    let more = (rows > 0).then_some(after);
    Ok(ExpireStep { texts, rows, next: full.or(more).or(last) })
}

/// One step: texts of a group without members. `None`: there are no more.
pub async fn empty_left_group(database: &Database) -> Result<Option<(ConversationId, u64)>, StoreError> {
    database.run(async |connection| retention::empty_left_group(connection, TEXTS_OF_LEFT_GROUP).await).await
}

/// One step: rows of a group without members. `None`: there are no more.
pub async fn delete_left_group(database: &Database, keep: Keep) -> Result<Option<u64>, StoreError> {
    database.run(async |connection| retention::delete_left_group(connection, keep, ROWS).await).await
}

/// One step over the sessions after this one: how many were deleted, and where the next step continues.
pub async fn prune_sessions_after(
    database: &Database,
    after: SessionId,
) -> Result<(u64, Option<SessionId>), StoreError> {
    database
        .run(async |connection| sessions::delete_ended(connection, ENDED_KEEP, after, SESSIONS).await)
        .await
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    pub events: u64,
    pub bodies: u64,
    pub sessions: u64,
    pub keys: u64,
    pub codes: u64,
    pub texts: u64,
    pub messages: u64,
}

pub async fn prune_all(database: &Database, keep: Keep) -> Result<Pruned, StoreError> {
    let mut pruned = Pruned::default();
    let mut after = Some(UserId(0));
    while let Some(user) = after {
        let step = prune_after(database, keep, user).await?;
        pruned.events += step.deleted;
        after = step.next;
    }
    let mut after = Some(SessionId(0));
    while let Some(session) = after {
        let (deleted, next) = prune_sessions_after(database, session).await?;
        pruned.sessions += deleted;
        after = next;
    }
    pruned.bodies = to_the_end(async || prune_bodies(database, keep).await).await?;
    pruned.keys = to_the_end(async || prune_keys(database, keep).await).await?;
    pruned.codes = to_the_end(async || prune_codes(database).await).await?;
    let mut after = Some(ConversationId(0));
    while let Some(conversation) = after {
        let step = expire_after(database, None, keep, conversation).await?;
        pruned.texts += step.texts;
        pruned.messages += step.rows;
        after = step.next;
    }
    while erase_next(database, None).await?.is_some() {}
    while let Some((_, emptied)) = empty_left_group(database).await? {
        pruned.texts += emptied;
    }
    while let Some(rows) = delete_left_group(database, keep).await? {
        pruned.messages += rows;
    }
    Ok(pruned)
}

/// Repeats a step until it deletes nothing.
async fn to_the_end(step: impl AsyncFn() -> Result<u64, StoreError>) -> Result<u64, StoreError> {
    let mut all = 0;
    loop {
        match step().await? {
            0 => return Ok(all),
            deleted => all += deleted,
        }
    }
}

pub async fn run(
    database: Database,
    publisher: Publisher,
    keep: Keep,
    metrics: Metrics,
    stop: CancellationToken,
) {
    let feeds = async {
        let mut after = UserId(0);
        loop {
            let step = prune_after(&database, keep, after).await;
            let more = step.map(|PruneStep { deleted, next }| {
                metrics.pruned_events.inc_by(deleted);
                after = next.unwrap_or(UserId(0));
                next.is_some()
            });
            pause(more, "feeds").await;
        }
    };
    let sessions = async {
        let mut after = SessionId(0);
        loop {
            let step = prune_sessions_after(&database, after).await;
            let more = step.map(|(deleted, next)| {
                metrics.pruned_sessions.inc_by(deleted);
                after = next.unwrap_or(SessionId(0));
                next.is_some()
            });
            pause(more, "sessions").await;
        }
    };
    let bodies = in_steps("event bodies", || prune_bodies(&database, keep));
    let keys = in_steps("idempotency keys", || prune_keys(&database, keep));
    let codes = in_steps("codes", || prune_codes(&database));
    let walks = async { tokio::join!(feeds, sessions, bodies, keys, codes) };
    let texts = async {
        tokio::join!(
            expire(&database, &publisher, keep, &metrics),
            empty_left_groups(&database, &metrics),
            delete_left_groups(&database, keep, &metrics),
        )
    };
    tokio::select! {
        _ = walks => {}
        _ = texts => {}
        () = stop.cancelled() => {}
    }
}

/// Removes old texts permanently, if there is a limit of their age.
async fn expire(database: &Database, publisher: &Publisher, keep: Keep, metrics: &Metrics) {
    if keep.messages.is_none() {
        return std::future::pending().await;
    }
    let (mut after, mut texts, mut rows) = (ConversationId(0), 0, 0);
    loop {
        let step = expire_after(database, Some(publisher), keep, after).await;
        let more = step.map(|step| {
            metrics.expired_messages.inc_by(step.texts);
            metrics.pruned_messages.inc_by(step.rows);
            texts += step.texts;
            rows += step.rows;
            after = step.next.unwrap_or(ConversationId(0));
            if step.next.is_none() && (texts, rows) != (0, 0) {
                tracing::info!(texts, rows, "removed the texts of old messages");
                (texts, rows) = (0, 0);
            }
            step.next.is_some()
        });
        pause(more, "messages").await;
    }
}

/// Texts of groups without members are gone within a minute, so this does not wait for a walk, and retries soon.
async fn empty_left_groups(database: &Database, metrics: &Metrics) {
    loop {
        match empty_left_group(database).await {
            Ok(Some((conversation, texts))) => {
                metrics.emptied_group_messages.inc_by(texts);
                tracing::info!(conversation.id = %conversation, texts, "removed texts of a group without members");
                continue;
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "removing texts of groups without members failed; it is retried in seconds");
            }
        }
        tokio::time::sleep(rand::random_range(LEFT_GROUPS_EVERY / 2..=LEFT_GROUPS_EVERY)).await;
    }
}

async fn delete_left_groups(database: &Database, keep: Keep, metrics: &Metrics) {
    loop {
        let step = delete_left_group(database, keep).await;
        let more = step.map(|rows| {
            metrics.pruned_messages.inc_by(rows.unwrap_or(0));
            rows.is_some()
        });
        pause(more, "groups without members").await;
    }
}

/// Repeats a step permanently, shortly after one that found all it may delete.
async fn in_steps<D: Future<Output = Result<u64, StoreError>>>(what: &'static str, step: impl Fn() -> D) {
    loop {
        let deleted = step().await;
        pause(deleted.map(|deleted| deleted >= ROWS.cast_unsigned()), what).await;
    }
}

/// Waits after a step: shortly if there are more, long after the last one or a failure. At random, so that replicas do not
/// work on the same rows.
async fn pause(more: Result<bool, StoreError>, what: &'static str) {
    let pause = match more {
        Ok(true) => STEP_PAUSE,
        Ok(false) => WALK_PAUSE,
        Err(error) => {
            tracing::warn!(%error, what, "pruning failed; it is retried in minutes");
            WALK_PAUSE
        }
    };
    tokio::time::sleep(rand::random_range(pause / 2..=pause)).await;
}
