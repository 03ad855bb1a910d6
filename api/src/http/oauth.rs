//! Logging in at a provider: there, back, and fetching the token. People come here by following links, so what goes wrong on
//! the way is told to the page and not by a status: every way ends at `{ORIGIN}/callback`. Only who is over a limit is told so
//! at once, by 429.
//!
//! Logging somebody in as somebody else is an attack too (login CSRF): whoever writes to whom they take for others, writes to the
//! attacker. Three bonds prevent it. The state cookie ties the provider's answer to the browser that asked. The code that the
//! callback gives is tied to a cookie of the same answer, so that a link with an attacker's code does nothing in another
//! browser. And fetching needs a JSON body, which no external page can send without being asked about its origin first.

use std::{sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Deserialize;
use service_kit::{
    config::Origin,
    cookies::{self, Cookies},
    secrets::Secrets,
};
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{
    Answer, Api, Resource, empty,
    error::ApiError,
    login::token_answer,
    otherwise, read,
    request::{BODY_LIMIT, Inbound, inbound},
    with,
};
use crate::{
    commands::log_in::{self, Halves, arrive, log_in_by_code, log_in_by_profile},
    domain::user::Profile,
    metrics::Metrics,
    oauth::{
        Failure, Provider, Returned,
        attempt::{self, Seal},
    },
    store::{StoreError, identities::Arrived},
};

/// What a browser carries to the provider and back, a cookie for each attempt; and what it carries from the callback to the
/// exchange, one for each code. The names go on with the beginning of the `state` or the code that it goes with: so logins
/// in several tabs do not get in each other's way.
const ATTEMPT: &str = "login_";
const BINDING: &str = "code_";
/// So much of a secret of 256 bits is no secret.
const TELLS_APART: usize = 8;
/// Of each kind that a browser carries at once. The oldest give way: they were left behind.
const CARRIED: usize = 4;
/// Cookies that one answer takes back, at most.
const TAKEN_BACK: usize = 16;

/// What these routes work with.
pub struct SignIn {
    providers: Vec<Arc<Provider>>,
    origin: Origin,
    cookies: Cookies,
    seal: Seal,
    token_in_query: bool,
    metrics: Metrics,
}

impl SignIn {
    pub fn new(
        providers: Vec<Arc<Provider>>,
        origin: Origin,
        state_secrets: &Secrets,
        token_in_query: bool,
        metrics: Metrics,
    ) -> Self {
        let (cookies, seal) = (Cookies::new(&origin), Seal::new(state_secrets));
        Self { providers, origin, cookies, seal, token_in_query, metrics }
    }

    /// Of the providers that are configured.
    pub(super) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.providers.iter().map(|provider| provider.name())
    }

    /// The end of every login at a provider: its page, which is told this.
    fn to_page(&self, parameters: &[(&str, &str)]) -> Response {
        let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(parameters).finish();
        redirect(&format!("{}/callback?{query}", self.origin.as_str()))
    }

    fn failed(&self, provider: &'static str, failure: &Failure) -> Response {
        if let Failure::AccessDenied = failure {
            tracing::info!(provider, "a login ended: {failure}");
        } else {
            tracing::warn!(provider, outcome = failure.code(), "a login failed: {failure}");
        }
        self.metrics.login(provider, failure.code());
        self.to_page(&[("error", failure.code())])
    }

    /// Also when the fault is ours a person stands at the page, not at a problem in JSON.
    fn not_stored(&self, provider: &'static str, error: StoreError) -> Response {
        let code = match &error {
            StoreError::Unavailable(_) => "unavailable",
            StoreError::Fault(_) => "internal",
        };
        // Says in the log what it is.
        let _ = ApiError::from(error).into_response();
        self.metrics.login(provider, code);
        self.to_page(&[("error", code)])
    }

    /// The name of the cookie that goes with a secret. `None`: it is none of ours.
    fn cookie_of(&self, kind: &str, secret: &str) -> Option<String> {
        let tells = secret.get(..TELLS_APART)?;
        let is_ours = tells.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        is_ours.then(|| self.cookies.name(&format!("{kind}{tells}")))
    }

    /// What the browser carries of this kind for this secret.
    fn carried<'a>(&self, headers: &'a HeaderMap, kind: &str, secret: &str) -> Vec<&'a str> {
        self.cookie_of(kind, secret).map_or_else(Vec::new, |name| cookies::values(headers, &name))
    }

    /// Lets the browser that sent `headers` carry another one.
    fn carry(
        &self,
        response: &mut Response,
        headers: &HeaderMap,
        kind: &str,
        [secret, value]: [&str; 2],
        age: Duration,
    ) {
        let name = self.cookie_of(kind, secret).expect("our secrets are base64");
        let carried = cookies::names(headers, &self.cookies.name(kind));
        let too_many = (carried.len() + 1).saturating_sub(CARRIED).min(TAKEN_BACK);
        let taken_back = carried[..too_many].iter().map(|name| self.cookies.set(name, "", 0));
        for cookie in taken_back.chain([self.cookies.set(&name, value, age.as_secs())]) {
            response.headers_mut().append(header::SET_COOKIE, cookie);
        }
    }

    /// The login is over, one way or the other.
    fn take_back(&self, response: &mut Response, kind: &str, secret: &str) {
        if let Some(name) = self.cookie_of(kind, secret) {
            response.headers_mut().append(header::SET_COOKIE, self.cookies.set(&name, "", 0));
        }
    }
}

