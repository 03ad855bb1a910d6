//! Conversations: start one, list mine, look at one.

use std::sync::Arc;

use http::{HeaderValue, StatusCode, header};
use protocol::ids::ConversationId;
use serde::{Deserialize, Deserializer};
use warp::reply::Response;

use super::{
    Api, HandlerResult,
    auth::{Caller, LiveCaller},
    empty,
    error::ApiError,
    groups, json,
    request::{Inbound, Json},
    with_cursor,
};
use crate::{
    commands::{
        create_group::NewGroup,
        start_conversation::{StartConversationOutcome, start_conversation},
    },
    domain::name::may_be_a_name,
    store::conversations as store,
};

const PAGE: i64 = 25;

pub(super) async fn list(api: Arc<Api>, reader: LiveCaller, inbound: Inbound) -> HandlerResult {
    let unknown = || ApiError::unacceptable("before", "No such conversation");
    let before = inbound.query("before").map(|id| id.parse().map_err(|_| unknown())).transpose()?;
    let page = async |connection: &mut _| store::page(connection, reader.user.id, before, PAGE).await;
    let page = api.context.database.run(page).await?.ok_or_else(unknown)?;
    Ok(with_cursor(json(StatusCode::OK, &page), reader.cursor))
}

#[derive(Deserialize)]
pub(super) struct StartBody {
    username: Option<String>,
    title: Option<String>,
    /// Makes a group, also when it is empty. `null` is no list.
    #[serde(default, deserialize_with = "some")]
    usernames: Option<Vec<Option<String>>>,
}

fn some<'de, D: Deserializer<'de>, T: Deserialize<'de>>(value: D) -> Result<Option<T>, D::Error> {
    T::deserialize(value).map(Some)
}

/// Of a body with a thousand names.
pub(super) const LARGEST_BODY: usize = 256 * 1024;

pub(super) enum NewConversation {
    With(String),
    Group(NewGroup),
}

pub(super) fn new(inbound: &Inbound, Json(body): Json<StartBody>) -> Result<NewConversation, ApiError> {
    if let Some(usernames) = body.usernames {
        return groups::new_group(inbound, body.title.as_deref(), usernames).map(NewConversation::Group);
    }
    let username = body.username.as_deref().unwrap_or_default().trim();
    if username.is_empty() {
        return Err(ApiError::unacceptable("username", "Username required"));
    }
    if !may_be_a_name(username) {
        return Err(ApiError::NO_USER);
    }
    Ok(NewConversation::With(username.to_owned()))
}

pub(super) async fn start(api: Arc<Api>, caller: Caller, new: NewConversation) -> HandlerResult {
    let username = match new {
        NewConversation::With(username) => username,
        NewConversation::Group(group) => return groups::create(api, caller, group).await,
    };
    match start_conversation(&api.context, caller.actor, username, caller.context).await? {
        StartConversationOutcome::Created(conversation) => {
            Ok(created(conversation.id, json(StatusCode::CREATED, &conversation)))
        }
        StartConversationOutcome::Exists(id) => Ok(created(id, empty(StatusCode::FOUND))),
        StartConversationOutcome::NoUser => Err(ApiError::NO_USER),
        StartConversationOutcome::Oneself => {
            let sentence = "You cannot start a conversation with yourself";
            Err(ApiError::Forbidden("cannot_start_with_yourself", sentence))
        }
        StartConversationOutcome::NoSession => Err(ApiError::Unauthorized),
    }
}

/// Says where the conversation is.
pub(super) fn created(id: ConversationId, mut response: Response) -> Response {
    let location = HeaderValue::from_str(&format!("/api/conversations/{id}")).expect("an id is digits");
    response.headers_mut().insert(header::LOCATION, location);
    response
}

pub(super) async fn find(api: Arc<Api>, reader: LiveCaller, inbound: Inbound) -> HandlerResult {
    let id: ConversationId = inbound.id().ok_or(ApiError::NO_CONVERSATION)?;
    let find = async |connection: &mut _| store::find(connection, id, reader.user.id).await;
    let found = api.context.database.run(find).await?.ok_or(ApiError::NO_CONVERSATION)?;
    Ok(json(StatusCode::OK, &found))
}

pub(super) async fn other_participant(api: Arc<Api>, reader: LiveCaller, inbound: Inbound) -> HandlerResult {
    let id: ConversationId = inbound.id().ok_or(ApiError::NO_CONVERSATION)?;
    let find = async |connection: &mut _| store::other_participant(connection, id, reader.user.id).await;
    let found = api.context.database.run(find).await?.ok_or(ApiError::NO_CONVERSATION)?;
    Ok(json(StatusCode::OK, &found))
}
