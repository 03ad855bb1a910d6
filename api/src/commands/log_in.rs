//! A user logs in: a session begins. By an account at a provider this takes two steps, since the browser comes back from there
//! by a URL, which is no place for a token: first a code is kept for it, then its page fetches the token with that.
//!
//! Each step is one statement: what it uses up and what it makes are there together, or neither is.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};

use super::Context;
use crate::{
    domain::user::{Profile, User},
    store::{
        StoreError,
        identities::{self, Arrived, Hash},
        sessions::{self, Session},
        users,
    },
};

/// For a page to load and to fetch its token.
pub const CODE_LIFETIME: Duration = Duration::from_mins(1);

/// As whoever has this name, without a proof: for development. `None`: nobody has it.
pub async fn log_in_by_name(
    context: &Context,
    username: String,
    device: String,
    lifetime: Duration,
) -> Result<Option<(User, Session)>, StoreError> {
    let database = context.database.clone();
    let work = async move {
        database
            .run(async |connection| {
                let Some(user) = users::find_by_name(connection, &username).await? else { return Ok(None) };
                let session = sessions::start(connection, user.id, &device, lifetime).await?;
                Ok(Some((user, session)))
            })
            .await
    };
    context.to_its_end(work).await
}

/// The two halves of a login that waits to be fetched: one for the URL, one for a cookie. Neither is worth anything alone.
pub struct Halves {
    pub code: String,
    pub binding: String,
}

/// As the account of this profile, in two steps: this is the first one.
pub async fn arrive(context: &Context, profile: Profile) -> Result<(Arrived, Halves), StoreError> {
    let halves = Halves { code: secret(), binding: secret() };
    let (code, binding) = (hash(&halves.code), hash(&halves.binding));
    let database = context.database.clone();
    let work = async move {
        database
            .run(async |connection| {
                identities::arrive(connection, &profile, &code, &binding, CODE_LIFETIME).await
            })
            .await
    };
    Ok((context.to_its_end(work).await?, halves))
}

/// The second step. `None`: the code is unknown, used, too old, or another browser's: none of `bindings` is its other half.
pub async fn log_in_by_code(
    context: &Context,
    code: &str,
    bindings: &[&str],
    device: String,
    lifetime: Duration,
) -> Result<Option<(User, Session)>, StoreError> {
    let code = hash(code);
    let bindings: Vec<_> = bindings.iter().map(|binding| hash(binding)).collect();
    let database = context.database.clone();
    let work = async move {
        database
            .run(async |connection| {
                identities::use_code(connection, &code, &bindings, &device, lifetime).await
            })
            .await
    };
    context.to_its_end(work).await
}

/// As the account of this profile, in one step.
pub async fn log_in_by_profile(
    context: &Context,
    profile: Profile,
    device: String,
    lifetime: Duration,
) -> Result<(Arrived, Session), StoreError> {
    let database = context.database.clone();
    let work = async move {
        database
            .run(async |connection| identities::log_in(connection, &profile, &device, lifetime).await)
            .await
    };
    context.to_its_end(work).await
}

/// The user of a profile that comes with each request and needs no session here.
pub async fn provision(context: &Context, profile: Profile) -> Result<Arrived, StoreError> {
    let database = context.database.clone();
    let work = async move {
        database.run(async |connection| identities::provision(connection, &profile).await).await
    };
    context.to_its_end(work).await
}

/// 256 random bits: no hash of them needs to be slow or salted.
fn secret() -> String {
    URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>())
}

fn hash(text: &str) -> Hash {
    Sha256::digest(text).into()
}
