//! Groups: made, renamed, and who belongs to them.

use chrono::{DateTime, Utc};
use protocol::{
    event::kind,
    ids::{ConversationId, MessageId, SessionId, UserId},
};
use sqlx::PgConnection;

use super::{
    Appended, AppendedTo, Positions,
    conversations::{self, Moment},
    envelopes, unexpected,
};
use crate::{
    domain::{
        conversation::{Conversation, Role},
        event::{Event, ParticipantJoined, ParticipantLeft, ParticipantUpdated},
        group::{Participant, Title},
        idempotency::KeyHashes,
        user::User,
    },
    request_context::RequestContext,
};

/// Why a member's change of a group is refused, whatever it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    NoSession,
    /// Or not one of this user's.
    NoConversation,
    NotAGroup,
    NotOwner,
    /// The user whom the change is about: there is none, or not in the group.
    NoUser,
}

impl Refusal {
    fn named(outcome: &str) -> sqlx::Result<Self> {
        Ok(match outcome {
            "no_session" => Self::NoSession,
            "no_conversation" => Self::NoConversation,
            "not_a_group" => Self::NotAGroup,
            "not_owner" => Self::NotOwner,
            "no_user" | "not_in" => Self::NoUser,
            other => return Err(unexpected(other)),
        })
    }
}

#[derive(Debug)]
pub enum CreateGroupOutcome {
    Created(Box<Conversation>),
    /// The same key and request as before: the group as it is now; `None` if the user has left it.
    Replayed(Option<Box<Conversation>>),
    KeyConflict,
    UnknownUsers(Vec<String>),
    CannotBeAdded(Vec<String>),
    TooMany,
    NoSession,
}

#[expect(clippy::too_many_arguments, reason = "the parameters of the SQL function")]
pub async fn create(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
    title: &Title,
    usernames: &[String],
    largest: i64,
    hashes: Option<KeyHashes>,
    request: &RequestContext,
) -> sqlx::Result<(CreateGroupOutcome, Vec<Appended>)> {
    let row = sqlx::query!(
        r#"SELECT outcome AS "outcome!", conversation_id, names, event_at, receivers, epochs, seqs
           FROM messenger.create_group($1, $2, $3, $4, $5, $6, $7, $8, $9)"#,
        session.map(|session| session.0),
        user.0,
        title.as_str(),
        usernames,
        largest,
        hashes.as_ref().map(|hashes| &hashes.key[..]),
        hashes.as_ref().map(|hashes| &hashes.content[..]),
        request.request_id,
        request.traceparent(),
    )
    .fetch_one(&mut *connection)
    .await?;
    let names = row.names.unwrap_or_default();
    let none = Vec::new();
    Ok(match (row.outcome.as_str(), row.conversation_id.map(ConversationId), row.event_at) {
        ("created", Some(id), Some(at)) => {
            let positions =
                AppendedTo { receivers: row.receivers, epochs: row.epochs, seqs: row.seqs }.positions()?;
            let members = i64::try_from(positions.len()).unwrap_or(i64::MAX);
            let moment =
                |receiver| Moment { receiver, conversation: id, number: 0, participant_count: members };
            let (own, events) =
                tell(connection, positions, moment, Event::ConversationCreated, user, at, request).await?;
            let own = own.ok_or(sqlx::Error::RowNotFound)?;
            (CreateGroupOutcome::Created(Box::new(own)), events)
        }
        ("replayed", Some(id), _) => {
            let group = conversations::find(connection, id, user).await?;
            (CreateGroupOutcome::Replayed(group.map(Box::new)), none)
        }
        ("key_conflict", ..) => (CreateGroupOutcome::KeyConflict, none),
        ("unknown_users", ..) => (CreateGroupOutcome::UnknownUsers(names), none),
        ("cannot_be_added", ..) => (CreateGroupOutcome::CannotBeAdded(names), none),
        ("too_many", ..) => (CreateGroupOutcome::TooMany, none),
        ("no_session", ..) => (CreateGroupOutcome::NoSession, none),
        _ => return Err(unexpected(&row.outcome)),
    })
}

