//! Requests of gateways, on a listener of their own behind a shared secret: heads and ranges of feeds, public keys, and the
//! users of an external issuer's subjects.

use std::sync::Arc;

use http::{StatusCode, header};
use protocol::{
    feed::{
        HeadsAnswer, HeadsRequest, IdentityAnswer, IdentityRequest, KeysAnswer, MAX_PAIRS, RangesAnswer,
        RangesRequest, authorization,
    },
    keys_version::KeysVersion,
};
use subtle::{Choice, ConstantTimeEq};

use super::{
    Api, HandlerResult,
    error::ApiError,
    json,
    request::{Inbound, Json, NoBody},
};
use crate::store::{feed, sessions};

/// Room for [`MAX_PAIRS`] pairs and as many logins.
pub(super) const LARGEST_BODY: usize = 512 * 1024;
/// An issuer's names and pictures have no limit of their own, but their token fits into a request head.
pub(super) const LARGEST_IDENTITIES: usize = 16 * 1024 * 1024;

pub(super) async fn heads(api: Arc<Api>, _: Inbound, Json(request): Json<HeadsRequest>) -> HandlerResult {
    require_few(request.users.len())?;
    require_few(request.logins.len())?;
    // An open stream counts as use.
    request.logins.iter().for_each(|login| api.auth.used().note(*login));
    let keys = api.auth.keys_version();
    let (heads, ended_logins) = api
        .context
        .database
        .run(async |connection| {
            let heads = feed::heads(connection, &request.users).await?;
            Ok((heads, sessions::ended_logins(connection, &request.logins).await?))
        })
        .await?;
    Ok(json(StatusCode::OK, &HeadsAnswer { heads, ended_logins, keys }))
}

pub(super) async fn ranges(api: Arc<Api>, _: Inbound, Json(request): Json<RangesRequest>) -> HandlerResult {
    require_few(request.ranges.len())?;
    let ranges = async |connection: &mut _| feed::ranges(connection, &request.ranges).await;
    Ok(json(StatusCode::OK, &RangesAnswer { ranges: api.context.database.run(ranges).await? }))
}

pub(super) async fn keys(api: Arc<Api>, inbound: Inbound, _: NoBody) -> HandlerResult {
    let (external_keys, external) = match &api.external {
        Some(external) => {
            let (keys, version) = external.published(inbound.query("kid").as_deref()).await;
            (Some(keys), version)
        }
        None => (None, None),
    };
    let version = KeysVersion { external, ..api.auth.keys_version() };
    Ok(json(StatusCode::OK, &KeysAnswer { version, own: api.tokens.jwks().clone(), external: external_keys }))
}

pub(super) async fn identity(
    api: Arc<Api>,
    _: Inbound,
    Json(request): Json<IdentityRequest>,
) -> HandlerResult {
    require_few(request.identities.len())?;
    let external = api.external.as_ref().ok_or(ApiError::NOT_FOUND)?;
    let users = external.users_of(&api.context, &request.identities).await?;
    Ok(json(StatusCode::OK, &IdentityAnswer { users }))
}

pub(super) fn require_secret(inbound: &Inbound, api: &Api) -> Result<(), ApiError> {
    let given = inbound.headers.get(header::AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
    // In constant time, so that timing does not reveal how much of a guess is right.
    let is = |secret: &str| given.ct_eq(authorization(secret).as_bytes());
    let accepted = api.internal_secrets.iter().map(is).fold(Choice::from(0), |any, this| any | this);
    if bool::from(accepted) { Ok(()) } else { Err(ApiError::Unauthorized) }
}

fn require_few(pairs: usize) -> Result<(), ApiError> {
    if pairs <= MAX_PAIRS {
        Ok(())
    } else {
        Err(ApiError::BadBody(format!("More than {MAX_PAIRS} in one request")))
    }
}
