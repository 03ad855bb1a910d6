//! `OpenID` Connect: discovery, user info and the checks of the id token.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::Utc;
use http::{Request, StatusCode, header};
use oauth2::{AuthType, AuthUrl, TokenUrl};
use protocol::jose::{self, Audiences, NumericDate, Person, Unverified};
use serde::Deserialize;
use service_kit::outbound::Outbound;
use tokio::sync::Mutex;
use url::Url;

use super::{Endpoints, LoginFailure, object, request};
use crate::{config::protected_url, domain::user::Profile};

/// The discovery document is fetched again after this.
const FRESH: Duration = Duration::from_hours(1);
/// If that fails, the known endpoints are used for this long.
const USABLE: Duration = Duration::from_hours(24);
/// Between a failed discovery and the next, so that every login does not query a provider that is down.
const PAUSE: Duration = Duration::from_secs(2);
const LEEWAY: i64 = 60;

/// The endpoints of a provider, discovered when first needed.
pub(super) struct Discovery {
    issuer: String,
    /// Held while discovering, so that concurrent logins share one request.
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    found: Option<(Arc<Endpoints>, Instant)>,
    failed: Option<(LoginFailure, Instant)>,
}

#[derive(Deserialize)]
struct Document {
    issuer: String,
    authorization_endpoint: String,
    token_endpoint: String,
    userinfo_endpoint: String,
    #[serde(default)]
    token_endpoint_auth_methods_supported: Option<Vec<String>>,
    #[serde(default)]
    authorization_response_iss_parameter_supported: Option<bool>,
}

impl Discovery {
    pub(super) fn new(issuer: String) -> Self {
        Self { issuer, known: Mutex::default() }
    }

    pub(super) fn issuer(&self) -> &str {
        &self.issuer
    }

    pub(super) async fn endpoints(&self, outbound: &Outbound) -> Result<Arc<Endpoints>, LoginFailure> {
        let mut known = self.known.lock().await;
        if let Some((endpoints, at)) = &known.found
            && at.elapsed() < FRESH
        {
            return Ok(endpoints.clone());
        }
        let just_failed = known.failed.as_ref().filter(|(_, at)| at.elapsed() < PAUSE);
        let failure = match just_failed {
            Some((failure, _)) => failure.clone(),
            None => match self.discover(outbound).await {
                Ok(endpoints) => {
                    let endpoints = Arc::new(endpoints);
                    *known = Known { found: Some((endpoints.clone(), Instant::now())), failed: None };
                    return Ok(endpoints);
                }
                Err(failure) => {
                    tracing::warn!(issuer = self.issuer, %failure, "provider discovery failed");
                    known.failed = Some((failure.clone(), Instant::now()));
                    failure
                }
            },
        };
        match &known.found {
            Some((endpoints, at)) if at.elapsed() < USABLE => Ok(endpoints.clone()),
            _ => Err(failure),
        }
    }

    async fn discover(&self, outbound: &Outbound) -> Result<Endpoints, LoginFailure> {
        let url = format!("{}/.well-known/openid-configuration", self.issuer.trim_end_matches('/'));
        // The issuer is compared as it is written; the URL may be another form of it, as for a host that is not ASCII.
        let url = Url::parse(&url).expect("the setting was checked to be a URL");
        let request = Request::get(url.as_str())
            .header(header::ACCEPT, "application/json")
            .body(Vec::new())
            .expect("a URL is an address");
        let response = self::request(outbound, request).await?;
        if response.status() != StatusCode::OK {
            return Err(LoginFailure::Provider(format!("discovery was answered with {}", response.status())));
        }
        read_document(&self.issuer, response.body())
    }
}

fn read_document(issuer: &str, body: &[u8]) -> Result<Endpoints, LoginFailure> {
    let bad = |what: &str| LoginFailure::Provider(format!("the discovery document {what}"));
    let document: Document = object(body).ok_or_else(|| bad("lacks required endpoints"))?;
    // Otherwise a provider could assert accounts of another one.
    if document.issuer != issuer {
        return Err(bad("names another issuer than OIDC_ISSUER"));
    }
    // As for the setting, and https never leads back to http.
    let must_be_https = issuer.starts_with("https://");
    let allowed = |url: String| match protected_url(&url) {
        Ok(parsed) if parsed.scheme() == "https" || !must_be_https => Ok(String::from(parsed)),
        _ => Err(bad("names an endpoint without https")),
    };
    let supported = document.token_endpoint_auth_methods_supported;
    let can = |method: &str| supported.iter().flatten().any(|supported| supported == method);
    let endpoint = |_| bad("names an endpoint that is not a URL");
    Ok(Endpoints {
        authorize: AuthUrl::new(allowed(document.authorization_endpoint)?).map_err(endpoint)?,
        token: TokenUrl::new(allowed(document.token_endpoint)?).map_err(endpoint)?,
        profile: allowed(document.userinfo_endpoint)?,
        // Basic is the default of the standard.
        auth: if can("client_secret_post") && !can("client_secret_basic") {
            AuthType::RequestBody
        } else {
            AuthType::BasicAuth
        },
        names_itself: document.authorization_response_iss_parameter_supported == Some(true),
    })
}

