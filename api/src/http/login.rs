//! Logging in for development, the ways to log in, refreshing a session, and the public keys that verify tokens.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use http::{StatusCode, header};
use serde::{Deserialize, Serialize};
use warp::reply::Response;

use super::{
    Api, HandlerResult,
    auth::Caller,
    error::ApiError,
    json,
    request::{Inbound, Json, NoBody},
    tokens::Token,
};
use crate::{
    commands::{
        log_in::{LogInOutcome, log_in_by_name},
        refresh_session::{RefreshSessionOutcome, refresh_session},
    },
    domain::{
        name::{self, may_be_a_name},
        user::User,
    },
};

pub(super) async fn options(api: Arc<Api>, _: Inbound, _: NoBody) -> HandlerResult {
    let options = LoginOptions { providers: api.sign_in.names().collect(), dev_login: api.dev_login };
    Ok(json(StatusCode::OK, &options))
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LoginOptions {
    /// Each by `/api/oauth/{provider}`.
    providers: Vec<&'static str>,
    /// By `POST /api/login`.
    dev_login: bool,
}

#[derive(Deserialize)]
pub(super) struct LoginBody {
    username: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LoginAnswer<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    auth_user: Option<&'a User>,
    token: &'a str,
    #[serde(serialize_with = "crate::domain::time")]
    expires_at: DateTime<Utc>,
}

pub(super) async fn log_in(api: Arc<Api>, inbound: Inbound, Json(body): Json<LoginBody>) -> HandlerResult {
    let username = body.username.filter(|name| may_be_a_name(name)).ok_or(ApiError::NO_USER)?;
    api.limits.check_login_as(&name::key(&username)).await?;
    match log_in_by_name(&api.context, username, inbound.device(), api.tokens.lifetime()).await? {
        LogInOutcome::LoggedIn(user, session) => {
            let token = api.tokens.issue(user.id, session);
            Ok(token_answer(&api, Some(&user), &token))
        }
        LogInOutcome::Unknown => Err(ApiError::NO_USER),
    }
}

pub(super) async fn refresh(api: Arc<Api>, caller: Caller, (): ()) -> HandlerResult {
    match refresh_session(&api.context, caller.actor, api.tokens.lifetime()).await? {
        RefreshSessionOutcome::Refreshed(session) => {
            Ok(token_answer(&api, None, &api.tokens.issue(caller.actor.user, session)))
        }
        RefreshSessionOutcome::NoSession => Err(ApiError::Unauthorized),
    }
}

pub(super) fn token_answer(api: &Api, auth_user: Option<&User>, token: &Token) -> Response {
    let body = LoginAnswer { auth_user, token: &token.text, expires_at: token.expires_at };
    let mut response = json(StatusCode::OK, &body);
    response.headers_mut().insert(header::SET_COOKIE, api.tokens.cookie(token));
    response
}

pub(super) async fn jwks(api: Arc<Api>, _: Inbound, _: NoBody) -> HandlerResult {
    Ok(json(StatusCode::OK, api.tokens.jwks()))
}
