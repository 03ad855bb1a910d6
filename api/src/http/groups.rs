//! Groups: make one, rename it, and its members. [`participants`] also lists the two of a direct conversation.

use std::sync::Arc;

use http::StatusCode;
use protocol::ids::{ConversationId, UserId};
use serde::Deserialize;

use super::{
    Api, HandlerResult,
    auth::{Caller, LiveCaller},
    conversations::created,
    empty,
    error::ApiError,
    idempotency, json,
    request::{Inbound, Json, NoBody},
    with_cursor,
};
use crate::{
    commands::{
        change_members::{self, AddParticipantOutcome, SetRoleOutcome},
        create_group::{CreateGroupOutcome, NewGroup, create_group},
        rename_group::rename_group,
    },
    domain::{conversation::Role, group::Title, name::may_be_a_name},
    store::groups::{self as store, ParticipantsPage, Refusal},
};

const LARGEST_PAGE: i64 = 100;
/// Names in an error sentence.
const NAMED: usize = 5;

pub(super) fn new_group(
    inbound: &Inbound,
    title: Option<&str>,
    usernames: Vec<Option<String>>,
) -> Result<NewGroup, ApiError> {
    let key = idempotency::key(inbound)?;
    let title = self::title(title)?;
    let trimmed = |name: Option<String>| name.as_deref().unwrap_or_default().trim().to_owned();
    let mut usernames: Vec<String> = usernames.into_iter().map(trimmed).collect();
    usernames.sort_unstable();
    usernames.dedup();
    let malformed: Vec<String> = usernames.iter().filter(|name| !may_be_a_name(name)).cloned().collect();
    if !malformed.is_empty() {
        return Err(unknown_users(&malformed));
    }
    Ok(NewGroup { title, usernames, key })
}

fn title(text: Option<&str>) -> Result<Title, ApiError> {
    Title::normalise(text.unwrap_or_default())
        .map_err(|error| ApiError::unacceptable("title", error.to_string()))
}

fn unknown_users(names: &[String]) -> ApiError {
    ApiError::unacceptable("usernames", format!("No such user: {}", shortened(names)))
}

fn shortened(names: &[String]) -> String {
    let some = names.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(NAMED) {
        0 => some,
        more => format!("{some} and {more} more"),
    }
}

pub(super) async fn create(api: Arc<Api>, caller: Caller, group: NewGroup) -> HandlerResult {
    let largest = api.largest_group;
    let too_many = || ApiError::unacceptable("usernames", format!("A group has at most {largest} members"));
    // Two names may be of one user, in another case or normal form; looking up any number of names has no bound.
    if group.usernames.len() > 2 * largest {
        return Err(too_many());
    }
    match create_group(&api.context, caller.actor, group, members(largest), caller.context).await? {
        CreateGroupOutcome::Created(group) => Ok(created(group.id, json(StatusCode::CREATED, &group))),
        CreateGroupOutcome::Replayed(Some(group)) => Ok(created(group.id, idempotency::replayed(&group))),
        CreateGroupOutcome::Replayed(None) => Err(ApiError::NO_CONVERSATION),
        CreateGroupOutcome::KeyConflict => Err(idempotency::conflict("group")),
        CreateGroupOutcome::UnknownUsers(names) => Err(unknown_users(&names)),
        CreateGroupOutcome::CannotBeAdded(names) => {
            let sentence = format!("You cannot add {}", shortened(&names));
            Err(ApiError::unacceptable("usernames", sentence))
        }
        CreateGroupOutcome::TooMany => Err(too_many()),
        CreateGroupOutcome::NoSession => Err(ApiError::Unauthorized),
    }
}

fn members(largest: usize) -> i64 {
    i64::try_from(largest).unwrap_or(i64::MAX)
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoSession => Self::Unauthorized,
            Refusal::NoConversation => Self::NO_CONVERSATION,
            Refusal::NotAGroup => Self::NotNow("not_a_group", "This is a conversation of two"),
            Refusal::NotOwner => Self::Forbidden("not_owner", "Only an owner of the group can do this"),
            Refusal::NoUser => Self::NO_USER,
        }
    }
}

fn group(inbound: &Inbound) -> Result<ConversationId, ApiError> {
    inbound.id().ok_or(ApiError::NO_CONVERSATION)
}

/// No user has the id 0, so a malformed id is treated as every other unknown one.
fn member(inbound: &Inbound) -> UserId {
    inbound.nth_id(1).unwrap_or(UserId(0))
}

