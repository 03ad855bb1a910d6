//! Which ways to log in there are, logging in for development, going on, and the public keys by which tokens are checked.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use http::{StatusCode, header};
use serde::{Deserialize, Serialize};
use warp::Filter;

use super::{
    Answer, Api, Resource,
    auth::Token,
    error::ApiError,
    json, otherwise, read,
    request::{BODY_LIMIT, Inbound, inbound},
    with,
};
use crate::{
    commands::{log_in::log_in_by_name, refresh_session::refresh_session},
    domain::{
        name::{self, may_be_a_name},
        user::User,
    },
};

pub(super) fn login(api: &Arc<Api>) -> Resource {
    let path = warp::path!("api" / "login").boxed();
    if !api.dev_login {
        return path.map(|| Err(ApiError::NOT_FOUND)).boxed();
    }
    let post = path.clone().and(warp::post()).and(inbound()).and(with(api)).then(post_login);
    post.or(path.and(otherwise("POST"))).unify().boxed()
}

pub(super) fn login_options(api: &Arc<Api>) -> Resource {
    let path = warp::path!("api" / "login_options").boxed();
    let get = path.clone().and(read()).and(with(api)).map(|api: Arc<Api>| {
        let options = LoginOptions { providers: api.sign_in.names().collect(), dev_login: api.dev_login };
        Ok(json(StatusCode::OK, &options))
    });
    get.or(path.and(otherwise("GET, HEAD"))).unify().boxed()
}

/// What a page for logging in can offer.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LoginOptions {
    /// Each by `/api/oauth/{provider}`.
    providers: Vec<&'static str>,
    /// By `POST /api/login`.
    dev_login: bool,
}

#[derive(Deserialize)]
struct LoginBody {
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

async fn post_login(mut inbound: Inbound, api: Arc<Api>) -> Answer {
    inbound.require_json()?;
    api.limits.login(&inbound).await?;
    let body: LoginBody = inbound.json(BODY_LIMIT).await?;
    let username = body.username.filter(|name| may_be_a_name(name)).ok_or(ApiError::NO_USER)?;
    api.limits.login_as(&name::key(&username)).await?;
    let (user, session) = log_in_by_name(&api.context, username, inbound.device(), api.auth.lifetime())
        .await?
        .ok_or(ApiError::NO_USER)?;
    tracing::info!(user.id = %user.id, session.id = %session.id, "logged in by name");
    let token = api.auth.issue(user.id, session);
    Ok(token_answer(&api, Some(&user), &token))
}

pub(super) fn refresh_token(api: &Arc<Api>) -> Resource {
    let path = warp::path!("api" / "refresh_token").boxed();
    let post = path.clone().and(warp::post()).and(inbound()).and(with(api)).then(post_refresh_token);
    post.or(path.and(otherwise("POST"))).unify().boxed()
}

async fn post_refresh_token(inbound: Inbound, api: Arc<Api>) -> Answer {
    let database = &api.context.database;
    let credential = api.auth.credential(&inbound).await?;
    let allowed = api.auth.check_origin(credential, &inbound);
    api.auth.or_unauthorized(database, credential, allowed).await?;
    let session = refresh_session(&api.context, credential.actor, api.auth.lifetime())
        .await?
        .ok_or(ApiError::Unauthorized)?;
    let token = api.auth.issue(credential.actor.user, session);
    Ok(token_answer(&api, None, &token))
}

pub(super) fn token_answer(api: &Api, auth_user: Option<&User>, token: &Token) -> warp::reply::Response {
    let body = LoginAnswer { auth_user, token: &token.text, expires_at: token.expires_at };
    let mut response = json(StatusCode::OK, &body);
    response.headers_mut().insert(header::SET_COOKIE, api.auth.cookie(token));
    response
}

pub(super) fn jwks(api: &Arc<Api>) -> Resource {
    let path = warp::path!(".well-known" / "jwks.json").boxed();
    let get = path
        .clone()
        .and(read())
        .and(with(api))
        .map(|api: Arc<Api>| Ok(json(StatusCode::OK, api.auth.jwks())));
    get.or(path.and(otherwise("GET, HEAD"))).unify().boxed()
}
