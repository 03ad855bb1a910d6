//! HTTP: the route tables, and what every request and answer has in common. Handlers are thin: they read the request in the
//! contract's order of checks, ask a command or the store, and say the result.
//!
//! A rejection means "not my route" and nothing else. Each path ends in its own 405; what no path takes is the one 404.

pub mod auth;
mod blocks;
mod conversations;
mod cors;
mod edge;
mod error;
mod internal;
pub mod limits;
mod login;
mod messages;
pub mod oauth;
mod openapi;
mod request;
mod sessions;
mod users;
mod web;

use std::sync::Arc;

use http::{StatusCode, header};
use protocol::feed;
use serde::Serialize;
use service_kit::secrets::Secrets;
use warp::{Filter, filters::BoxedFilter, reply::Response};

pub use cors::Cors;
pub use edge::Edge;

use crate::{commands::Context, external::External, request_context::RequestContext};
use auth::Auth;
use error::ApiError;
use limits::Limits;
use oauth::SignIn;

/// What handlers work with.
pub struct Api {
    pub context: Context,
    pub auth: Auth,
    pub limits: Limits,
    pub dev_login: bool,
    pub sign_in: SignIn,
    pub internal_secrets: Secrets,
    pub external: Option<Arc<External>>,
}

/// How every handler ends.
type Answer = Result<Response, ApiError>;
/// All methods of one path.
type Resource = BoxedFilter<(Answer,)>;

/// The listener that clients reach.
pub fn public(api: &Arc<Api>) -> BoxedFilter<(Response,)> {
    one_of([
        at(api, "/api/login", login::login(api)),
        at(api, "/api/login_options", login::login_options(api)),
        at(api, "/api/oauth/exchange", oauth::exchange(api)),
        at(api, "/api/oauth/{provider}", oauth::start(api)),
        at(api, "/api/oauth/{provider}/callback", oauth::callback(api)),
        at(api, "/api/refresh_token", login::refresh_token(api)),
        at(api, "/api/logout", sessions::logout(api)),
        at(api, "/api/sessions", sessions::sessions(api)),
        at(api, "/api/sessions/{id}", sessions::session(api)),
        at(api, "/api/stream_token", sessions::stream_token(api)),
        at(api, "/api/auth_user", users::auth_user(api)),
        at(api, "/api/usernames", users::usernames(api)),
        at(api, "/api/blocks/{id}", blocks::block(api)),
        at(api, "/api/conversations", conversations::conversations(api)),
        at(api, "/api/conversations/{id}", conversations::conversation(api)),
        at(api, "/api/conversations/{id}/other_participant", conversations::other_participant(api)),
        at(api, "/api/conversations/{id}/messages", messages::messages(api)),
        at(api, "/api/conversations/{id}/read_messages", messages::read_messages(api)),
        at(api, openapi::PATH, openapi::openapi()),
        at(api, feed::JWKS_PATH, login::jwks(api)),
        at(api, "web", web::web()),
    ])
}

/// The listener that gateways ask.
pub fn internal(api: &Arc<Api>) -> BoxedFilter<(Response,)> {
    one_of([
        at(api, feed::HEADS_PATH, internal::heads(api)),
        at(api, feed::RANGES_PATH, internal::ranges(api)),
        at(api, feed::KEYS_PATH, internal::keys(api)),
        at(api, feed::IDENTITY_PATH, internal::identity(api)),
        at(api, feed::JWKS_PATH, login::jwks(api)),
    ])
}

fn one_of<const N: usize>(routes: [BoxedFilter<(Response,)>; N]) -> BoxedFilter<(Response,)> {
    let nowhere = warp::any().map(|| ApiError::NOT_FOUND.into_response()).boxed();
    routes.into_iter().rev().fold(nowhere, |rest, route| route.or(rest).unify().boxed())
}

/// Which route answered, for metrics and logs.
#[derive(Debug, Clone, Copy)]
struct Label(&'static str);

/// Around every handler, so that what must follow from each answer is nobody's to forget.
fn at(api: &Arc<Api>, label: &'static str, resource: Resource) -> BoxedFilter<(Response,)> {
    let api = api.clone();
    resource
        .and(warp::ext::get::<RequestContext>())
        .map(move |answer: Answer, context: RequestContext| {
            let mut response = answer.unwrap_or_else(ApiError::into_response);
            api.auth.answered(&context, response.status());
            response.extensions_mut().insert(Label(label));
            response
        })
        .boxed()
}

/// HEAD is served wherever GET is: the same handler, of whose answer hyper sends the head.
fn read() -> impl Filter<Extract = (), Error = warp::Rejection> + Copy {
    warp::get().or(warp::head()).unify()
}

/// The end of each path: it is known, but not with this method.
fn otherwise(allow: &'static str) -> BoxedFilter<(Answer,)> {
    warp::any().map(move || Err(ApiError::MethodNotAllowed(allow))).boxed()
}

fn with(
    api: &Arc<Api>,
) -> impl Filter<Extract = (Arc<Api>,), Error = std::convert::Infallible> + Clone + use<> {
    let api = api.clone();
    warp::any().map(move || api.clone())
}

fn json<T: Serialize>(status: StatusCode, value: &T) -> Response {
    let body = serde_json::to_vec(value).expect("answers are strings, numbers and lists of them");
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    let form = header::HeaderValue::from_static("application/json; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, form);
    response
}

fn empty(status: StatusCode) -> Response {
    let mut response = Response::new(bytes::Bytes::new().into());
    *response.status_mut() = status;
    response
}

/// The header that tells a reader's place in their feed before what they read.
fn with_cursor(mut response: Response, cursor: protocol::position::Position) -> Response {
    let value =
        header::HeaderValue::from_str(&cursor.to_string()).expect("a cursor is digits, letters and a dash");
    response.headers_mut().insert("feed-cursor", value);
    response
}
