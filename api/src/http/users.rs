//! Users: oneself, and the names of others.

use std::sync::Arc;

use http::StatusCode;
use serde::Serialize;

use super::{Api, HandlerResult, auth::LiveCaller, error::ApiError, json, request::Inbound, with_cursor};
use crate::{
    domain::{name::may_be_a_name, user::User},
    store::users,
};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct AuthUser<'a> {
    #[serde(flatten)]
    user: &'a User,
    unread_total: i64,
}

pub(super) async fn auth_user(_: Arc<Api>, reader: LiveCaller, _: Inbound) -> HandlerResult {
    let body = AuthUser { user: &reader.user, unread_total: reader.unread_total };
    Ok(with_cursor(json(StatusCode::OK, &body), reader.cursor))
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
