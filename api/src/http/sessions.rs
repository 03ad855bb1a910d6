//! The sessions of a user: which live, ending one, all others, or one's own; and tokens for the stream.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use http::{StatusCode, header};
use protocol::ids::SessionId;
use serde::Serialize;
use warp::Filter;

use super::{
    Answer, Api, Resource,
    auth::Credential,
    empty,
    error::ApiError,
    json, otherwise, read,
    request::{Inbound, PathId, inbound},
    with,
};
use crate::{
    commands::end_session::{NoSuchSession, end_sessions},
    store::sessions::{self as store, Which},
};

/// The macro for paths takes a name, not a type with parameters.
type InPath = PathId<SessionId>;

/// More are not listed; ending all others ends these too.
const LISTED: i64 = 100;

pub(super) fn sessions(api: &Arc<Api>) -> Resource {
    let path = warp::path!("api" / "sessions").boxed();
    let get = path.clone().and(read()).and(inbound()).and(with(api)).then(get_sessions);
    let delete = path.clone().and(warp::delete()).and(inbound()).and(with(api)).then(delete_others);
    get.or(delete).unify().or(path.and(otherwise("GET, HEAD, DELETE"))).unify().boxed()
}

async fn get_sessions(inbound: Inbound, api: Arc<Api>) -> Answer {
    let database = &api.context.database;
    let caller = api.auth.caller(database, &inbound).await?;
    let listed = database
        .run(async |connection| {
            store::of_user(connection, caller.user.id, caller.actor.session, LISTED).await
        })
        .await?;
    Ok(json(StatusCode::OK, &listed))
}

async fn delete_others(inbound: Inbound, api: Arc<Api>) -> Answer {
    let credential = allowed(&inbound, &api).await?;
    end_sessions(&api.context, credential.actor, Which::Others).await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

pub(super) fn session(api: &Arc<Api>) -> Resource {
    let path = warp::path!("api" / "sessions" / InPath);
    let delete = path.and(warp::delete()).and(inbound()).and(with(api)).then(delete_one);
    let other = path.map(|_| ()).untuple_one().and(otherwise("DELETE"));
    delete.or(other).unify().boxed()
}

async fn delete_one(id: InPath, inbound: Inbound, api: Arc<Api>) -> Answer {
    let credential = api.auth.credential(&inbound).await?;
    let input = api.auth.check_origin(credential, &inbound).and_then(|()| id.or(ApiError::NOT_FOUND));
    let id = api.auth.or_unauthorized(&api.context.database, credential, input).await?;
    end_sessions(&api.context, credential.actor, Which::One(id)).await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

impl From<NoSuchSession> for ApiError {
    fn from(NoSuchSession: NoSuchSession) -> Self {
        Self::NOT_FOUND
    }
}

pub(super) fn logout(api: &Arc<Api>) -> Resource {
    let path = warp::path!("api" / "logout").boxed();
    let post = path.clone().and(warp::post()).and(inbound()).and(with(api)).then(post_logout);
    post.or(path.and(otherwise("POST"))).unify().boxed()
}

async fn post_logout(inbound: Inbound, api: Arc<Api>) -> Answer {
    let credential = allowed(&inbound, &api).await?;
    end_sessions(&api.context, credential.actor, Which::Own).await?;
    let mut response = empty(StatusCode::NO_CONTENT);
    response.headers_mut().insert(header::SET_COOKIE, api.auth.no_cookie());
    Ok(response)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StreamTokenAnswer {
    token: String,
    #[serde(serialize_with = "crate::domain::time")]
    expires_at: DateTime<Utc>,
}

pub(super) fn stream_token(api: &Arc<Api>) -> Resource {
    let path = warp::path!("api" / "stream_token").boxed();
    let post = path.clone().and(warp::post()).and(inbound()).and(with(api)).then(post_stream_token);
    post.or(path.and(otherwise("POST"))).unify().boxed()
}

async fn post_stream_token(inbound: Inbound, api: Arc<Api>) -> Answer {
    let Credential { actor, expires_at, .. } = allowed(&inbound, &api).await?;
    let database = &api.context.database;
    let ends_at = match actor.session {
        Some(id) => {
            let session =
                database.run(async |connection| store::find(connection, id, actor.user).await).await?;
            session.map(|session| session.expires_at)
        }
        // What a external token allows ends with it.
        None => {
            let exists =
                database.run(async |connection| store::is_live(connection, None, actor.user).await).await?;
            DateTime::from_timestamp(expires_at, 0).filter(|_| exists)
        }
    };
    let token = api.auth.issue_for_stream(actor, ends_at.ok_or(ApiError::Unauthorized)?);
    let answer = StreamTokenAnswer { token: token.text, expires_at: token.expires_at };
    Ok(json(StatusCode::OK, &answer))
}

/// 401, then 403, for a request that has nothing else to be looked at.
async fn allowed(inbound: &Inbound, api: &Api) -> Result<Credential, ApiError> {
    let credential = api.auth.credential(inbound).await?;
    let origin = api.auth.check_origin(credential, inbound);
    api.auth.or_unauthorized(&api.context.database, credential, origin).await?;
    Ok(credential)
}