/// One event about a conversation, which each receiver sees in their own way. Also returns the conversation as `user` sees it.
async fn tell(
    connection: &mut PgConnection,
    positions: Positions,
    moment: impl Fn(UserId) -> Moment,
    event: impl Fn(Box<Conversation>) -> Event,
    user: UserId,
    at: DateTime<Utc>,
    request: &RequestContext,
) -> sqlx::Result<(Option<Conversation>, Vec<Appended>)> {
    let moments: Vec<Moment> = positions.iter().map(|(receiver, _)| moment(*receiver)).collect();
    let seen = conversations::as_of(connection, &moments).await?;
    let own = positions.iter().zip(&seen).find(|((receiver, _), _)| *receiver == user);
    let own = own.map(|(_, conversation)| conversation.clone());
    let mut events = Vec::with_capacity(positions.len());
    for (position, conversation) in positions.into_iter().zip(seen) {
        events.extend(envelopes([position], &event(Box::new(conversation)), at, request)?);
    }
    Ok((own, events))
}

pub async fn rename(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
    conversation: ConversationId,
    title: &Title,
    request: &RequestContext,
) -> sqlx::Result<(Result<Box<Conversation>, Refusal>, Vec<Appended>)> {
    let row = sqlx::query!(
        r#"SELECT outcome AS "outcome!", participant_count, last_number, event_at, receivers, epochs, seqs
           FROM messenger.rename_group($1, $2, $3, $4, $5, $6)"#,
        session.map(|session| session.0),
        user.0,
        conversation.0,
        title.as_str(),
        request.request_id,
        request.traceparent(),
    )
    .fetch_one(&mut *connection)
    .await?;
    let renamed = row.event_at.zip(row.last_number).zip(row.participant_count);
    Ok(match (row.outcome.as_str(), renamed) {
        ("renamed", Some(((at, number), participant_count))) => {
            let positions =
                AppendedTo { receivers: row.receivers, epochs: row.epochs, seqs: row.seqs }.positions()?;
            let moment = |receiver| Moment { receiver, conversation, number, participant_count };
            let (own, events) =
                tell(connection, positions, moment, Event::ConversationUpdated, user, at, request).await?;
            (own.map(Box::new).ok_or(Refusal::NoConversation), events)
        }
        ("same", _) => {
            let group = conversations::find(connection, conversation, user).await?;
            (group.map(Box::new).ok_or(Refusal::NoConversation), Vec::new())
        }
        (refused, _) => (Err(Refusal::named(refused)?), Vec::new()),
    })
}

#[derive(Debug)]
pub enum AddParticipantOutcome {
    Added(Box<Participant>),
    IsIn(Box<Participant>),
    CannotBeAdded,
    Full,
    Refused(Refusal),
}

