//! A user logs in: a session begins. By an account at a provider this takes two steps, since the browser comes back from there
//! by a URL, which is no place for a token: first a code is kept for it, then its page fetches the token with that.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};
use shared::ids::UserId;

use crate::{
    domain::user::{Profile, User},
    store::{
        Database, StoreError,
        identities::{self, Hash},
        sessions::{self, Session},
        users,
    },
};

/// For a page to load and to fetch its token.
pub const CODE_LIFETIME: Duration = Duration::from_secs(60);

/// As whoever has this name, without a proof: for development. `None`: nobody has it.
pub async fn log_in_by_name(
    database: &Database,
    username: &str,
    device: &str,
    lifetime: Duration,
) -> Result<Option<(User, Session)>, StoreError> {
    database
        .run(async |connection| {
            let Some(user) = users::find_by_name(connection, username).await? else { return Ok(None) };
            let session = sessions::start(connection, user.id, device, lifetime).await?;
            Ok(Some((user, session)))
        })
        .await
}

/// Somebody whom a provider has sent back.
#[derive(Debug, Clone, Copy)]
pub struct Arrived {
    pub user: UserId,
    /// Their first login: the user was made.
    pub created: bool,
}

/// The two halves of a login that waits to be fetched: one for the URL, one for a cookie. Neither is worth anything alone.
pub struct Halves {
    pub code: String,
    pub binding: String,
}

/// As the account of this profile, in two steps: this is the first one.
pub async fn arrive(database: &Database, profile: Profile) -> Result<(Arrived, Halves), StoreError> {
    let halves = Halves { code: secret(), binding: secret() };
    let (code, binding) = (hash(&halves.code), hash(&halves.binding));
    let arrived = database
        .run(async |connection| {
            let (user, created) = identities::provision(connection, &profile).await?;
            identities::keep_code(connection, &code, &binding, user, CODE_LIFETIME).await?;
            Ok(Arrived { user, created })
        })
        .await?;
    Ok((arrived, halves))
}

/// The second step. `None`: the code is unknown, used, too old, or another browser's.
pub async fn log_in_by_code(
    database: &Database,
    code: &str,
    binding: &str,
    device: &str,
    lifetime: Duration,
) -> Result<Option<(User, Session)>, StoreError> {
    let (code, binding) = (hash(code), hash(binding));
    database
        .run(async |connection| {
            let Some(user) = identities::use_code(connection, &code, &binding).await? else {
                return Ok(None);
            };
            let session = sessions::start(connection, user.id, device, lifetime).await?;
            Ok(Some((user, session)))
        })
        .await
}

/// As the account of this profile, at once.
pub async fn log_in_by_profile(
    database: &Database,
    profile: Profile,
    device: &str,
    lifetime: Duration,
) -> Result<(Arrived, Session), StoreError> {
    database
        .run(async |connection| {
            let (user, created) = identities::provision(connection, &profile).await?;
            let session = sessions::start(connection, user, device, lifetime).await?;
            Ok((Arrived { user, created }, session))
        })
        .await
}

/// 256 random bits: no hash of them needs to be slow or salted.
fn secret() -> String {
    URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>())
}

fn hash(text: &str) -> Hash {
    Sha256::digest(text).into()
}
