//! Users: oneself and one's profile, and the names of others.

use std::sync::Arc;

use http::StatusCode;
use serde::{Deserialize, Deserializer, Serialize};

use super::{
    Api, HandlerResult,
    auth::{Caller, LiveCaller},
    error::ApiError,
    json,
    request::Inbound,
    with_cursor,
};
use crate::{
    commands::update_user::{ProfileChange, UpdateUserOutcome, update_user},
    domain::{
        name::{self, may_be_a_name},
        user::{AddableBy, OwnUser, chosen_avatar},
    },
    store::users,
};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct AuthUser {
    #[serde(flatten)]
    user: OwnUser,
    unread_total: i64,
}

pub(super) async fn auth_user(_: Arc<Api>, reader: LiveCaller, _: Inbound) -> HandlerResult {
    let LiveCaller { user, shares_presence, addable_by, unread_total, cursor, .. } = reader;
    let body = AuthUser { user: OwnUser { user, shares_presence, addable_by }, unread_total };
    Ok(with_cursor(json(StatusCode::OK, &body), cursor))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ProfileBody {
    username: Option<String>,
    /// Given as null, it clears the avatar.
    #[serde(rename = "avatarURL", default, deserialize_with = "given")]
    avatar_url: Option<Option<String>>,
    shares_presence: Option<bool>,
    addable_by: Option<String>,
}

pub(super) fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<String>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

pub(super) fn profile(body: ProfileBody, usernames_change: bool) -> Result<ProfileChange, ApiError> {
    if body.username.is_some() && !usernames_change {
        return Err(ApiError::unacceptable("username", "Usernames cannot be changed"));
    }
    let addable_by = |text: String| {
        AddableBy::parse(&text).ok_or_else(|| {
            ApiError::unacceptable("addableBy", "addableBy must be everybody, partners or nobody")
        })
    };
    Ok(ProfileChange {
        username: body.username.as_deref().map(chosen_name).transpose()?,
        avatar_url: body.avatar_url.map(chosen_avatar_url).transpose()?,
        shares_presence: body.shares_presence,
        addable_by: body.addable_by.map(addable_by).transpose()?,
    })
}

pub(super) fn chosen_name(given: &str) -> Result<String, ApiError> {
    name::chosen(given).map_err(|error| ApiError::unacceptable("username", error.to_string()))
}

/// `None` clears the avatar.
pub(super) fn chosen_avatar_url(given: Option<String>) -> Result<Option<String>, ApiError> {
    let Some(url) = given else { return Ok(None) };
    let chosen = chosen_avatar(&url);
    let refusal = || ApiError::unacceptable("avatarURL", "Avatar must be an http or https URL, 2048 max");
    chosen.map(Some).ok_or_else(refusal)
}

pub(super) async fn update(api: Arc<Api>, caller: Caller, change: ProfileChange) -> HandlerResult {
    let (actor, shares) = (caller.actor, change.shares_presence);
    match update_user(&api.context, actor, change, caller.context).await? {
        UpdateUserOutcome::Done(user) => {
            if let (Some(service), Some(shares)) = (&api.presence, shares)
                && let Err(error) = service.sharing_changed(actor.user, shares).await
            {
                tracing::warn!(%error, user.id = %actor.user, "partners were not told that presence is shared or not");
            }
            Ok(json(StatusCode::OK, &user))
        }
        UpdateUserOutcome::NameTaken => Err(ApiError::name_taken()),
        UpdateUserOutcome::NoSession => Err(ApiError::Unauthorized),
    }
}

pub(super) async fn search(api: Arc<Api>, reader: LiveCaller, inbound: Inbound) -> HandlerResult {
    let search = inbound.query("search").unwrap_or_default();
    let search = search.trim();
    if search.is_empty() {
        return Err(ApiError::unacceptable("search", "Search required"));
    }
    if !may_be_a_name(search) {
        return Ok(json(StatusCode::OK, &[(); 0]));
    }
    let find = async |connection: &mut _| users::names_with_prefix(connection, search, reader.user.id).await;
    Ok(json(StatusCode::OK, &api.context.database.run(find).await?))
}
