//! Another back end erases a user. The user, their sessions and names are gone with the commit; messages are deleted in steps, by the
//! maintenance of any replica (`crate::erasing`), also after a crash of this one.

use protocol::ids::UserId;

use super::CommandContext;
use crate::{
    request_context::RequestContext,
    store::{
        StoreError,
        erasures::{self, EraseUserOutcome},
    },
};

/// `false`: there never was such a user.
pub async fn erase_user(
    context: &CommandContext,
    user: UserId,
    request: RequestContext,
) -> Result<bool, StoreError> {
    let commands = context.clone();
    let work = async move {
        let erase = async |connection: &mut _, request: &_| erasures::begin(connection, user, request).await;
        match commands.commit(None, request, erase).await? {
            EraseUserOutcome::Begun(sessions) => {
                tracing::info!(user.id = %user, sessions = sessions.len(), "erasing a user");
                commands.publisher.publish_revoked(user, &sessions);
                commands.erasures.notify_one();
                Ok(true)
            }
            EraseUserOutcome::Erased => Ok(true),
            EraseUserOutcome::NoUser => Ok(false),
        }
    };
    context.run_to_completion(work).await
}
