//! Messages of a conversation: write one, read a page, have read.

use std::sync::Arc;

use http::{HeaderValue, Method, StatusCode};
use protocol::ids::{ConversationId, MessageId};
use serde::Deserialize;
use warp::Filter;

use super::{
    Answer, Api, Resource,
    auth::Credential,
    empty,
    error::ApiError,
    json, otherwise, read,
    request::{BODY_LIMIT, Inbound, PathId, inbound},
    with, with_cursor,
};
use crate::{
    commands::{
        mark_read::{NoConversation, mark_read},
        post_message::{Draft, Refusal, Sent, post_message},
    },
    domain::message::{Content, IdempotencyKey},
    store::messages::{self as store, Window},
};

/// The macro for paths takes a name, not a type with parameters.
type InPath = PathId<ConversationId>;

const PAGE: i64 = 25;
const LARGEST_PAGE: i64 = 100;

pub(super) fn messages(api: &Arc<Api>) -> Resource {
    let path = warp::path!("api" / "conversations" / InPath / "messages");
    let get = path.and(read()).and(inbound()).and(with(api)).then(get_messages);
    let post = path.and(warp::post()).and(inbound()).and(with(api)).then(post_in_conversation);
    let other = path.map(|_| ()).untuple_one().and(otherwise("GET, HEAD, POST"));
    get.or(post).unify().or(other).unify().boxed()
}

#[derive(Deserialize)]
struct MessageBody {
    content: Option<String>,
}

async fn post_in_conversation(id: InPath, mut inbound: Inbound, api: Arc<Api>) -> Answer {
    inbound.require_json()?;
    let credential = api.auth.credential(&inbound).await?;
    let input = read_draft(id, &api, credential, &mut inbound).await;
    let draft = api.auth.or_unauthorized(&api.context.database, credential, input).await?;
    let Sent { message, replayed } =
        post_message(&api.context, credential.actor, draft, inbound.context).await?;
    let mut response = json(StatusCode::CREATED, &message);
    if replayed {
        response.headers_mut().insert("idempotent-replayed", HeaderValue::from_static("true"));
    }
    Ok(response)
}

async fn read_draft(
    id: InPath,
    api: &Api,
    credential: Credential,
    inbound: &mut Inbound,
) -> Result<Draft, ApiError> {
    api.auth.check_origin(credential, inbound)?;
    api.limits.send(credential.actor.user, inbound).await?;
    let body: MessageBody = inbound.json(BODY_LIMIT).await?;
    let key = idempotency_key(inbound)?;
    let content = Content::normalise(body.content.as_deref().unwrap_or_default())
        .map_err(|error| ApiError::unacceptable("content", error.to_string()))?;
    Ok(Draft { conversation: id.or(ApiError::NO_CONVERSATION)?, content, key })
}

fn idempotency_key(inbound: &Inbound) -> Result<Option<IdempotencyKey>, ApiError> {
    let mut values = inbound.headers.get_all("idempotency-key").iter();
    let Some(value) = values.next() else { return Ok(None) };
    // Two keys name no one send.
    let value = if values.next().is_none() { value.as_bytes() } else { b"" };
    let key =
        IdempotencyKey::parse(value).map_err(|error| ApiError::unacceptable(KEY_FIELD, error.to_string()))?;
    Ok(Some(key))
}

/// What `errors` calls the header.
const KEY_FIELD: &str = "idempotencyKey";

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::KeyConflict => {
                Self::unacceptable(KEY_FIELD, "Idempotency-Key was already used for another message")
            }
            Refusal::NoConversation => Self::NO_CONVERSATION,
        }
    }
}

async fn get_messages(id: InPath, inbound: Inbound, api: Arc<Api>) -> Answer {
    let database = &api.context.database;
    let caller = api.auth.caller(database, &inbound).await?;
    let window = Window {
        after: message_id(&inbound, "after")?,
        before: message_id(&inbound, "before")?,
        limit: limit(&inbound)?,
    };
    let marks = marks_read(&inbound)?;
    let id = id.or(ApiError::NO_CONVERSATION)?;
    let page = database
        .run(async |connection| store::page(connection, id, caller.user.id, window).await)
        .await?
        .ok_or(ApiError::NO_CONVERSATION)?;
    let newest = page.messages.iter().map(|message| message.id).max();
    if marks && newest > page.last_read {
        mark_read(&api.context, caller.actor, id, newest, inbound.context).await?;
    }
    Ok(with_cursor(json(StatusCode::OK, &page.messages), caller.cursor))
}

fn message_id(inbound: &Inbound, name: &'static str) -> Result<Option<MessageId>, ApiError> {
    let parse = |id: String| id.parse().map_err(|_| ApiError::unacceptable(name, "No such message"));
    inbound.query(name).map(parse).transpose()
}

fn limit(inbound: &Inbound) -> Result<i64, ApiError> {
    let Some(text) = inbound.query("limit") else { return Ok(PAGE) };
    text.parse()
        .ok()
        .filter(|limit| (1..=LARGEST_PAGE).contains(limit))
        .ok_or_else(|| ApiError::unacceptable("limit", format!("Limit must be from 1 to {LARGEST_PAGE}")))
}

/// Only a GET that the reader's own page asked for, now, says that somebody has read.
fn marks_read(inbound: &Inbound) -> Result<bool, ApiError> {
    let wanted = match inbound.query("markRead").as_deref() {
        None | Some("true") => true,
        Some("false") => false,
        Some(_) => return Err(ApiError::unacceptable("markRead", "markRead must be true or false")),
    };
    Ok(wanted && inbound.method == Method::GET && inbound.is_deliberate())
}

pub(super) fn read_messages(api: &Arc<Api>) -> Resource {
    let path = warp::path!("api" / "conversations" / InPath / "read_messages");
    let post = path.and(warp::post()).and(inbound()).and(with(api)).then(post_read_messages);
    let other = path.map(|_| ()).untuple_one().and(otherwise("POST"));
    post.or(other).unify().boxed()
}

async fn post_read_messages(id: InPath, inbound: Inbound, api: Arc<Api>) -> Answer {
    let credential = api.auth.credential(&inbound).await?;
    let input = api.auth.check_origin(credential, &inbound).and_then(|()| id.or(ApiError::NO_CONVERSATION));
    let id = api.auth.or_unauthorized(&api.context.database, credential, input).await?;
    mark_read(&api.context, credential.actor, id, None, inbound.context).await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

impl From<NoConversation> for ApiError {
    fn from(NoConversation: NoConversation) -> Self {
        Self::NO_CONVERSATION
    }
}
