//! A user logs in: a session begins. With an account at a provider this takes two steps, because the browser comes back by a
//! URL, which must not hold a token: first a code is stored, then the page exchanges it for the token.
//!
//! Each step is one statement, so what it consumes and what it creates are committed together. Only the login by name, which
//! consumes nothing, is two.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};

use super::CommandContext;
use crate::{
    domain::user::{Profile, User},
    store::{
        StoreError,
        identities::{self, Hash, Provisioned},
        sessions::{self, Session},
        users,
    },
};

/// Time for a page to load and to exchange its code.
pub const CODE_LIFETIME: Duration = Duration::from_mins(1);

#[derive(Debug)]
pub enum LogInOutcome {
    LoggedIn(User, Session),
    /// No user has the name; or the code is unknown, used, expired, or bound to another browser.
    Unknown,
}

/// Logs in as the user of this name, without proof: for development.
pub async fn log_in_by_name(
    context: &CommandContext,
    username: String,
    device: String,
    lifetime: Duration,
) -> Result<LogInOutcome, StoreError> {
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
    Ok(logged_in(context.run_to_completion(work).await?, "name"))
}

/// The two halves of a login that waits for its exchange: one for the URL, one for a cookie. Neither is of use alone.
pub struct Halves {
    pub code: String,
    pub binding: String,
}

/// Logs in with the account of this profile: the first of two steps.
pub async fn arrive(context: &CommandContext, profile: Profile) -> Result<(Provisioned, Halves), StoreError> {
    let halves = Halves { code: secret(), binding: secret() };
    let (code, binding) = (hash(&halves.code), hash(&halves.binding));
    let database = context.database.clone();
    let work = async move {
        database
            .run(async |connection| {
                identities::provision_with_code(connection, &profile, &code, &binding, CODE_LIFETIME).await
            })
            .await
    };
    Ok((context.run_to_completion(work).await?, halves))
}

/// The second step. One of `bindings` must be the other half of the code.
pub async fn log_in_by_code(
    context: &CommandContext,
    code: &str,
    bindings: &[&str],
    device: String,
    lifetime: Duration,
) -> Result<LogInOutcome, StoreError> {
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
    Ok(logged_in(context.run_to_completion(work).await?, "code"))
}

/// Logs in with the account of this profile, in one step.
pub async fn log_in_by_profile(
    context: &CommandContext,
    profile: Profile,
    device: String,
    lifetime: Duration,
) -> Result<(Provisioned, Session), StoreError> {
    let database = context.database.clone();
    let work = async move {
        database
            .run(async |connection| identities::log_in(connection, &profile, &device, lifetime).await)
            .await
    };
    context.run_to_completion(work).await
}

/// The user of a profile that comes with each request and needs no session.
pub async fn provision(context: &CommandContext, profile: Profile) -> Result<Provisioned, StoreError> {
    let database = context.database.clone();
    let work = async move {
        database.run(async |connection| identities::provision(connection, &profile).await).await
    };
    context.run_to_completion(work).await
}

fn logged_in(login: Option<(User, Session)>, by: &'static str) -> LogInOutcome {
    let Some((user, session)) = login else { return LogInOutcome::Unknown };
    tracing::info!(user.id = %user.id, session.id = %session.id, by, "user logged in");
    LogInOutcome::LoggedIn(user, session)
}

/// 256 random bits: no hash of them needs to be slow or salted.
fn secret() -> String {
    URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>())
}

fn hash(text: &str) -> Hash {
    Sha256::digest(text).into()
}
