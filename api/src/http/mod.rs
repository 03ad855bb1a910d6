//! HTTP: the route tables, and what all answers have in common. [`endpoint`] makes the checks before every handler in the
//! order of docs/api.md; handlers call a command or the store and answer with its outcome.

mod administration;
mod asyncapi;
pub mod auth;
mod blocks;
mod conversations;
mod cors;
mod edge;
mod endpoint;
mod error;
mod events;
mod external_users;
mod groups;
mod idempotency;
mod internal;
pub mod limits;
mod login;
mod messages;
pub mod oauth;
mod openapi;
mod presence;
mod problems;
mod request;
mod route;
mod services;
mod sessions;
pub mod tokens;
mod typing;
mod users;
mod web;

use std::{sync::Arc, time::Duration};

use http::{HeaderValue, StatusCode, header};
use protocol::{feed, position::Position, presence::PRESENCE_PATH};
use serde::Serialize;
use service_kit::secrets::Secrets;
use warp::{filters::BoxedFilter, reply::Response};

pub use cors::Cors;
pub use edge::ApiEdge;

use crate::{
    commands::CommandContext, domain::service_token::Scope, external::ExternalUsers,
    presence::PresenceService,
};
use auth::Auth;
use endpoint::{change, gateway, nothing, open, read, service};
use error::ApiError;
use limits::{Rate, RequestLimits};
use oauth::SignIn;
use route::{at, matching, routes};
use tokens::Tokens;

pub struct Api {
    pub context: CommandContext,
    pub auth: Auth,
    pub tokens: Tokens,
    pub limits: RequestLimits,
    pub dev_login: bool,
    pub usernames_change: bool,
    /// `None` if it is off.
    pub presence: Option<PresenceService>,
    /// Code points.
    pub longest_message: usize,
    /// Members.
    pub largest_group: usize,
    pub edit_window: Duration,
    pub sign_in: SignIn,
    pub internal_secrets: Secrets,
    pub external_issuer: Option<String>,
    pub external: Option<Arc<ExternalUsers>>,
}

type HandlerResult = Result<Response, ApiError>;

