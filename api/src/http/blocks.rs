//! Blocking other users.

use std::sync::Arc;

use http::StatusCode;
use protocol::ids::UserId;

use super::{
    Api, HandlerResult,
    auth::Caller,
    empty,
    error::ApiError,
    request::{Inbound, NoBody},
};
use crate::commands::block_user::{BlockUserOutcome, block_user, unblock_user};

pub(super) fn user(inbound: &Inbound, _: NoBody) -> Result<UserId, ApiError> {
    inbound.id().ok_or(ApiError::NO_USER)
}

pub(super) async fn block(api: Arc<Api>, caller: Caller, other: UserId) -> HandlerResult {
    answer(block_user(&api.context, caller.actor, other).await?)
}

pub(super) async fn unblock(api: Arc<Api>, caller: Caller, other: UserId) -> HandlerResult {
    answer(unblock_user(&api.context, caller.actor, other).await?)
}

fn answer(outcome: BlockUserOutcome) -> HandlerResult {
    match outcome {
        BlockUserOutcome::Done => Ok(empty(StatusCode::NO_CONTENT)),
        BlockUserOutcome::NoUser => Err(ApiError::NO_USER),
        BlockUserOutcome::NoSession => Err(ApiError::Unauthorized),
    }
}