/// A path of each provider that has settings. One that has none is an unknown path like any other.
fn of_each_provider(
    api: &Arc<Api>,
    resource: impl Fn(BoxedFilter<(Arc<Provider>,)>) -> Resource,
    nowhere: Resource,
) -> Resource {
    api.sign_in.providers.iter().fold(nowhere, |others, provider| {
        let name = provider.name();
        let provider = provider.clone();
        let path = warp::path("api").and(warp::path("oauth")).and(warp::path(name));
        let path = path.map(move || provider.clone()).boxed();
        resource(path).or(others).unify().boxed()
    })
}

pub(super) fn start(api: &Arc<Api>) -> Resource {
    let nowhere = warp::path!("api" / "oauth" / String).map(|_| Err(ApiError::NOT_FOUND)).boxed();
    let resource = |path: BoxedFilter<(Arc<Provider>,)>| {
        let path = path.and(warp::path::end()).boxed();
        let get = path.clone().and(read()).and(inbound()).and(with(api)).then(get_start);
        get.or(path.and(otherwise("GET, HEAD")).map(|_, answer| answer)).unify().boxed()
    };
    of_each_provider(api, resource, nowhere)
}

async fn get_start(provider: Arc<Provider>, inbound: Inbound, api: Arc<Api>) -> Answer {
    api.limits.login(&inbound).await?;
    let sign_in = &api.sign_in;
    let begun = match provider.begin().await {
        Ok(begun) => begun,
        Err(failure) => return Ok(sign_in.failed(provider.name(), &failure)),
    };
    sign_in.metrics.login(provider.name(), "started");
    let attempt = [&*begun.attempt.state, &*sign_in.seal.seal(&begun.attempt)];
    let mut response = redirect(&begun.url);
    sign_in.carry(&mut response, &inbound.headers, ATTEMPT, attempt, attempt::LIFETIME);
    Ok(response)
}

pub(super) fn callback(api: &Arc<Api>) -> Resource {
    let nowhere =
        warp::path!("api" / "oauth" / String / "callback").map(|_| Err(ApiError::NOT_FOUND)).boxed();
    let resource = |path: BoxedFilter<(Arc<Provider>,)>| {
        let path = path.and(warp::path("callback")).and(warp::path::end()).boxed();
        let get = path.clone().and(read()).and(inbound()).and(with(api)).then(get_callback);
        get.or(path.and(otherwise("GET, HEAD")).map(|_, answer| answer)).unify().boxed()
    };
    of_each_provider(api, resource, nowhere)
}

