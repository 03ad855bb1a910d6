//! A user makes a group of themselves and others.

use super::{Actor, CommandContext};
pub use crate::store::groups::CreateGroupOutcome;
use crate::{
    domain::{
        group::Title,
        idempotency::{IdempotencyKey, KeySpace},
    },
    request_context::RequestContext,
    store::{StoreError, groups},
};

#[derive(Debug)]
pub struct NewGroup {
    pub title: Title,
    /// Sorted, each once.
    pub usernames: Vec<String>,
    pub key: Option<IdempotencyKey>,
}

/// `largest`: how many members a group may have.
pub async fn create_group(
    context: &CommandContext,
    actor: Actor,
    NewGroup { title, usernames, key }: NewGroup,
    largest: i64,
    request: RequestContext,
) -> Result<CreateGroupOutcome, StoreError> {
    let commands = context.clone();
    let work = async move {
        let words = || std::iter::once(title.as_str()).chain(usernames.iter().map(String::as_str));
        let hashes = key.map(|key| key.hashes(KeySpace::Groups, words()));
        let create = async |connection: &mut _, request: &_| {
            let Actor { session, user } = actor;
            groups::create(connection, session, user, &title, &usernames, largest, hashes, request).await
        };
        commands.commit(actor, request, create).await
    };
    context.run_to_completion(work).await
}
