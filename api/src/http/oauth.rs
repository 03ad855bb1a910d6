//! Logging in at a provider: to the provider, back, and the exchange of a code for a token. Browsers arrive by links, so
//! failures are reported to the page at `{ORIGIN}/callback` and not by a status, except 429.
//!
//! Login CSRF, which logs a victim in as the attacker, is prevented three times. The state cookie binds the provider's answer
//! to the browser that began. The code of the callback is bound to a cookie of the same answer, so a link with an attacker's
//! code does nothing in another browser. The exchange needs a JSON body, which a page of another origin cannot send without a
//! preflight.

use std::{sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Deserialize;
use service_kit::{
    config::Origin,
    cookies::{self, Cookies},
    secrets::Secrets,
};
use warp::reply::Response;

use super::{
    Api, HandlerResult, empty,
    error::{ApiError, RequestFailure},
    login::token_answer,
    request::{Inbound, Json, NoBody},
};
use crate::{
    commands::log_in::{self, Halves, LogInOutcome, arrive, log_in_by_code, log_in_by_profile},
    domain::user::Profile,
    metrics::Metrics,
    oauth::{
        LoginFailure, Provider, Returned,
        attempt::{self, Seal},
    },
    store::{StoreError, identities::Provisioned},
};

/// Prefixes of cookies: one from here to the provider and back for each attempt, one from the callback to the exchange for
/// each code. The beginning of the `state` or the code follows, so that logins in several tabs do not interfere.
const ATTEMPT: &str = "login_";
const BINDING: &str = "code_";
/// Characters of a secret of 256 bits that may be public.
const NAME_CHARS: usize = 8;
/// Cookies of each kind in one browser. The oldest, of abandoned logins, are removed.
const CARRIED: usize = 4;
/// Cookies that one answer removes, at most.
const REMOVED: usize = 16;

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

    pub(super) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.providers.iter().map(|provider| provider.name())
    }

    fn provider(&self, inbound: &Inbound) -> Result<&Provider, ApiError> {
        let provider = self.providers.iter().find(|provider| provider.name() == inbound.parameters[0]);
        provider.map(Arc::as_ref).ok_or(ApiError::NOT_FOUND)
    }

    /// Every login at a provider ends at this page.
    fn to_page(&self, parameters: &[(&str, &str)]) -> Response {
        let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(parameters).finish();
        redirect(&format!("{}/callback?{query}", self.origin.as_str()))
    }

    fn failed(&self, provider: &'static str, failure: &LoginFailure) -> Response {
        if let LoginFailure::AccessDenied = failure {
            tracing::info!(provider, "login denied: {failure}");
        } else {
            tracing::warn!(provider, outcome = failure.code(), "login failed: {failure}");
        }
        self.metrics.login(provider, failure.code());
        self.to_page(&[("error", failure.code())])
    }

    /// The user sees the page after a fault of ours, too.
    fn not_stored(&self, provider: &'static str, error: StoreError) -> Response {
        let code = match &error {
            StoreError::Unavailable(_) | StoreError::Crowded => "unavailable",
            StoreError::Fault(_) => "internal",
        };
        self.metrics.login(provider, code);
        let mut response = self.to_page(&[("error", code)]);
        response.extensions_mut().insert(RequestFailure::from(error));
        response
    }

    /// The name of the cookie that belongs to a secret. `None` if the secret is not one of ours.
    fn cookie_of(&self, kind: &str, secret: &str) -> Option<String> {
        let prefix = secret.get(..NAME_CHARS)?;
        let is_ours = prefix.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        is_ours.then(|| self.cookies.name(&format!("{kind}{prefix}")))
    }

    fn carried<'a>(&self, headers: &'a HeaderMap, kind: &str, secret: &str) -> Vec<&'a str> {
        self.cookie_of(kind, secret).map_or_else(Vec::new, |name| cookies::values(headers, &name))
    }

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
        let excess = (carried.len() + 1).saturating_sub(CARRIED).min(REMOVED);
        let removed = carried[..excess].iter().map(|name| self.cookies.set(name, "", 0));
        for cookie in removed.chain([self.cookies.set(&name, value, age.as_secs())]) {
            response.headers_mut().append(header::SET_COOKIE, cookie);
        }
    }

    fn remove(&self, response: &mut Response, kind: &str, secret: &str) {
        if let Some(name) = self.cookie_of(kind, secret) {
            response.headers_mut().append(header::SET_COOKIE, self.cookies.set(&name, "", 0));
        }
    }
}

