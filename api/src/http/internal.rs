//! What gateways ask: where feeds end, what follows a place, by which keys tokens are checked, who a external issuer's subjects
//! are. On a listener of its own, behind a shared secret.

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
use warp::Filter;

use super::{
    Answer, Api, Resource,
    error::ApiError,
    json, otherwise, read,
    request::{Inbound, inbound},
    with,
};
use crate::store::{feed, sessions};

/// The largest question: every pair and every login, with room for longer names of things.
const BODY_LIMIT: usize = 512 * 1024;
/// Names and pictures are as long as their issuer likes, within a token that fits into a request's head.
const IDENTITIES_LIMIT: usize = 16 * 1024 * 1024;

pub(super) fn heads(api: &Arc<Api>) -> Resource {
    let path = warp::path!("internal" / "feed" / "heads").boxed();
    let post = path.clone().and(warp::post()).and(inbound()).and(with(api)).then(post_heads);
    post.or(path.and(otherwise("POST"))).unify().boxed()
}

async fn post_heads(mut inbound: Inbound, api: Arc<Api>) -> Answer {
    require_secret(&inbound, &api)?;
    let asked: HeadsRequest = inbound.json(BODY_LIMIT).await?;
    require_few(asked.users.len())?;
    require_few(asked.logins.len())?;
    // An open stream is use.
    asked.logins.iter().for_each(|login| api.auth.used().note(*login));
    let keys = api.auth.keys_version();
    let (heads, ended_logins) = api
        .context
        .database
        .run(async |connection| {
            let heads = feed::heads(connection, &asked.users).await?;
            Ok((heads, sessions::ended_logins(connection, &asked.logins).await?))
        })
        .await?;
    Ok(json(StatusCode::OK, &HeadsAnswer { heads, ended_logins, keys }))
}

pub(super) fn ranges(api: &Arc<Api>) -> Resource {
    let path = warp::path!("internal" / "feed" / "ranges").boxed();
    let post = path.clone().and(warp::post()).and(inbound()).and(with(api)).then(post_ranges);
    post.or(path.and(otherwise("POST"))).unify().boxed()
}

async fn post_ranges(mut inbound: Inbound, api: Arc<Api>) -> Answer {
    require_secret(&inbound, &api)?;
    let asked: RangesRequest = inbound.json(BODY_LIMIT).await?;
    require_few(asked.ranges.len())?;
    let ranges =
        api.context.database.run(async |connection| feed::ranges(connection, &asked.ranges).await).await?;
    Ok(json(StatusCode::OK, &RangesAnswer { ranges }))
}

pub(super) fn keys(api: &Arc<Api>) -> Resource {
    let path = warp::path!("internal" / "keys").boxed();
    let get = path.clone().and(read()).and(inbound()).and(with(api)).then(get_keys);
    get.or(path.and(otherwise("GET, HEAD"))).unify().boxed()
}

async fn get_keys(inbound: Inbound, api: Arc<Api>) -> Answer {
    require_secret(&inbound, &api)?;
    let (external_keys, external) = match &api.external {
        Some(external) => {
            let (keys, version) = external.published(inbound.query("kid").as_deref()).await;
            (Some(keys), version)
        }
        None => (None, None),
    };
    let version = KeysVersion { external, ..api.auth.keys_version() };
    Ok(json(StatusCode::OK, &KeysAnswer { version, own: api.auth.jwks().clone(), external: external_keys }))
}

pub(super) fn identity(api: &Arc<Api>) -> Resource {
    let path = warp::path!("internal" / "identity").boxed();
    let post = path.clone().and(warp::post()).and(inbound()).and(with(api)).then(post_identity);
    post.or(path.and(otherwise("POST"))).unify().boxed()
}

async fn post_identity(mut inbound: Inbound, api: Arc<Api>) -> Answer {
    require_secret(&inbound, &api)?;
    let asked: IdentityRequest = inbound.json(IDENTITIES_LIMIT).await?;
    require_few(asked.identities.len())?;
    let external = api.external.as_ref().ok_or(ApiError::NOT_FOUND)?;
    let users = external.users_of(&api.context, &asked.identities).await?;
    Ok(json(StatusCode::OK, &IdentityAnswer { users }))
}

fn require_secret(inbound: &Inbound, api: &Api) -> Result<(), ApiError> {
    let given = inbound.headers.get(header::AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
    // In constant time: how long a refusal takes says nothing about how much of a guess was right.
    let is = |secret: &str| given.ct_eq(authorization(secret).as_bytes());
    let accepted = api.internal_secrets.iter().map(is).fold(Choice::from(0), |any, this| any | this);
    if bool::from(accepted) { Ok(()) } else { Err(ApiError::Unauthorized) }
}

fn require_few(pairs: usize) -> Result<(), ApiError> {
    if pairs <= MAX_PAIRS { Ok(()) } else { Err(ApiError::BadBody(format!("More than {MAX_PAIRS} at once"))) }
}
