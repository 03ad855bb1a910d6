//! Who is online: asked by users about their partners, reported by gateways.

use std::sync::Arc;

use http::StatusCode;
use protocol::{
    ids::UserId,
    presence::{MAX_CHANGES, PresenceAnswer, PresenceReport},
};

use super::{
    Api, HandlerResult,
    auth::LiveCaller,
    error::ApiError,
    json,
    request::{Inbound, Json},
};
use crate::{domain::event::Presence, presence::PresenceError, store::audience};

/// Users in one question.
const MOST_USERS: usize = 100;
const LONGEST_NAME: usize = 64;

pub(super) async fn of_partners(api: Arc<Api>, reader: LiveCaller, inbound: Inbound) -> HandlerResult {
    let invalid = |sentence: &str| ApiError::unacceptable("userId", sentence);
    let mut users = Vec::new();
    for text in inbound.queries("userId") {
        let user: UserId = text.parse().map_err(|_| invalid("userId must be an id"))?;
        if !users.contains(&user) {
            users.push(user);
        }
        if users.len() > MOST_USERS {
            return Err(invalid("At most 100 users"));
        }
    }
    if users.is_empty() {
        return Err(invalid("userId required"));
    }
    let Some(service) = &api.presence else { return Ok(json(StatusCode::OK, &[(); 0])) };
    let visible = async |connection: &mut _| audience::visible_to(connection, reader.user.id, &users).await;
    let visible = api.context.database.run(visible).await?;
    let ids: Vec<_> = visible.iter().map(|(user, _)| *user).collect();
    // A wrong answer would stay: nobody is told again of who has been online all the time.
    let online = service.online(&ids).await.map_err(unavailable)?;
    let shown = visible.into_iter().map(|(user_id, seen)| {
        let online = online.contains(&user_id);
        Presence { user_id, online, last_seen_at: seen.filter(|_| !online) }
    });
    Ok(json(StatusCode::OK, &shown.collect::<Vec<_>>()))
}

pub(super) async fn report(api: Arc<Api>, _: Inbound, Json(report): Json<PresenceReport>) -> HandlerResult {
    let named = (1..=LONGEST_NAME).contains(&report.gateway.len())
        && report.gateway.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if !named || report.came.len() > MAX_CHANGES || report.left.len() > MAX_CHANGES {
        return Err(ApiError::BadBody("A malformed name, or too many users".into()));
    }
    let answer = match &api.presence {
        Some(service) => service.report(report).await.map_err(unavailable)?,
        // The gateways' setting differs from ours: nothing to do.
        None => PresenceAnswer { known: true },
    };
    Ok(json(StatusCode::OK, &answer))
}

fn unavailable(error: PresenceError) -> ApiError {
    match error {
        PresenceError::Store(error) => ApiError::Store(error),
        // Redis is logged where it fails, once a minute.
        PresenceError::Redis(_) | PresenceError::Slow | PresenceError::Unsettled => ApiError::NoPresence,
    }
}
