//! Messages of a conversation: send one, read a page, mark as read.

use std::sync::Arc;

use http::{Method, StatusCode};
use protocol::ids::{ConversationId, MessageId};
use serde::Deserialize;

use super::{
    Api, HandlerResult,
    auth::{Caller, LiveCaller},
    empty,
    error::ApiError,
    idempotency, json,
    request::{Inbound, Json, NoBody},
    with_cursor,
};
use crate::{
    commands::{
        delete_message::{DeleteMessageOutcome, delete_message},
        edit_message::{Edit, EditMessageOutcome, edit_message},
        mark_read::{self, MarkReadOutcome},
        post_message::{Draft, PostMessageOutcome, post_message},
    },
    domain::message::Content,
    store::messages::{self as store, MessagePage, Window},
};

const PAGE: i64 = 25;
const LARGEST_PAGE: i64 = 100;

pub(super) fn conversation(inbound: &Inbound, _: NoBody) -> Result<ConversationId, ApiError> {
    inbound.id().ok_or(ApiError::NO_CONVERSATION)
}

#[derive(Deserialize)]
pub(super) struct MessageBody {
    content: Option<String>,
}

/// Of a body with a message of `longest` code points: JSON may write one as two escapes of six bytes.
pub(super) fn largest_body(longest: usize) -> usize {
    12 * longest + 1_024
}

pub(super) fn draft(
    inbound: &Inbound,
    Json(body): Json<MessageBody>,
    longest: usize,
) -> Result<Draft, ApiError> {
    let key = idempotency::key(inbound)?;
    let content = content(&body, longest)?;
    Ok(Draft { conversation: conversation(inbound, NoBody)?, content, key })
}

/// The message of the path. An id that is none is judged like one that does not exist: after the conversation.
fn message(inbound: &Inbound) -> Option<MessageId> {
    inbound.parameters.get(1)?.parse().ok()
}

pub(super) fn edit_of(
    inbound: &Inbound,
    Json(body): Json<MessageBody>,
    longest: usize,
) -> Result<Edit, ApiError> {
    let content = content(&body, longest)?;
    Ok(Edit { conversation: conversation(inbound, NoBody)?, message: message(inbound), content })
}

fn content(body: &MessageBody, longest: usize) -> Result<Content, ApiError> {
    Content::normalise(body.content.as_deref().unwrap_or_default(), longest)
        .map_err(|error| ApiError::unacceptable("content", error.to_string()))
}

pub(super) fn one(inbound: &Inbound, _: NoBody) -> Result<(ConversationId, Option<MessageId>), ApiError> {
    Ok((conversation(inbound, NoBody)?, message(inbound)))
}

pub(super) async fn send(api: Arc<Api>, caller: Caller, draft: Draft) -> HandlerResult {
    match post_message(&api.context, caller.actor, draft, caller.context).await? {
        PostMessageOutcome::Sent(message) => Ok(json(StatusCode::CREATED, &message)),
        PostMessageOutcome::Replayed(message) => Ok(idempotency::replayed(&message)),
        PostMessageOutcome::KeyConflict => Err(idempotency::conflict("message")),
        PostMessageOutcome::NoConversation => Err(ApiError::NO_CONVERSATION),
        PostMessageOutcome::NoSession => Err(ApiError::Unauthorized),
    }
}

const NOT_YOURS: ApiError = ApiError::Forbidden("not_yours", "This message is not yours");

pub(super) async fn edit(api: Arc<Api>, caller: Caller, edit: Edit) -> HandlerResult {
    match edit_message(&api.context, caller.actor, edit, api.edit_window, caller.context).await? {
        EditMessageOutcome::Edited(message) => Ok(json(StatusCode::OK, &message)),
        EditMessageOutcome::WindowOver => {
            Err(ApiError::Forbidden("edit_window_over", "This message is too old to be edited"))
        }
        EditMessageOutcome::NotYours => Err(NOT_YOURS),
        EditMessageOutcome::NoMessage => Err(ApiError::NO_MESSAGE),
        EditMessageOutcome::NoConversation => Err(ApiError::NO_CONVERSATION),
        EditMessageOutcome::NoSession => Err(ApiError::Unauthorized),
    }
}