async fn get_callback(provider: Arc<Provider>, inbound: Inbound, api: Arc<Api>) -> Answer {
    // Nothing is used up by then: the same link is good a little later.
    api.limits.login(&inbound).await?;
    let sign_in = &api.sign_in;
    let state = inbound.query("state").unwrap_or_default();
    let carried = sign_in.carried(&inbound.headers, ATTEMPT, &state);
    let attempt = carried.into_iter().find_map(|sealed| sign_in.seal.open(sealed));
    let returned = Returned {
        state: Some(state.clone()),
        code: inbound.query("code"),
        error: inbound.query("error"),
        iss: inbound.query("iss"),
    };
    let mut response = match provider.finish(attempt, returned).await {
        Ok(profile) => match arrived(&api, provider.name(), profile, &inbound).await {
            Ok(response) => response,
            Err(error) => sign_in.not_stored(provider.name(), error),
        },
        // The attempt goes on: whoever sent a browser here with a wrong state shall not end what it has begun elsewhere.
        Err(failure @ Failure::BadState(_)) => return Ok(sign_in.failed(provider.name(), &failure)),
        Err(failure) => sign_in.failed(provider.name(), &failure),
    };
    sign_in.take_back(&mut response, ATTEMPT, &state);
    Ok(response)
}

async fn arrived(
    api: &Api,
    provider: &'static str,
    profile: Profile,
    inbound: &Inbound,
) -> Result<Response, StoreError> {
    let (sign_in, context) = (&api.sign_in, &api.context);
    let (Arrived { user, created }, response) = if sign_in.token_in_query {
        let (arrived, session) =
            log_in_by_profile(context, profile, inbound.device(), api.auth.lifetime()).await?;
        let token = api.auth.issue(arrived.user, session);
        let expires_at = protocol::event::rfc3339(token.expires_at);
        let mut response = sign_in.to_page(&[("token", &token.text), ("expires_at", &expires_at)]);
        response.headers_mut().append(header::SET_COOKIE, api.auth.cookie(&token));
        (arrived, response)
    } else {
        let (arrived, Halves { code, binding }) = arrive(context, profile).await?;
        let mut response = sign_in.to_page(&[("code", &code)]);
        let halves = [&*code, &*binding];
        sign_in.carry(&mut response, &inbound.headers, BINDING, halves, log_in::CODE_LIFETIME);
        (arrived, response)
    };
    tracing::info!(user.id = %user, provider, created, "logged in at a provider");
    sign_in.metrics.login(provider, "succeeded");
    Ok(response)
}

pub(super) fn exchange(api: &Arc<Api>) -> Resource {
    let path = warp::path!("api" / "oauth" / "exchange").boxed();
    let post = path.clone().and(warp::post()).and(inbound()).and(with(api)).then(post_exchange);
    post.or(path.and(otherwise("POST"))).unify().boxed()
}

#[derive(Deserialize)]
struct ExchangeBody {
    code: Option<String>,
}

async fn post_exchange(mut inbound: Inbound, api: Arc<Api>) -> Answer {
    inbound.require_json()?;
    api.limits.login(&inbound).await?;
    let body: ExchangeBody = inbound.json(BODY_LIMIT).await?;
    let code = body.code.unwrap_or_default();
    let bindings = api.sign_in.carried(&inbound.headers, BINDING, &code);
    // Without the cookie this is not the browser that came back from the provider, whoever sent it here.
    if bindings.is_empty() {
        return Err(ApiError::Unauthorized);
    }
    let lifetime = api.auth.lifetime();
    let (user, session) = log_in_by_code(&api.context, &code, &bindings, inbound.device(), lifetime)
        .await?
        .ok_or(ApiError::Unauthorized)?;
    tracing::info!(user.id = %user.id, session.id = %session.id, "logged in by a code");
    let token = api.auth.issue(user.id, session);
    let mut response = token_answer(&api, Some(&user), &token);
    api.sign_in.take_back(&mut response, BINDING, &code);
    Ok(response)
}

fn redirect(to: &str) -> Response {
    let mut response = empty(StatusCode::TEMPORARY_REDIRECT);
    let to = HeaderValue::from_str(to).expect("a URL is ASCII without spaces");
    response.headers_mut().insert(header::LOCATION, to);
    response
}