#[rustfmt::skip]
pub fn public(api: &Arc<Api>) -> BoxedFilter<(Response,)> {
    let dev_login = api.dev_login;
    let usernames_change = api.usernames_change;
    let profile = move |_: &_, request::Json(body)| users::profile(body, usernames_change);
    let longest = api.longest_message;
    let draft = move |inbound: &_, body| messages::draft(inbound, body, longest);
    let edit = move |inbound: &_, body| messages::edit_of(inbound, body, longest);
    let providers: Vec<_> = api.sign_in.names().collect();
    let is_provider = move |parameters: &[String]| providers.iter().any(|name| *name == parameters[0]);
    routes(api, [
        at("/api/login").only_if(move |_| dev_login).post(open(login::log_in).limit(Rate::LogIn)),
        at("/api/login_options").get(open(login::options)),
        at("/api/oauth/exchange").post(open(oauth::exchange).limit(Rate::LogIn)),
        at("/api/oauth/{provider}").only_if(is_provider.clone()).get(open(oauth::start).limit(Rate::LogIn)),
        at("/api/oauth/{provider}/callback").only_if(is_provider).get(open(oauth::callback).limit(Rate::LogIn)),
        at("/api/refresh_token").post(change(nothing, login::refresh)),
        at("/api/logout").post(change(nothing, sessions::log_out)),
        at("/api/sessions").get(read(sessions::list)).delete(change(nothing, sessions::end_others)),
        at("/api/sessions/{id}").delete(change(sessions::id, sessions::end_one)),
        at("/api/stream_token").post(change(nothing, sessions::stream_token)),
        at("/api/auth_user").get(read(users::auth_user)).patch(change(profile, users::update).limit(Rate::Change)),
        at("/api/usernames").get(read(users::search).limit(Rate::Search)),
        at("/api/presence").get(read(presence::of_partners).limit(Rate::Search)),
        at("/api/limits").get(open(messages::limits)),
        at("/api/blocks").get(read(blocks::list)),
        at("/api/blocks/{id}").put(change(blocks::user, blocks::block).limit(Rate::Change))
            .delete(change(blocks::user, blocks::unblock).limit(Rate::Change)),
        at("/api/conversations").get(read(conversations::list))
            .post(change(conversations::new, conversations::start).limit(Rate::Start).largest_body(conversations::LARGEST_BODY)),
        at("/api/conversations/{id}").get(read(conversations::find))
            .patch(change(groups::new_title, groups::rename).limit(Rate::Change)),
        at("/api/conversations/{id}/other_participant").get(read(conversations::other_participant)),
        at("/api/conversations/{id}/messages").get(read(messages::list))
            .post(change(draft, messages::send).limit(Rate::Send).largest_body(messages::largest_body(longest))),
        at("/api/conversations/{id}/participants").get(read(groups::participants))
            .post(change(groups::new_member, groups::add).limit(Rate::Change)),
        at("/api/conversations/{id}/participants/{user}").patch(change(groups::new_role, groups::set_role).limit(Rate::Change))
            .delete(change(groups::one_member, groups::remove).limit(Rate::Change)),
        at("/api/conversations/{id}/messages/{message}")
            .patch(change(edit, messages::edit).limit(Rate::Send).largest_body(messages::largest_body(longest)))
            .delete(change(messages::one, messages::delete).limit(Rate::Change)),
        at("/api/conversations/{id}/read_messages").post(change(messages::conversation, messages::mark_read).limit(Rate::Change)),
        at("/api/conversations/{id}/typing").post(change(messages::conversation, typing::announce).limit(Rate::Typing)),
        at("/api/events").post(service(Scope::Publish, events::published, events::publish).largest_body(events::LARGEST_BODY)),
        at("/api/users/{id}").delete(service(Scope::Admin, administration::user, administration::erase)),
        at("/api/users/{id}/export").get(service(Scope::Admin, administration::user, administration::export)),
        at("/api/users/by_subject/{subject}").put(service(Scope::Users, external_users::profile, external_users::put)),
        at("/api/users/by_subject/{subject}/stream_token")
            .post(service(Scope::Users, external_users::subject, external_users::stream_token)),
        at(asyncapi::PATH).get(open(asyncapi::document)),
        at(openapi::PATH).get(open(openapi::document)),
        at(feed::JWKS_PATH).get(open(login::jwks)),
        at("/problems").get(open(problems::list)),
        at("/problems/{code}").only_if(problems::exists).get(open(problems::page)),
        matching("web", web::path).get(open(web::file)),
    ])
}

pub fn internal(api: &Arc<Api>) -> BoxedFilter<(Response,)> {
    routes(
        api,
        [
            at(feed::HEADS_PATH).post(gateway(internal::heads).largest_body(internal::LARGEST_BODY)),
            at(feed::RANGES_PATH).post(gateway(internal::ranges).largest_body(internal::LARGEST_BODY)),
            at(PRESENCE_PATH).post(gateway(presence::report).largest_body(internal::LARGEST_BODY)),
            at(feed::KEYS_PATH).get(gateway(internal::keys)),
            at(feed::IDENTITY_PATH)
                .post(gateway(internal::identity).largest_body(internal::LARGEST_IDENTITIES)),
            at(feed::JWKS_PATH).get(open(login::jwks)),
        ],
    )
}

/// In an answer's extensions: which route it is from, for logs and metrics.
#[derive(Debug, Clone, Copy)]
struct Label(&'static str);

const JSON: HeaderValue = HeaderValue::from_static("application/json; charset=utf-8");

fn json<T: Serialize>(status: StatusCode, value: &T) -> Response {
    let body = serde_json::to_vec(value).expect("answers are strings, numbers and lists of them");
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, JSON);
    response
}

fn empty(status: StatusCode) -> Response {
    let mut response = Response::new(bytes::Bytes::new().into());
    *response.status_mut() = status;
    response
}

/// Sets the reader's position in their feed, as it was before the answer was read.
fn with_cursor(mut response: Response, cursor: Position) -> Response {
    let cursor = HeaderValue::from_str(&cursor.to_string()).expect("a cursor is digits, letters and a dash");
    response.headers_mut().insert("feed-cursor", cursor);
    response
}