pub(super) async fn delete(
    api: Arc<Api>,
    caller: Caller,
    (conversation, message): (ConversationId, Option<MessageId>),
) -> HandlerResult {
    match delete_message(&api.context, caller.actor, conversation, message, caller.context).await? {
        DeleteMessageOutcome::Deleted => Ok(empty(StatusCode::NO_CONTENT)),
        DeleteMessageOutcome::NotYours => Err(NOT_YOURS),
        DeleteMessageOutcome::NoMessage => Err(ApiError::NO_MESSAGE),
        DeleteMessageOutcome::NoConversation => Err(ApiError::NO_CONVERSATION),
        DeleteMessageOutcome::NoSession => Err(ApiError::Unauthorized),
    }
}

/// What clients should know before they send. No credential is looked at.
pub(super) async fn limits(api: Arc<Api>, _: Inbound, _: NoBody) -> HandlerResult {
    let limits = serde_json::json!({
        "maxMessageLength": api.longest_message,
        "maxGroupSize": api.largest_group,
        "editWindowSeconds": api.edit_window.as_secs(),
    });
    Ok(json(StatusCode::OK, &limits))
}

pub(super) async fn list(api: Arc<Api>, reader: LiveCaller, inbound: Inbound) -> HandlerResult {
    let window = Window {
        after: message_id(&inbound, "after")?,
        before: message_id(&inbound, "before")?,
        limit: inbound.limit(PAGE, LARGEST_PAGE)?,
    };
    let marks = marks_read(&inbound)?;
    let id = conversation(&inbound, NoBody)?;
    let page = async |connection: &mut _| store::page(connection, id, reader.user.id, window).await;
    let (messages, unread) = match api.context.database.run(page).await? {
        MessagePage::Found { messages, unread } => (messages, unread),
        MessagePage::NoConversation => return Err(ApiError::NO_CONVERSATION),
        MessagePage::NoAfter => return Err(no_message("after")),
        MessagePage::NoBefore => return Err(no_message("before")),
    };
    if marks && unread.is_some() {
        marked(mark_read::mark_read(&api.context, reader.actor, id, unread, inbound.context).await?)?;
    }
    Ok(with_cursor(json(StatusCode::OK, &messages), reader.cursor))
}

fn message_id(inbound: &Inbound, name: &'static str) -> Result<Option<MessageId>, ApiError> {
    inbound.query(name).map(|id| id.parse().map_err(|_| no_message(name))).transpose()
}

fn no_message(field: &'static str) -> ApiError {
    ApiError::unacceptable(field, "No such message")
}

/// Only a GET whose answer the user sees now marks messages as read.
fn marks_read(inbound: &Inbound) -> Result<bool, ApiError> {
    let wanted = match inbound.query("markRead").as_deref() {
        None | Some("true") => true,
        Some("false") => false,
        Some(_) => return Err(ApiError::unacceptable("markRead", "markRead must be true or false")),
    };
    Ok(wanted && inbound.method == Method::GET && inbound.is_deliberate())
}

pub(super) async fn mark_read(api: Arc<Api>, caller: Caller, id: ConversationId) -> HandlerResult {
    marked(mark_read::mark_read(&api.context, caller.actor, id, None, caller.context).await?)?;
    Ok(empty(StatusCode::NO_CONTENT))
}

fn marked(outcome: MarkReadOutcome) -> Result<(), ApiError> {
    match outcome {
        MarkReadOutcome::Moved | MarkReadOutcome::Unmoved => Ok(()),
        MarkReadOutcome::NoConversation => Err(ApiError::NO_CONVERSATION),
        MarkReadOutcome::NoSession => Err(ApiError::Unauthorized),
    }
}