#[derive(Deserialize)]
pub(super) struct UserInfo {
    #[serde(deserialize_with = "jose::subject")]
    pub(super) sub: String,
    #[serde(flatten)]
    person: Person,
}

pub(super) fn user_info(answer: &[u8]) -> Result<UserInfo, LoginFailure> {
    object(answer).ok_or(LoginFailure::BadProfile("not a JSON object with a sub"))
}

/// Names come from user info, else from the id token, where AD FS has them.
pub(super) fn profile(issuer: &str, info: &UserInfo, id_claims: &Person) -> Result<Profile, LoginFailure> {
    let name = info.person.name().or(id_claims.name());
    let picture = info.person.picture.as_deref().or(id_claims.picture.as_deref());
    Profile::new(issuer, &info.sub, name, picture).ok_or(LoginFailure::BadProfile("sub is invalid"))
}

#[derive(Deserialize)]
struct IdClaims {
    iss: String,
    #[serde(deserialize_with = "jose::subject")]
    sub: String,
    aud: Audiences,
    #[serde(default)]
    azp: Option<String>,
    exp: NumericDate,
    #[serde(default)]
    nonce: Option<String>,
    #[serde(flatten)]
    person: Person,
}

/// Checks that the id token is for us and for this attempt, and returns its names. The signature is not checked, because the token
/// came from the token endpoint over TLS (`OpenID` Connect Core 3.1.3.7, 6).
pub(super) fn check_id_token(
    id_token: &str,
    issuer: &str,
    client_id: &str,
    nonce: &str,
    subject: &str,
) -> Result<Person, LoginFailure> {
    let bad = |what: &str| LoginFailure::Provider(format!("the id token {what}"));
    let claims = Unverified::read(id_token).and_then(|token| token.claims::<IdClaims>());
    let claims = claims.ok_or_else(|| bad("is malformed"))?;
    let audiences = claims.aud.as_slice();
    let ours = audiences.iter().any(|one| one == client_id) && (audiences.len() == 1 || claims.azp.is_some());
    if claims.iss != issuer {
        Err(bad("names another issuer"))
    } else if !ours || claims.azp.is_some_and(|azp| azp != client_id) {
        Err(bad("is for another client"))
    } else if claims.exp.second() <= Utc::now().timestamp() - LEEWAY {
        Err(bad("has expired"))
    } else if claims.nonce.as_deref() != Some(nonce) {
        Err(bad("is of another attempt"))
    } else if claims.sub != subject {
        Err(bad("is about another subject"))
    } else {
        Ok(claims.person)
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
    use serde_json::{Value, json};
    use service_kit::outbound::OutboundLimits;

    use super::*;

    const ISSUER: &str = "https://id.example/realm";

    fn document(change: Value) -> Result<Endpoints, LoginFailure> {
        let mut document = json!({
            "issuer": ISSUER,
            "authorization_endpoint": "https://id.example/auth",
            "token_endpoint": "https://id.example/token",
            "userinfo_endpoint": "https://api.example/me",
        });
        document.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        read_document(ISSUER, &serde_json::to_vec(&document).unwrap())
    }

    #[test]
    fn discovery_of_another_issuer_or_unsafe_endpoints_is_rejected() {
        assert!(document(json!({})).is_ok());
        for change in [
            json!({ "issuer": "https://id.example" }),
            json!({ "issuer": "https://id.example/realm/" }),
            json!({ "token_endpoint": "http://id.example/token" }),
            json!({ "userinfo_endpoint": "http://127.0.0.1/me" }),
            json!({ "authorization_endpoint": "javascript:alert(1)" }),
            json!({ "userinfo_endpoint": null }),
        ] {
            assert!(matches!(document(change.clone()), Err(LoginFailure::Provider(_))), "{change}");
        }
        assert!(read_document(ISSUER, b"<html>").is_err());
    }

    #[tokio::test]
    async fn known_endpoints_are_used_while_discovery_fails() {
        // No host has this address, so the port is never open.
        let outbound = Outbound::new(OutboundLimits::external(Duration::from_millis(50))).unwrap();
        let known_for = |age: Duration| {
            let discovery = Discovery::new("http://127.255.255.255:1".into());
            let at = Instant::now().checked_sub(age).expect("the clock counts from long ago");
            let endpoints = Arc::new(document(json!({})).unwrap());
            *discovery.known.try_lock().unwrap() = Known { found: Some((endpoints, at)), failed: None };
            discovery
        };
        let has_failed = |discovery: &Discovery| discovery.known.try_lock().unwrap().failed.is_some();

        let fresh = known_for(FRESH.checked_sub(Duration::from_mins(1)).unwrap());
        assert!(fresh.endpoints(&outbound).await.is_ok() && !has_failed(&fresh));
        let stale = known_for(FRESH);
        assert!(stale.endpoints(&outbound).await.is_ok() && has_failed(&stale));
        let too_old = known_for(USABLE);
        assert!(matches!(too_old.endpoints(&outbound).await, Err(LoginFailure::Unavailable(_))));
    }

    #[test]
    fn the_client_authenticates_as_the_provider_supports() {
        let auth =
            |methods| document(json!({ "token_endpoint_auth_methods_supported": methods })).unwrap().auth;
        assert!(matches!(auth(json!(null)), AuthType::BasicAuth));
        assert!(matches!(auth(json!(["client_secret_post", "client_secret_basic"])), AuthType::BasicAuth));
        assert!(matches!(auth(json!(["private_key_jwt", "client_secret_post"])), AuthType::RequestBody));
    }

    #[test]
    fn first_known_name_claim_is_used() {
        let read = |info: Value, claims: Value| {
            let info = user_info(&serde_json::to_vec(&info).unwrap())?;
            profile(ISSUER, &info, &serde_json::from_value(claims).unwrap())
        };
        let name = |info: Value, claims: Value| read(info, claims).unwrap().username;
        let none = || json!({});
        assert_eq!(name(json!({ "sub": "1", "preferred_username": "jo", "name": "John" }), none()), "jo");
        assert_eq!(name(json!({ "sub": "1", "preferred_username": null, "name": "John" }), none()), "John");
        assert_eq!(name(json!({ "sub": 1, "preferred_username": " " }), none()), "user");
        let claims =
            json!({ "unique_name": "jo", "upn": "jo@corp.example", "picture": "https://a.example/1" });
        assert_eq!(name(json!({ "sub": "1" }), claims.clone()), "jo");
        assert_eq!(name(json!({ "sub": "1", "name": "John" }), claims.clone()), "John");
        let avatar = read(json!({ "sub": "1" }), claims).unwrap().avatar_url;
        assert_eq!(avatar.as_deref(), Some("https://a.example/1"));
        for odd in [json!({}), json!({ "sub": "" }), json!({ "sub": null }), json!({ "sub": -1 }), json!([])]
        {
            assert!(read(odd.clone(), none()).is_err(), "{odd}");
        }
    }

    #[test]
    fn an_id_token_must_be_for_this_client_attempt_and_subject() {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(serde_json::to_vec(value).unwrap());
        let check_with = |header: Value, change: Value| {
            let mut claims =
                json!({ "iss": ISSUER, "sub": "s1", "aud": "us", "exp": 9_999_999_999u64, "nonce": "n" });
            claims.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            check_id_token(&format!("{}.{}.x", part(&header), part(&claims)), ISSUER, "us", "n", "s1")
        };
        let check = |change| check_with(json!({ "alg": "RS256" }), change);
        for good in [
            json!({}),
            json!({ "aud": ["us"] }),
            json!({ "aud": ["us", "them"], "azp": "us" }),
            json!({ "exp": 9_999_999_999.5 }),
            json!({ "name": 5 }),
        ] {
            assert!(check(good.clone()).is_ok(), "{good}");
        }
        assert_eq!(check(json!({ "upn": "jo@corp.example" })).unwrap().name(), Some("jo@corp.example"));
        for bad in [
            json!({ "iss": "https://id.example" }),
            json!({ "aud": "them" }),
            json!({ "aud": [] }),
            json!({ "aud": ["us", "them"] }),
            json!({ "aud": ["us", "them"], "azp": "them" }),
            json!({ "azp": "them" }),
            json!({ "exp": 1 }),
            json!({ "exp": "never" }),
            json!({ "nonce": "m" }),
            json!({ "nonce": null }),
            json!({ "sub": "s2" }),
        ] {
            assert!(matches!(check(bad.clone()), Err(LoginFailure::Provider(_))), "{bad}");
        }
        assert!(check_with(json!({ "alg": "RS256", "crit": ["x"], "x": 1 }), json!({})).is_err());
        for odd in ["", "a.b.c", "..", "e30"] {
            assert!(check_id_token(odd, ISSUER, "us", "n", "s1").is_err(), "{odd}");
        }
    }
}