pub(super) async fn start(api: Arc<Api>, inbound: Inbound, _: NoBody) -> HandlerResult {
    let sign_in = &api.sign_in;
    let provider = sign_in.provider(&inbound)?;
    let login = match provider.begin().await {
        Ok(login) => login,
        Err(failure) => return Ok(sign_in.failed(provider.name(), &failure)),
    };
    sign_in.metrics.login(provider.name(), "started");
    let attempt = [&*login.attempt.state, &*sign_in.seal.seal(&login.attempt)];
    let mut response = redirect(&login.url);
    sign_in.carry(&mut response, &inbound.headers, ATTEMPT, attempt, attempt::LIFETIME);
    Ok(response)
}

pub(super) async fn callback(api: Arc<Api>, inbound: Inbound, _: NoBody) -> HandlerResult {
    let sign_in = &api.sign_in;
    let provider = sign_in.provider(&inbound)?;
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
        // The cookie stays: a link with a wrong state must not end a login that the browser began elsewhere.
        Err(failure @ LoginFailure::BadState(_)) => return Ok(sign_in.failed(provider.name(), &failure)),
        Err(failure) => sign_in.failed(provider.name(), &failure),
    };
    sign_in.remove(&mut response, ATTEMPT, &state);
    Ok(response)
}

async fn arrived(
    api: &Api,
    provider: &'static str,
    profile: Profile,
    inbound: &Inbound,
) -> Result<Response, StoreError> {
    let (sign_in, context) = (&api.sign_in, &api.context);
    let (Provisioned { user, created }, response) = if sign_in.token_in_query {
        let (arrived, session) =
            log_in_by_profile(context, profile, inbound.device(), api.tokens.lifetime()).await?;
        let token = api.tokens.issue(arrived.user, session);
        let expires_at = protocol::event::rfc3339(token.expires_at);
        let mut response = sign_in.to_page(&[("token", &token.text), ("expires_at", &expires_at)]);
        response.headers_mut().append(header::SET_COOKIE, api.tokens.cookie(&token));
        (arrived, response)
    } else {
        let (arrived, Halves { code, binding }) = arrive(context, profile).await?;
        let mut response = sign_in.to_page(&[("code", &code)]);
        let halves = [&*code, &*binding];
        sign_in.carry(&mut response, &inbound.headers, BINDING, halves, log_in::CODE_LIFETIME);
        (arrived, response)
    };
    tracing::info!(user.id = %user, provider, created, "user logged in at a provider");
    sign_in.metrics.login(provider, "succeeded");
    Ok(response)
}

#[derive(Deserialize)]
pub(super) struct ExchangeBody {
    code: Option<String>,
}

pub(super) async fn exchange(
    api: Arc<Api>,
    inbound: Inbound,
    Json(body): Json<ExchangeBody>,
) -> HandlerResult {
    let code = body.code.unwrap_or_default();
    let bindings = api.sign_in.carried(&inbound.headers, BINDING, &code);
    // Without the cookie this is not the browser that came back from the provider.
    if bindings.is_empty() {
        return Err(ApiError::Unauthorized);
    }
    let lifetime = api.tokens.lifetime();
    let outcome = log_in_by_code(&api.context, &code, &bindings, inbound.device(), lifetime).await?;
    let LogInOutcome::LoggedIn(user, session) = outcome else { return Err(ApiError::Unauthorized) };
    let token = api.tokens.issue(user.id, session);
    let mut response = token_answer(&api, Some(&user), &token);
    api.sign_in.remove(&mut response, BINDING, &code);
    Ok(response)
}

fn redirect(to: &str) -> Response {
    let mut response = empty(StatusCode::TEMPORARY_REDIRECT);
    let to = HeaderValue::from_str(to).expect("a URL is ASCII without spaces");
    response.headers_mut().insert(header::LOCATION, to);
    response
}
