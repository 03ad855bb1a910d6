//! Typing: told to the others who are connected, kept nowhere.

use std::{sync::Arc, time::Duration};

use chrono::Utc;
use http::StatusCode;
use protocol::ids::ConversationId;

use super::{Api, HandlerResult, auth::Caller, empty, error::ApiError};
use crate::{
    domain::event::{EphemeralEvent, Typing},
    store::audience::{self, TypingOutcome},
};

/// Longer than the interval at which clients repeat it.
const TYPES_FOR: Duration = Duration::from_secs(5);

pub(super) async fn announce(api: Arc<Api>, caller: Caller, conversation: ConversationId) -> HandlerResult {
    let actor = caller.actor;
    let find = async |connection: &mut _| {
        audience::of_typing(connection, actor.session, actor.user, conversation).await
    };
    match api.context.database.run(find).await? {
        TypingOutcome::Allowed(others) => {
            if !others.is_empty() && api.limits.may_tell_typing(actor.user, conversation).await {
                let typing = Typing {
                    conversation_id: conversation,
                    user_id: actor.user,
                    expires_at: Utc::now() + TYPES_FOR,
                };
                api.context.publisher.publish_ephemeral(&EphemeralEvent::Typing(typing), others);
            }
            Ok(empty(StatusCode::NO_CONTENT))
        }
        TypingOutcome::NoConversation => Err(ApiError::NO_CONVERSATION),
        TypingOutcome::NoSession => Err(ApiError::Unauthorized),
    }
}
