//! Blocks: list mine, block a user, unblock.

use std::sync::Arc;

use http::StatusCode;
use protocol::ids::UserId;

use super::{
    Api, HandlerResult,
    auth::{Caller, LiveCaller},
    empty,
    error::ApiError,
    json,
    request::{Inbound, NoBody},
};
use crate::{
    commands::block_user::{BlockUserOutcome, set_block},
    store::blocks as store,
};

pub(super) async fn list(api: Arc<Api>, reader: LiveCaller, _: Inbound) -> HandlerResult {
    let list = async |connection: &mut _| store::of_user(connection, reader.user.id).await;
    Ok(json(StatusCode::OK, &api.context.database.run(list).await?))
}

pub(super) fn user(inbound: &Inbound, _: NoBody) -> Result<UserId, ApiError> {
    inbound.id().ok_or(ApiError::NO_USER)
}

pub(super) async fn block(api: Arc<Api>, caller: Caller, other: UserId) -> HandlerResult {
    set(&api, &caller, other, true).await
}

pub(super) async fn unblock(api: Arc<Api>, caller: Caller, other: UserId) -> HandlerResult {
    set(&api, &caller, other, false).await
}

async fn set(api: &Api, caller: &Caller, other: UserId, blocked: bool) -> HandlerResult {
    match set_block(&api.context, caller.actor, other, blocked).await? {
        BlockUserOutcome::Done => Ok(empty(StatusCode::NO_CONTENT)),
        BlockUserOutcome::NoUser => Err(ApiError::NO_USER),
        BlockUserOutcome::NoSession => Err(ApiError::Unauthorized),
    }
}
