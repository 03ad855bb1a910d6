//! A user has read a conversation, up to a message.

use protocol::ids::{ConversationId, MessageId};
use thiserror::Error;

use super::{Actor, CommandError, Context};
use crate::{
    request_context::RequestContext,
    store::messages::{self, Read},
};

#[derive(Debug, Error)]
#[error("no conversation of the reader")]
pub struct NoConversation;

/// Up to the message `to`, or to the last one there is.
pub async fn mark_read(
    context: &Context,
    actor: Actor,
    conversation: ConversationId,
    to: Option<MessageId>,
    request: RequestContext,
) -> Result<(), CommandError<NoConversation>> {
    let commands = context.clone();
    let work = async move {
        let read = commands
            .commit(actor, request, async |connection, request| {
                messages::mark_read(connection, actor.session, actor.user, conversation, to, request).await
            })
            .await?;
        Ok(match read {
            Read::Moved(events) => {
                commands.publisher.publish(events);
                Ok(())
            }
            Read::Unmoved => Ok(()),
            Read::NoConversation => Err(CommandError::Refused(NoConversation)),
            Read::NoSession => Err(CommandError::NoSession),
        })
    };
    context.to_its_end(work).await?
}
