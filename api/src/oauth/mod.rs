//! Login by OAuth 2.0 at GitHub or any `OpenID` Connect provider: the authorization request, and the account behind the callback.
//! Every claim of a provider is checked, and every failure has a code.
//!
//! The state of a login is kept by the browser ([`attempt`]), not here.

pub mod attempt;
mod github;
mod oidc;
mod token;

use std::{io, sync::Arc, time::Duration};

use http::{Request, Response, StatusCode, header};
use oauth2::{
    AuthType, AuthUrl, ClientId, ClientSecret, CsrfToken, PkceCodeChallenge, RedirectUrl, Scope, TokenUrl,
};
use protocol::jose::Person;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use service_kit::{
    config::Origin,
    outbound::{Outbound, OutboundError, OutboundLimits},
};
use subtle::ConstantTimeEq;
use thiserror::Error;

use crate::{
    config::{ClientRegistration, ProviderSettings},
    domain::user::Profile,
};
use attempt::Attempt;
use oidc::Discovery;

/// The cause of a failed login. The text is for the log and contains no secret.
#[derive(Debug, Clone, Error)]
pub enum LoginFailure {
    #[error("access was denied at the provider")]
    AccessDenied,
    #[error("{0}")]
    BadState(&'static str),
    #[error("{0}")]
    Provider(String),
    /// The provider may be available again later.
    #[error("{0}")]
    Unavailable(String),
    #[error("invalid profile: {0}")]
    BadProfile(&'static str),
}

impl LoginFailure {
    pub fn code(&self) -> &'static str {
        match self {
            Self::AccessDenied => "access_denied",
            Self::BadState(_) => "bad_state",
            Self::Provider(_) => "provider_error",
            Self::Unavailable(_) => "provider_unavailable",
            Self::BadProfile(_) => "bad_profile",
        }
    }
}

#[derive(Debug, Default)]
pub struct Returned {
    pub state: Option<String>,
    pub code: Option<String>,
    pub error: Option<String>,
    pub iss: Option<String>,
}

pub struct Provider {
    name: &'static str,
    kind: ProviderKind,
    registration: ClientRegistration,
    redirect: RedirectUrl,
    outbound: Outbound,
}

enum ProviderKind {
    GitHub { issuer: String, endpoints: Arc<Endpoints> },
    Oidc(Box<Discovery>),
}

struct Endpoints {
    authorize: AuthUrl,
    token: TokenUrl,
    profile: String,
    auth: AuthType,
    /// Its callback always has `iss` (RFC 9207).
    names_itself: bool,
}

/// The authorization URL, and what the browser must send back.
pub struct StartedLogin {
    pub url: String,
    pub attempt: Attempt,
}

/// All providers with settings. They redirect browsers back to `origin`.
pub fn providers(
    settings: Vec<ProviderSettings>,
    origin: &Origin,
    time_limit: Duration,
) -> io::Result<Vec<Arc<Provider>>> {
    if settings.is_empty() {
        return Ok(Vec::new());
    }
    let outbound = Outbound::new(OutboundLimits::external(time_limit))?;
    let provider = |settings| Arc::new(Provider::new(settings, origin, outbound.clone()));
    Ok(settings.into_iter().map(provider).collect())
}

impl Provider {
    fn new(settings: ProviderSettings, origin: &Origin, outbound: Outbound) -> Self {
        let (name, kind, registration) = match settings {
            ProviderSettings::GitHub { url, api_url, registration } => {
                let endpoints = Arc::new(github::endpoints(&url, &api_url));
                ("github", ProviderKind::GitHub { issuer: url, endpoints }, registration)
            }
            ProviderSettings::Oidc { issuer, registration } => {
                ("oidc", ProviderKind::Oidc(Box::new(Discovery::new(issuer))), registration)
            }
        };
        let redirect = format!("{}/api/oauth/{name}/callback", origin.as_str());
        let redirect = RedirectUrl::new(redirect).expect("an origin and a path are a URL");
        Self { name, kind, registration, redirect, outbound }
    }

    pub fn name(&self) -> &'static str {
        self.name
    }

    pub async fn begin(&self) -> Result<StartedLogin, LoginFailure> {
        let client = self.client(&*self.endpoints().await?);
        let (challenge, verifier) = PkceCodeChallenge::new_random_sha256();
        let secret = || CsrfToken::new_random_len(32);
        let nonce = secret().into_secret();
        let mut request = client.authorize_url(secret).set_pkce_challenge(challenge);
        request = match &self.kind {
            ProviderKind::GitHub { .. } => request.add_scope(Scope::new("read:user".into())),
            ProviderKind::Oidc(_) => request
                .add_scopes(["openid", "profile"].map(|scope| Scope::new(scope.into())))
                .add_extra_param("nonce", &nonce),
        };
        let (url, state) = request.url();
        let attempt = Attempt::new(self.name, state.into_secret(), verifier.into_secret(), nonce);
        Ok(StartedLogin { url: url.into(), attempt })
    }

