//! People: oneself, and the names of others.

use std::sync::Arc;

use http::StatusCode;
use warp::Filter;

use super::{
    Answer, Api, Resource,
    error::ApiError,
    json, otherwise, read,
    request::{Inbound, inbound},
    with, with_cursor,
};
use crate::{domain::name::may_be_a_name, store::users};

pub(super) fn auth_user(api: &Arc<Api>) -> Resource {
    let path = warp::path!("api" / "auth_user").boxed();
    let get = path.clone().and(read()).and(inbound()).and(with(api)).then(get_auth_user);
    get.or(path.and(otherwise("GET, HEAD"))).unify().boxed()
}

async fn get_auth_user(inbound: Inbound, api: Arc<Api>) -> Answer {
    let caller = api.auth.caller(&api.context.database, &inbound).await?;
    Ok(with_cursor(json(StatusCode::OK, &caller.user), caller.cursor))
}

pub(super) fn usernames(api: &Arc<Api>) -> Resource {
    let path = warp::path!("api" / "usernames").boxed();
    let get = path.clone().and(read()).and(inbound()).and(with(api)).then(get_usernames);
    get.or(path.and(otherwise("GET, HEAD"))).unify().boxed()
}

async fn get_usernames(inbound: Inbound, api: Arc<Api>) -> Answer {
    let caller = api.auth.caller(&api.context.database, &inbound).await?;
    api.limits.search(caller.user.id, &inbound).await?;
    let search = inbound.query("search").unwrap_or_default();
    let search = search.trim();
    if search.is_empty() {
        return Err(ApiError::unacceptable("search", "Search required"));
    }
    if !may_be_a_name(search) {
        return Ok(json(StatusCode::OK, &[(); 0]));
    }
    let names = api
        .context
        .database
        .run(async |connection| users::names_with_prefix(connection, search, caller.user.id).await)
        .await?;
    Ok(json(StatusCode::OK, &names))
}