/// Adds the user that `find_user` returns for `username`; groups have at most `largest` members.
pub async fn add(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
    conversation: ConversationId,
    username: &str,
    largest: i64,
    request: &RequestContext,
) -> sqlx::Result<(AddParticipantOutcome, Vec<Appended>)> {
    let row = sqlx::query!(
        r#"SELECT outcome AS "outcome!", user_id, participant_count, last_number, event_at, receivers, kinds, epochs, seqs
           FROM messenger.add_participant($1, $2, $3, $4, $5, $6, $7)"#,
        session.map(|session| session.0),
        user.0,
        conversation.0,
        username,
        largest,
        request.request_id,
        request.traceparent(),
    )
    .fetch_one(&mut *connection)
    .await?;
    let refused = match row.outcome.as_str() {
        "added" | "is_in" => None,
        "cannot_be_added" => Some(AddParticipantOutcome::CannotBeAdded),
        "full" => Some(AddParticipantOutcome::Full),
        other => Some(AddParticipantOutcome::Refused(Refusal::named(other)?)),
    };
    if let Some(refused) = refused {
        return Ok((refused, Vec::new()));
    }
    let who = UserId(row.user_id.ok_or(sqlx::Error::RowNotFound)?);
    let Some(participant) = participant(connection, conversation, user, who).await? else {
        // Between the two statements one of them has left.
        return Ok((AddParticipantOutcome::Refused(Refusal::NoConversation), Vec::new()));
    };
    let joined = row.event_at.zip(row.last_number).zip(row.participant_count);
    let Some(((at, number), participant_count)) = joined else {
        return Ok((AddParticipantOutcome::IsIn(Box::new(participant)), Vec::new()));
    };
    let appended = AppendedTo { receivers: row.receivers, epochs: row.epochs, seqs: row.seqs };
    let (created, joined) = appended.of_kind(row.kinds, kind::CONVERSATION_CREATED)?;
    let moment = |receiver| Moment { receiver, conversation, number, participant_count };
    let (_, mut events) =
        tell(connection, created, moment, Event::ConversationCreated, who, at, request).await?;
    let event = Event::ParticipantJoined(ParticipantJoined {
        conversation_id: conversation,
        user: participant.user.clone(),
        role: Role::Member,
    });
    events.extend(envelopes(joined, &event, at, request)?);
    Ok((AddParticipantOutcome::Added(Box::new(participant)), events))
}

#[derive(Debug)]
pub enum SetRoleOutcome {
    Done(Box<Participant>),
    LastOwner,
    Refused(Refusal),
}

pub async fn set_role(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
    conversation: ConversationId,
    who: UserId,
    role: Role,
    request: &RequestContext,
) -> sqlx::Result<(SetRoleOutcome, Vec<Appended>)> {
    let row = sqlx::query!(
        r#"SELECT outcome AS "outcome!", event_at, receivers, epochs, seqs
           FROM messenger.set_role($1, $2, $3, $4, $5, $6, $7)"#,
        session.map(|session| session.0),
        user.0,
        conversation.0,
        who.0,
        role == Role::Owner,
        request.request_id,
        request.traceparent(),
    )
    .fetch_one(&mut *connection)
    .await?;
    let refused = match row.outcome.as_str() {
        "changed" | "same" => None,
        "last_owner" => Some(SetRoleOutcome::LastOwner),
        other => Some(SetRoleOutcome::Refused(Refusal::named(other)?)),
    };
    if let Some(refused) = refused {
        return Ok((refused, Vec::new()));
    }
    let mut events = Vec::new();
    if let Some(at) = row.event_at {
        let positions =
            AppendedTo { receivers: row.receivers, epochs: row.epochs, seqs: row.seqs }.positions()?;
        events = envelopes(positions, &updated(conversation, who, role), at, request)?;
    }
    let outcome = match participant(connection, conversation, user, who).await? {
        Some(participant) => SetRoleOutcome::Done(Box::new(participant)),
        None => SetRoleOutcome::Refused(Refusal::NoUser),
    };
    Ok((outcome, events))
}

fn updated(conversation_id: ConversationId, user_id: UserId, role: Role) -> Event {
    Event::ParticipantUpdated(ParticipantUpdated { conversation_id, user_id, role })
}