    /// Completes a login. `attempt` is the browser's, if its signature is valid and it has not expired.
    pub async fn finish(
        &self,
        attempt: Option<Attempt>,
        returned: Returned,
    ) -> Result<Profile, LoginFailure> {
        let attempt = attempt.ok_or(LoginFailure::BadState("the browser has no valid login attempt"))?;
        if attempt.provider != self.name {
            return Err(LoginFailure::BadState("the login attempt is for another provider"));
        }
        let state = returned.state.unwrap_or_default();
        // In constant time, so that timing does not reveal how much of a guess is right.
        if !bool::from(state.as_bytes().ct_eq(attempt.state.as_bytes())) {
            return Err(LoginFailure::BadState("state does not match the login attempt"));
        }
        if returned.iss.as_deref().is_some_and(|iss| !self.is_issuer(iss)) {
            return Err(LoginFailure::BadState("iss names another issuer"));
        }
        if let Some(error) = returned.error {
            return Err(match error.as_str() {
                "access_denied" => LoginFailure::AccessDenied,
                "temporarily_unavailable" | "server_error" => LoginFailure::Unavailable(error_code(&error)),
                _ => LoginFailure::Provider(error_code(&error)),
            });
        }
        let code = returned
            .code
            .ok_or_else(|| LoginFailure::Provider("the callback has neither code nor error".into()))?;
        let endpoints = self.endpoints().await?;
        // RFC 9207: without `iss`, the answer is not from this provider.
        if endpoints.names_itself && returned.iss.is_none() {
            return Err(LoginFailure::BadState("iss is missing"));
        }
        let tokens =
            token::exchange(&self.client(&endpoints), &self.outbound, code, attempt.verifier).await?;
        let answer = self.profile(&endpoints.profile, tokens.access()).await?;
        match &self.kind {
            ProviderKind::GitHub { issuer, .. } => github::profile(issuer, &answer),
            ProviderKind::Oidc(discovery) => {
                let (issuer, client_id) = (discovery.issuer(), &self.registration.client_id);
                let info = oidc::user_info(&answer)?;
                let id_claims = match tokens.id_token() {
                    Some(id_token) => {
                        oidc::check_id_token(id_token, issuer, client_id, &attempt.nonce, &info.sub)?
                    }
                    None => Person::default(),
                };
                oidc::profile(issuer, &info, &id_claims)
            }
        }
    }

    fn is_issuer(&self, iss: &str) -> bool {
        match &self.kind {
            // GitHub predates RFC 9207: its issuer is its address, in its metadata with the path.
            ProviderKind::GitHub { issuer, .. } => {
                iss == issuer || iss.strip_suffix("/login/oauth").is_some_and(|base| base == issuer)
            }
            ProviderKind::Oidc(discovery) => iss == discovery.issuer(),
        }
    }

    async fn endpoints(&self) -> Result<Arc<Endpoints>, LoginFailure> {
        match &self.kind {
            ProviderKind::GitHub { endpoints, .. } => Ok(endpoints.clone()),
            ProviderKind::Oidc(discovery) => discovery.endpoints(&self.outbound).await,
        }
    }

    fn client(&self, endpoints: &Endpoints) -> token::OAuthClient {
        oauth2::Client::new(ClientId::new(self.registration.client_id.clone()))
            .set_client_secret(ClientSecret::new(self.registration.client_secret.clone()))
            .set_auth_type(endpoints.auth.clone())
            .set_auth_uri(endpoints.authorize.clone())
            .set_token_uri(endpoints.token.clone())
            .set_redirect_uri(self.redirect.clone())
    }

    async fn profile(&self, url: &str, access_token: &str) -> Result<Vec<u8>, LoginFailure> {
        let request = Request::get(url)
            .header(header::ACCEPT, "application/json")
            .header(header::AUTHORIZATION, format!("Bearer {access_token}"))
            .body(Vec::new())
            .map_err(|_| LoginFailure::Provider("its access token is not a valid header".into()))?;
        let response = self::request(&self.outbound, request).await.map_err(|error| match error {
            Unanswered::No(OutboundError::TooLarge(_)) => LoginFailure::BadProfile("too large"),
            other => other.into(),
        })?;
        if response.status() != StatusCode::OK {
            return Err(LoginFailure::Provider(format!(
                "the profile request was answered with {}",
                response.status()
            )));
        }
        Ok(response.into_body())
    }
}

#[derive(Debug, Error)]
enum Unanswered {
    #[error(transparent)]
    No(#[from] OutboundError),
    #[error("answered {0}")]
    Status(StatusCode),
}

impl From<Unanswered> for LoginFailure {
    fn from(error: Unanswered) -> Self {
        match error {
            Unanswered::No(OutboundError::TooLarge(_)) => Self::Provider(error.to_string()),
            _ => Self::Unavailable(error.to_string()),
        }
    }
}

async fn request(
    outbound: &Outbound,
    mut request: Request<Vec<u8>>,
) -> Result<Response<Vec<u8>>, Unanswered> {
    // GitHub requires a user agent.
    request.headers_mut().insert(header::USER_AGENT, header::HeaderValue::from_static("messenger"));
    let response = outbound.send(request).await?.map(Into::into);
    let status = response.status();
    if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
        return Err(Unanswered::Status(status));
    }
    Ok(response)
}

/// The error code of a provider for the log, if it has the form of one.
fn error_code(code: &str) -> String {
    let is_a_code = code.len() <= 64 && code.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    format!("the provider answered error {}", if is_a_code { code } else { "of an invalid form" })
}

/// A JSON object. Derived code alone would also accept an array of the values.
fn object<T: DeserializeOwned>(json: &[u8]) -> Option<T> {
    let members: Map<String, Value> = serde_json::from_slice(json).ok()?;
    serde_json::from_value(Value::Object(members)).ok()
}

/// A non-empty string, or nothing.
fn text(value: &Value) -> Option<&str> {
    value.as_str().filter(|text| !text.trim().is_empty())
}