#[derive(Deserialize)]
pub(super) struct TitleBody {
    title: Option<String>,
}

pub(super) fn new_title(
    inbound: &Inbound,
    Json(body): Json<TitleBody>,
) -> Result<(ConversationId, Title), ApiError> {
    let title = title(body.title.as_deref())?;
    Ok((group(inbound)?, title))
}

pub(super) async fn rename(
    api: Arc<Api>,
    caller: Caller,
    (id, title): (ConversationId, Title),
) -> HandlerResult {
    let group = rename_group(&api.context, caller.actor, id, title, caller.context).await??;
    Ok(json(StatusCode::OK, &group))
}

pub(super) async fn participants(api: Arc<Api>, reader: LiveCaller, inbound: Inbound) -> HandlerResult {
    let unknown = || ApiError::unacceptable("after", "No such participant");
    let after = inbound.query("after").map(|id| id.parse().map_err(|_| unknown())).transpose()?;
    let limit = inbound.limit(LARGEST_PAGE, LARGEST_PAGE)?;
    let id = group(&inbound)?;
    let page = async |connection: &mut _| store::page(connection, id, reader.user.id, after, limit).await;
    match api.context.database.run(page).await? {
        ParticipantsPage::Found(participants) => {
            Ok(with_cursor(json(StatusCode::OK, &participants), reader.cursor))
        }
        ParticipantsPage::NoConversation => Err(ApiError::NO_CONVERSATION),
        ParticipantsPage::NoAfter => Err(unknown()),
    }
}

#[derive(Deserialize)]
pub(super) struct MemberBody {
    username: Option<String>,
}

pub(super) fn new_member(
    inbound: &Inbound,
    Json(body): Json<MemberBody>,
) -> Result<(ConversationId, String), ApiError> {
    let username = body.username.as_deref().unwrap_or_default().trim();
    if username.is_empty() {
        return Err(ApiError::unacceptable("username", "Username required"));
    }
    // The empty name is nobody's, so a malformed one is treated as every other unknown one.
    let username = if may_be_a_name(username) { username } else { "" };
    Ok((group(inbound)?, username.to_owned()))
}

pub(super) async fn add(
    api: Arc<Api>,
    caller: Caller,
    (id, username): (ConversationId, String),
) -> HandlerResult {
    let largest = members(api.largest_group);
    match change_members::add(&api.context, caller.actor, id, username, largest, caller.context).await? {
        AddParticipantOutcome::Added(participant) => Ok(json(StatusCode::CREATED, &participant)),
        AddParticipantOutcome::IsIn(participant) => Ok(json(StatusCode::OK, &participant)),
        AddParticipantOutcome::CannotBeAdded => {
            Err(ApiError::NotNow("cannot_be_added", "You cannot add this user"))
        }
        AddParticipantOutcome::Full => Err(ApiError::NotNow("group_full", "The group is full")),
        AddParticipantOutcome::Refused(refusal) => Err(refusal.into()),
    }
}

#[derive(Deserialize)]
pub(super) struct RoleBody {
    role: Option<String>,
}

pub(super) fn new_role(
    inbound: &Inbound,
    Json(body): Json<RoleBody>,
) -> Result<(ConversationId, UserId, Role), ApiError> {
    let role = match body.role.as_deref() {
        Some("owner") => Role::Owner,
        Some("member") => Role::Member,
        _ => return Err(ApiError::unacceptable("role", "Role must be owner or member")),
    };
    Ok((group(inbound)?, member(inbound), role))
}

pub(super) async fn set_role(
    api: Arc<Api>,
    caller: Caller,
    (id, who, role): (ConversationId, UserId, Role),
) -> HandlerResult {
    match change_members::set_role(&api.context, caller.actor, id, who, role, caller.context).await? {
        SetRoleOutcome::Done(participant) => Ok(json(StatusCode::OK, &participant)),
        SetRoleOutcome::LastOwner => Err(ApiError::NotNow("last_owner", "A group has at least one owner")),
        SetRoleOutcome::Refused(refusal) => Err(refusal.into()),
    }
}

pub(super) fn one_member(inbound: &Inbound, _: NoBody) -> Result<(ConversationId, UserId), ApiError> {
    Ok((group(inbound)?, member(inbound)))
}

pub(super) async fn remove(
    api: Arc<Api>,
    caller: Caller,
    (id, who): (ConversationId, UserId),
) -> HandlerResult {
    change_members::remove(&api.context, caller.actor, id, who, caller.context).await??;
    Ok(empty(StatusCode::NO_CONTENT))
}
