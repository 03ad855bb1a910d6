//! Users of the external issuer by their subject, for the back end that has their accounts.

use std::{borrow::Cow, sync::Arc, time::Duration};

use http::StatusCode;
use percent_encoding::percent_decode_str;
use serde::Deserialize;

use super::{
    Api, HandlerResult,
    auth::ServiceCaller,
    error::ApiError,
    json,
    request::{Inbound, Json, NoBody},
    sessions::stream_token_answer,
    users::{chosen_avatar_url, chosen_name, given},
};
use crate::{
    commands::{
        Actor,
        external_user::{ExternalUser, PutUserOutcome, put_user, start_session},
        update_user::ProfileChange,
    },
    domain::user::LONGEST_SUBJECT,
};

/// Of a session that another back end starts for a user.
const SESSION_LIFETIME: Duration = Duration::from_hours(24);

#[derive(Deserialize)]
pub(super) struct UserBody {
    username: Option<String>,
    /// Given as null, it clears the avatar.
    #[serde(rename = "avatarURL", default, deserialize_with = "given")]
    avatar_url: Option<Option<String>>,
}

/// `USERNAMES_CHANGE` is about users: the other back end decides on the names of its own.
pub(super) fn profile(
    inbound: &Inbound,
    Json(body): Json<UserBody>,
) -> Result<(String, ProfileChange), ApiError> {
    let change = ProfileChange {
        username: body.username.as_deref().map(chosen_name).transpose()?,
        avatar_url: body.avatar_url.map(chosen_avatar_url).transpose()?,
        shares_presence: None,
        addable_by: None,
    };
    Ok((decoded_subject(inbound)?, change))
}

pub(super) fn subject(inbound: &Inbound, _: NoBody) -> Result<String, ApiError> {
    decoded_subject(inbound)
}

/// The subject is percent-encoded in the path. Tokens may have fewer forms of it (`Profile::new`).
fn decoded_subject(inbound: &Inbound) -> Result<String, ApiError> {
    let text = inbound.parameters.first().map_or("", String::as_str);
    let subject = percent_decode_str(text).decode_utf8().map(Cow::into_owned).unwrap_or_default();
    if subject.is_empty() || subject.len() > LONGEST_SUBJECT || subject.contains('\0') {
        let sentence =
            format!("The subject must be UTF-8, percent-encoded, without NUL, {LONGEST_SUBJECT} bytes max");
        return Err(ApiError::unacceptable("subject", sentence));
    }
    Ok(subject)
}

pub(super) async fn put(
    api: Arc<Api>,
    caller: ServiceCaller,
    (subject, change): (String, ProfileChange),
) -> HandlerResult {
    let user = of_issuer(&api, subject)?;
    match put_user(&api.context, user, change, caller.context).await? {
        PutUserOutcome::Created(user) => {
            tracing::info!(user.id = %user.id, service = caller.service.name, "user created by another back end");
            Ok(json(StatusCode::CREATED, &user))
        }
        PutUserOutcome::Changed(user) => Ok(json(StatusCode::OK, &user)),
        PutUserOutcome::NameTaken => Err(ApiError::name_taken()),
    }
}

pub(super) async fn stream_token(api: Arc<Api>, caller: ServiceCaller, subject: String) -> HandlerResult {
    let user = of_issuer(&api, subject)?;
    let device = caller.service.name.clone();
    let started = start_session(&api.context, user, device, SESSION_LIFETIME).await?;
    let (user, session) = started.ok_or(ApiError::NO_USER)?;
    let actor = Actor { user, session: Some(session.id) };
    Ok(stream_token_answer(&api, actor, session.expires_at))
}

fn of_issuer(api: &Api, subject: String) -> Result<ExternalUser, ApiError> {
    let issuer = api.external_issuer.clone().ok_or(ApiError::NO_EXTERNAL_ISSUER)?;
    Ok(ExternalUser { issuer, subject })
}