pub async fn remove(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
    conversation: ConversationId,
    who: UserId,
    request: &RequestContext,
) -> sqlx::Result<(Result<(), Refusal>, Vec<Appended>)> {
    let row = sqlx::query!(
        r#"SELECT outcome AS "outcome!", successor, event_at, receivers, kinds, epochs, seqs
           FROM messenger.remove_participant($1, $2, $3, $4, $5, $6)"#,
        session.map(|session| session.0),
        user.0,
        conversation.0,
        who.0,
        request.request_id,
        request.traceparent(),
    )
    .fetch_one(connection)
    .await?;
    let ("removed", Some(at)) = (row.outcome.as_str(), row.event_at) else {
        return Ok((Err(Refusal::named(&row.outcome)?), Vec::new()));
    };
    let appended = AppendedTo { receivers: row.receivers, epochs: row.epochs, seqs: row.seqs };
    let (left, succeeded) = appended.of_kind(row.kinds, kind::PARTICIPANT_LEFT)?;
    let event = Event::ParticipantLeft(ParticipantLeft { conversation_id: conversation, user_id: who });
    let mut events = envelopes(left, &event, at, request)?;
    if let Some(successor) = row.successor {
        let event = updated(conversation, UserId(successor), Role::Owner);
        events.extend(envelopes(succeeded, &event, at, request)?);
    }
    Ok((Ok(()), events))
}

/// One participant, as `reader` sees them. `None`: one of them is not in the conversation.
async fn participant(
    connection: &mut PgConnection,
    conversation: ConversationId,
    reader: UserId,
    who: UserId,
) -> sqlx::Result<Option<Participant>> {
    let row = sqlx::query_as!(
        ParticipantRow,
        r#"SELECT user_id AS "user_id!", username, avatar_url, is_owner AS "is_owner!", joined_at AS "joined_at!", last_read_message_id
           FROM messenger.seen_participants WHERE conversation_id = $1 AND reader = $2 AND user_id = $3"#,
        conversation.0,
        reader.0,
        who.0,
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(Participant::from))
}

#[derive(Debug)]
pub enum ParticipantsPage {
    /// Those who joined first come first.
    Found(Vec<Participant>),
    NoConversation,
    /// `after` was never in it.
    NoAfter,
}

/// At most `limit` participants after `after`, which may have left.
pub async fn page(
    connection: &mut PgConnection,
    conversation: ConversationId,
    reader: UserId,
    after: Option<UserId>,
    limit: i64,
) -> sqlx::Result<ParticipantsPage> {
    let place = sqlx::query!(
        r#"SELECT coalesce(now.joined_at, formerly.joined_at) AS joined_at
           FROM messenger.participants AS reader
           LEFT JOIN messenger.participants AS now ON now.conversation_id = reader.conversation_id AND now.user_id = $3
           LEFT JOIN messenger.former_participants AS formerly
               ON formerly.conversation_id = reader.conversation_id AND formerly.user_id = $3
           WHERE reader.conversation_id = $1 AND reader.user_id = $2"#,
        conversation.0,
        reader.0,
        after.map(|user| user.0),
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(place) = place else { return Ok(ParticipantsPage::NoConversation) };
    if after.is_some() && place.joined_at.is_none() {
        return Ok(ParticipantsPage::NoAfter);
    }
    let rows = sqlx::query_as!(
        ParticipantRow,
        r#"SELECT user_id AS "user_id!", username, avatar_url, is_owner AS "is_owner!", joined_at AS "joined_at!", last_read_message_id
           FROM messenger.seen_participants
           WHERE conversation_id = $1 AND reader = $2 AND ($3::timestamptz IS NULL OR (joined_at, user_id) > ($3, $4))
           ORDER BY joined_at, user_id LIMIT $5"#,
        conversation.0,
        reader.0,
        place.joined_at,
        after.map(|user| user.0),
        limit,
    )
    .fetch_all(connection)
    .await?;
    Ok(ParticipantsPage::Found(rows.into_iter().map(Participant::from).collect()))
}

struct ParticipantRow {
    user_id: i64,
    username: Option<String>,
    avatar_url: Option<String>,
    is_owner: bool,
    joined_at: DateTime<Utc>,
    last_read_message_id: Option<i64>,
}

impl From<ParticipantRow> for Participant {
    fn from(row: ParticipantRow) -> Self {
        Self {
            user: User::stored(row.user_id, row.username, row.avatar_url),
            role: Role::stored(row.is_owner),
            joined_at: row.joined_at,
            last_read_message_id: row.last_read_message_id.map(MessageId),
        }
    }
}
