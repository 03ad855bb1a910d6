//! Users: by name, and their profiles.

use protocol::ids::{SessionId, UserId};
use sqlx::PgConnection;

use super::{Appended, AppendedTo, envelopes, unexpected};
use crate::{
    domain::{
        event::Event,
        user::{AddableBy, OwnUser, User},
    },
    request_context::RequestContext,
};

const SUGGESTIONS: i64 = 5;
/// In a larger group nobody is told of a member's new name.
pub(super) const SMALL_GROUP: i64 = 32;
/// Users who are told of a new name, besides the user.
pub(super) const MOST_TOLD: i64 = 1_000;

/// `None` leaves a value as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProfileChange {
    pub username: Option<String>,
    pub avatar_url: Option<Option<String>>,
    pub shares_presence: Option<bool>,
    pub addable_by: Option<AddableBy>,
}

#[derive(Debug)]
pub enum UpdateUserOutcome {
    /// Also if nothing had to change.
    Done(OwnUser),
    NameTaken,
    NoSession,
}

pub async fn update(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
    change: &ProfileChange,
    request: &RequestContext,
) -> sqlx::Result<(UpdateUserOutcome, Vec<Appended>)> {
    let row = sqlx::query!(
        r#"SELECT outcome AS "outcome!", username, avatar_url, shares_presence, addable_by, event_at, receivers, epochs, seqs
           FROM messenger.update_user($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)"#,
        session.map(|session| session.0),
        user.0,
        change.username,
        change.avatar_url.is_some(),
        change.avatar_url.as_ref().and_then(Option::as_deref),
        change.shares_presence,
        change.addable_by.map(AddableBy::as_str),
        SMALL_GROUP,
        MOST_TOLD,
        request.request_id,
        request.traceparent(),
    )
    .fetch_one(connection)
    .await?;
    let changed = match row.outcome.as_str() {
        "updated" | "unchanged" => row.username.zip(row.shares_presence).zip(row.addable_by),
        "taken" => return Ok((UpdateUserOutcome::NameTaken, Vec::new())),
        "no_session" => return Ok((UpdateUserOutcome::NoSession, Vec::new())),
        other => return Err(unexpected(other)),
    };
    let ((username, shares_presence), addable_by) = changed.ok_or_else(|| unexpected(&row.outcome))?;
    let user = User { id: user, username, avatar_url: row.avatar_url };
    let appended = AppendedTo { receivers: row.receivers, epochs: row.epochs, seqs: row.seqs };
    let events = match row.event_at {
        Some(at) => envelopes(appended.positions()?, &Event::UserUpdated(user.clone()), at, request)?,
        None => Vec::new(),
    };
    let addable_by = AddableBy::parse(&addable_by).ok_or_else(|| unexpected(&addable_by))?;
    Ok((UpdateUserOutcome::Done(OwnUser { user, shares_presence, addable_by }), events))
}

#[derive(Debug)]
pub enum PutUserOutcome {
    Created(User),
    /// Also if nothing had to change.
    Changed(User),
    NameTaken,
}

/// The user of a subject of the external issuer; created if missing.
pub async fn put(
    connection: &mut PgConnection,
    issuer: &str,
    subject: &str,
    change: &ProfileChange,
    request: &RequestContext,
) -> sqlx::Result<(PutUserOutcome, Vec<Appended>)> {
    let row = sqlx::query!(
        r#"SELECT outcome AS "outcome!", user_id, username, avatar_url, event_at, receivers, epochs, seqs
           FROM messenger.put_user($1, $2, $3, $4, $5, $6, $7, $8, $9)"#,
        issuer,
        subject,
        change.username,
        change.avatar_url.is_some(),
        change.avatar_url.as_ref().and_then(Option::as_deref),
        SMALL_GROUP,
        MOST_TOLD,
        request.request_id,
        request.traceparent(),
    )
    .fetch_one(connection)
    .await?;
    if row.outcome == "taken" {
        return Ok((PutUserOutcome::NameTaken, Vec::new()));
    }
    let (id, username) = row.user_id.zip(row.username).ok_or_else(|| unexpected(&row.outcome))?;
    let user = User { id: UserId(id), username, avatar_url: row.avatar_url };
    let appended = AppendedTo { receivers: row.receivers, epochs: row.epochs, seqs: row.seqs };
    let events = match row.event_at {
        Some(at) => envelopes(appended.positions()?, &Event::UserUpdated(user.clone()), at, request)?,
        None => Vec::new(),
    };
    let outcome = match row.outcome.as_str() {
        "created" => PutUserOutcome::Created(user),
        "updated" | "unchanged" => PutUserOutcome::Changed(user),
        other => return Err(unexpected(other)),
    };
    Ok((outcome, events))
}

pub async fn find_by_name(connection: &mut PgConnection, username: &str) -> sqlx::Result<Option<User>> {
    sqlx::query_as!(
        User,
        "SELECT id, username, avatar_url FROM messenger.users WHERE id = (SELECT messenger.find_user($1))",
        username
    )
    .fetch_optional(connection)
    .await
}

/// The first names with this prefix, in any case and normal form, without `me`. A range, not a pattern: no character of the prefix is
/// special, and every plan uses the index. U+10FFFF sorts after every character of a name.
pub async fn names_with_prefix(
    connection: &mut PgConnection,
    prefix: &str,
    me: UserId,
) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar!(
        r#"SELECT username FROM messenger.users
           WHERE messenger.fold_name(username) COLLATE "C" >= messenger.fold_name($1)
             AND messenger.fold_name(username) COLLATE "C" < messenger.fold_name($1) || chr(1114111)
             AND id <> $2
           ORDER BY messenger.fold_name(username) COLLATE "C", username COLLATE "C"
           LIMIT $3"#,
        prefix,
        me.0,
        SUGGESTIONS,
    )
    .fetch_all(connection)
    .await
}
