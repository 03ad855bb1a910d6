//! Whom a user does not want to hear from.

use std::sync::Arc;

use http::{Method, StatusCode};
use protocol::ids::UserId;
use warp::Filter;

use super::{
    Answer, Api, Resource, empty,
    error::ApiError,
    otherwise,
    request::{Inbound, PathId, inbound},
    with,
};
use crate::commands::block_user::{NoSuchUser, block_user, unblock_user};

/// The macro for paths takes a name, not a type with parameters.
type InPath = PathId<UserId>;

pub(super) fn block(api: &Arc<Api>) -> Resource {
    let path = warp::path!("api" / "blocks" / InPath);
    let change = warp::put().or(warp::delete()).unify();
    let change = path.and(change).and(inbound()).and(with(api)).then(change_block);
    let other = path.map(|_| ()).untuple_one().and(otherwise("PUT, DELETE"));
    change.or(other).unify().boxed()
}

async fn change_block(id: InPath, inbound: Inbound, api: Arc<Api>) -> Answer {
    let credential = api.auth.credential(&inbound).await?;
    let input = api.auth.check_origin(credential, &inbound).and_then(|()| id.or(ApiError::NO_USER));
    let other = api.auth.or_unauthorized(&api.context.database, credential, input).await?;
    if inbound.method == Method::PUT {
        block_user(&api.context, credential.actor, other).await?;
    } else {
        unblock_user(&api.context, credential.actor, other).await?;
    }
    Ok(empty(StatusCode::NO_CONTENT))
}

impl From<NoSuchUser> for ApiError {
    fn from(NoSuchUser: NoSuchUser) -> Self {
        Self::NO_USER
    }
}
