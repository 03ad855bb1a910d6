//! A user does not want to hear from another one, or does again. Nobody else is told.

use protocol::ids::UserId;
use thiserror::Error;

use super::{Actor, CommandError, Context};
use crate::store::blocks::{self, Set};

#[derive(Debug, Error)]
#[error("no such other user")]
pub struct NoSuchUser;

pub async fn block_user(
    context: &Context,
    actor: Actor,
    other: UserId,
) -> Result<(), CommandError<NoSuchUser>> {
    set(context, actor, other, true).await
}

/// What was hidden meanwhile stays so.
pub async fn unblock_user(
    context: &Context,
    actor: Actor,
    other: UserId,
) -> Result<(), CommandError<NoSuchUser>> {
    set(context, actor, other, false).await
}

async fn set(
    context: &Context,
    actor: Actor,
    other: UserId,
    blocked: bool,
) -> Result<(), CommandError<NoSuchUser>> {
    let Context { database, .. } = context.clone();
    let work = async move {
        database
            .run(async |connection| {
                let Actor { session, user } = actor;
                if blocked {
                    blocks::block(connection, session, user, other).await
                } else {
                    blocks::unblock(connection, session, user, other).await
                }
            })
            .await
    };
    match context.to_its_end(work).await? {
        Set::Done => {
            tracing::info!(user.id = %actor.user, other.id = %other, blocked, "a block was set");
            Ok(())
        }
        Set::NoUser => Err(CommandError::Refused(NoSuchUser)),
        Set::NoSession => Err(CommandError::NoSession),
    }
}
