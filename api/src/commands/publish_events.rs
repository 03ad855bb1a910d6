//! Another back end publishes events. They are staged like those of SQL `publish`, in one transaction, so the order between both ways is
//! one; the relay appends them to the feeds. Ephemeral ones go to Redis directly.

use super::CommandContext;
pub use crate::store::published::PublishedTo;
use crate::{
    domain::published::Published,
    request_context::RequestContext,
    store::{StoreError, published},
};

/// `issuer`: whose subjects are named. What becomes of each event, in their order.
pub async fn publish_events(
    context: &CommandContext,
    events: Vec<Published>,
    issuer: Option<String>,
    request: RequestContext,
) -> Result<Vec<PublishedTo>, StoreError> {
    let commands = context.clone();
    let work = async move {
        let stage = async |connection: &mut _, request: &_| {
            Ok((published::stage(connection, &events, issuer.as_deref(), request).await?, Vec::new()))
        };
        let outcomes = commands.commit(None, request, stage).await?;
        commands.staged.notify_one();
        for (event, outcome) in events.iter().zip(&outcomes) {
            if event.is_ephemeral {
                let (name, receivers) = (event.name.as_str(), outcome.receivers.iter().copied());
                commands.publisher.publish_ephemeral_json(name, event.data.raw(), receivers);
            }
        }
        Ok(outcomes)
    };
    context.run_to_completion(work).await
}
