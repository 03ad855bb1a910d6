//! A user starts a conversation with another one.

use protocol::ids::ConversationId;
use serde_json::value::RawValue;
use thiserror::Error;

use super::{Actor, CommandError, Context};
use crate::{
    request_context::RequestContext,
    store::conversations::{self, Started},
};

#[derive(Debug)]
pub enum Outcome {
    /// As the starter was told by the event: the same JSON.
    Created(ConversationId, Box<RawValue>),
    Exists(ConversationId),
}

#[derive(Debug, Error)]
pub enum Refusal {
    #[error("nobody has this name")]
    NoUser,
    #[error("the name is the caller's own")]
    Oneself,
}

pub async fn start_conversation(
    context: &Context,
    actor: Actor,
    username: String,
    request: RequestContext,
) -> Result<Outcome, CommandError<Refusal>> {
    let commands = context.clone();
    let work = async move {
        let started = commands
            .commit(actor, request, async |connection, request| {
                conversations::start(connection, actor.session, actor.user, &username, request).await
            })
            .await?;
        Ok(match started {
            Started::Created(id, seen, events) => {
                commands.publisher.publish(events);
                Ok(Outcome::Created(id, seen))
            }
            Started::Exists(id) => Ok(Outcome::Exists(id)),
            Started::NoUser => Err(CommandError::Refused(Refusal::NoUser)),
            Started::Oneself => Err(CommandError::Refused(Refusal::Oneself)),
            Started::NoSession => Err(CommandError::NoSession),
        })
    };
    context.to_its_end(work).await?
}
