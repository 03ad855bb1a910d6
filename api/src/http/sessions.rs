//! The sessions of a user: list them, end one, all others or one's own; and tokens for the stream.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use http::{StatusCode, header};
use protocol::ids::SessionId;
use serde::Serialize;
use warp::reply::Response;

use super::{
    Api, HandlerResult,
    auth::{Caller, LiveCaller},
    empty,
    error::ApiError,
    json,
    request::{Inbound, NoBody},
};
use crate::{
    commands::{
        Actor,
        end_sessions::{EndSessionsOutcome, end_sessions},
    },
    store::sessions::{self as store, SessionsToEnd},
};

/// More are not listed; ending all others ends these too.
const LISTED: i64 = 100;

pub(super) async fn list(api: Arc<Api>, reader: LiveCaller, _: Inbound) -> HandlerResult {
    let list = async |connection: &mut _| {
        store::of_user(connection, reader.user.id, reader.actor.session, LISTED).await
    };
    Ok(json(StatusCode::OK, &api.context.database.run(list).await?))
}

pub(super) fn id(inbound: &Inbound, _: NoBody) -> Result<SessionId, ApiError> {
    inbound.id().ok_or(ApiError::NOT_FOUND)
}

pub(super) async fn end_one(api: Arc<Api>, caller: Caller, id: SessionId) -> HandlerResult {
    end(&api, &caller, SessionsToEnd::One(id)).await
}

pub(super) async fn end_others(api: Arc<Api>, caller: Caller, (): ()) -> HandlerResult {
    end(&api, &caller, SessionsToEnd::Others).await
}

pub(super) async fn log_out(api: Arc<Api>, caller: Caller, (): ()) -> HandlerResult {
    let mut response = end(&api, &caller, SessionsToEnd::Own).await?;
    response.headers_mut().insert(header::SET_COOKIE, api.tokens.no_cookie());
    Ok(response)
}

async fn end(api: &Api, caller: &Caller, which: SessionsToEnd) -> HandlerResult {
    match end_sessions(&api.context, caller.actor, which).await? {
        EndSessionsOutcome::Ended => Ok(empty(StatusCode::NO_CONTENT)),
        EndSessionsOutcome::NotFound => Err(ApiError::NOT_FOUND),
        EndSessionsOutcome::NoSession => Err(ApiError::Unauthorized),
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StreamTokenAnswer {
    token: String,
    #[serde(serialize_with = "crate::domain::time")]
    expires_at: DateTime<Utc>,
}

pub(super) async fn stream_token(
    api: Arc<Api>,
    Caller { actor, expires_at, .. }: Caller,
    (): (),
) -> HandlerResult {
    let database = &api.context.database;
    let ends_at = if let Some(id) = actor.session {
        let session = database.run(async |connection| store::find(connection, id, actor.user).await).await?;
        session.map(|session| session.expires_at)
    } else {
        // The stream of an external token ends with the token.
        let exists =
            database.run(async |connection| store::is_live(connection, None, actor.user).await).await?;
        DateTime::from_timestamp(expires_at, 0).filter(|_| exists)
    };
    Ok(stream_token_answer(&api, actor, ends_at.ok_or(ApiError::Unauthorized)?))
}

/// A token for streams that last until `ends_at` at most.
pub(super) fn stream_token_answer(api: &Api, actor: Actor, ends_at: DateTime<Utc>) -> Response {
    let token = api.tokens.issue_for_stream(actor, ends_at);
    json(StatusCode::OK, &StreamTokenAnswer { token: token.text, expires_at: token.expires_at })
}
