//! Conversations: start one, list mine, look at one.

use std::sync::Arc;

use http::{HeaderValue, StatusCode, header};
use protocol::ids::ConversationId;
use serde::Deserialize;
use warp::Filter;

use super::{
    Answer, Api, Resource, empty,
    error::ApiError,
    json, otherwise, read,
    request::{BODY_LIMIT, Inbound, PathId, inbound},
    with, with_cursor,
};
use crate::{
    commands::start_conversation::{Outcome, Refusal, start_conversation},
    domain::name::may_be_a_name,
    store::conversations as store,
};

/// The macro for paths takes a name, not a type with parameters.
type InPath = PathId<ConversationId>;

const PAGE: i64 = 25;

pub(super) fn conversations(api: &Arc<Api>) -> Resource {
    let path = warp::path!("api" / "conversations").boxed();
    let get = path.clone().and(read()).and(inbound()).and(with(api)).then(get_conversations);
    let post = path.clone().and(warp::post()).and(inbound()).and(with(api)).then(post_conversation);
    get.or(post).unify().or(path.and(otherwise("GET, HEAD, POST"))).unify().boxed()
}

async fn get_conversations(inbound: Inbound, api: Arc<Api>) -> Answer {
    let database = &api.context.database;
    let caller = api.auth.caller(database, &inbound).await?;
    let unknown = || ApiError::unacceptable("before", "No such conversation");
    let before = inbound.query("before").map(|id| id.parse().map_err(|_| unknown())).transpose()?;
    let page = database
        .run(async |connection| store::page(connection, caller.user.id, before, PAGE).await)
        .await?
        .ok_or_else(unknown)?;
    Ok(with_cursor(json(StatusCode::OK, &page), caller.cursor))
}

#[derive(Deserialize)]
struct StartBody {
    username: Option<String>,
}

async fn post_conversation(mut inbound: Inbound, api: Arc<Api>) -> Answer {
    inbound.require_json()?;
    let credential = api.auth.credential(&inbound).await?;
    let input = async {
        api.auth.check_origin(credential, &inbound)?;
        api.limits.start(credential.actor.user, &inbound).await?;
        let body: StartBody = inbound.json(BODY_LIMIT).await?;
        let username = body.username.as_deref().unwrap_or_default().trim().to_owned();
        if username.is_empty() {
            return Err(ApiError::unacceptable("username", "Username required"));
        }
        if !may_be_a_name(&username) {
            return Err(ApiError::NO_USER);
        }
        Ok(username)
    };
    let input = input.await;
    let username = api.auth.or_unauthorized(&api.context.database, credential, input).await?;
    match start_conversation(&api.context, credential.actor, username, inbound.context).await? {
        Outcome::Created(id, seen) => {
            let mut response = json(StatusCode::CREATED, &seen);
            response.headers_mut().insert(header::LOCATION, location(id));
            Ok(response)
        }
        Outcome::Exists(id) => {
            let mut response = empty(StatusCode::FOUND);
            response.headers_mut().insert(header::LOCATION, location(id));
            Ok(response)
        }
    }
}

fn location(id: ConversationId) -> HeaderValue {
    HeaderValue::from_str(&format!("/api/conversations/{id}")).expect("an id is digits")
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoUser => Self::NO_USER,
            Refusal::Oneself => {
                Self::Forbidden("conversation_with_oneself", "Try start a conversation with someone else")
            }
        }
    }
}

pub(super) fn conversation(api: &Arc<Api>) -> Resource {
    let path = warp::path!("api" / "conversations" / InPath);
    let get = path.and(read()).and(inbound()).and(with(api)).then(get_conversation);
    let other = path.map(|_| ()).untuple_one().and(otherwise("GET, HEAD"));
    get.or(other).unify().boxed()
}

async fn get_conversation(id: InPath, inbound: Inbound, api: Arc<Api>) -> Answer {
    let database = &api.context.database;
    let caller = api.auth.caller(database, &inbound).await?;
    let id = id.or(ApiError::NO_CONVERSATION)?;
    let found = database.run(async |connection| store::find(connection, id, caller.user.id).await).await?;
    Ok(json(StatusCode::OK, &found.ok_or(ApiError::NO_CONVERSATION)?))
}

pub(super) fn other_participant(api: &Arc<Api>) -> Resource {
    let path = warp::path!("api" / "conversations" / InPath / "other_participant");
    let get = path.and(read()).and(inbound()).and(with(api)).then(get_other_participant);
    let other = path.map(|_| ()).untuple_one().and(otherwise("GET, HEAD"));
    get.or(other).unify().boxed()
}

async fn get_other_participant(id: InPath, inbound: Inbound, api: Arc<Api>) -> Answer {
    let database = &api.context.database;
    let caller = api.auth.caller(database, &inbound).await?;
    let id = id.or(ApiError::NO_CONVERSATION)?;
    let found = database
        .run(async |connection| store::other_participant(connection, id, caller.user.id).await)
        .await?;
    Ok(json(StatusCode::OK, &found.ok_or(ApiError::NO_CONVERSATION)?))
}
