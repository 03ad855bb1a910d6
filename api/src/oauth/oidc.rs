//! Any provider that speaks OpenID Connect: it tells where it is asked for what, and who logged in.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{Request, StatusCode, header};
use oauth2::{AuthType, AuthUrl, TokenUrl};
use serde::Deserialize;
use serde_json::Value;
use shared::outbound::Outbound;
use tokio::sync::Mutex;

use super::{Endpoints, Failure, Subject, ask, object, settings::protected_url, text};
use crate::domain::user::Profile;

/// A provider's endpoints are asked for again after this.
const FRESH: Duration = Duration::from_secs(60 * 60);
/// While they cannot be had, those that were known go on for so long.
const USABLE: Duration = Duration::from_secs(24 * 60 * 60);
/// After a failure nobody asks for so long: a provider that is down is not asked by everybody who wants to log in.
const PAUSE: Duration = Duration::from_secs(2);
/// How far the provider's clock may be off from ours.
const LEEWAY: u64 = 60;

/// A provider's endpoints, as it tells them, asked for when first needed.
pub(super) struct Discovery {
    issuer: String,
    /// Held while asking: of many who need it at once one asks, and the others wait for what it hears.
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    found: Option<(Arc<Endpoints>, Instant)>,
    failed: Option<(Failure, Instant)>,
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

    pub(super) async fn endpoints(&self, outbound: &Outbound) -> Result<Arc<Endpoints>, Failure> {
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
                    tracing::warn!(issuer = self.issuer, %failure, "the provider does not tell its endpoints");
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

    async fn discover(&self, outbound: &Outbound) -> Result<Endpoints, Failure> {
        let url = format!("{}/.well-known/openid-configuration", self.issuer.trim_end_matches('/'));
        let request = Request::get(url)
            .header(header::ACCEPT, "application/json")
            .body(Vec::new())
            .expect("the setting was checked to be a URL");
        let response = ask(outbound, request).await?;
        if response.status() != StatusCode::OK {
            return Err(Failure::Provider(format!("its discovery is answered with {}", response.status())));
        }
        read_document(&self.issuer, response.body())
    }
}

fn read_document(issuer: &str, body: &[u8]) -> Result<Endpoints, Failure> {
    let bad = |what: &str| Failure::Provider(format!("its discovery document {what}"));
    let document: Document =
        object(body).ok_or_else(|| bad("does not name the endpoints that are needed"))?;
    // Or else one provider could speak for another one's accounts.
    if document.issuer != issuer {
        return Err(bad("is of another issuer than OIDC_ISSUER"));
    }
    // The same rule as for the setting; and from https nothing leads back to http.
    let must_be_https = issuer.starts_with("https://");
    let allowed = |url: String| match protected_url(&url) {
        Ok(parsed) if parsed.scheme() == "https" || !must_be_https => Ok(url),
        _ => Err(bad("names an endpoint that is not https")),
    };
    let supported = document.token_endpoint_auth_methods_supported;
    let can = |method: &str| supported.iter().flatten().any(|supported| supported == method);
    let endpoint = |_| bad("names an endpoint that is no URL");
    Ok(Endpoints {
        authorize: AuthUrl::new(allowed(document.authorization_endpoint)?).map_err(endpoint)?,
        token: TokenUrl::new(allowed(document.token_endpoint)?).map_err(endpoint)?,
        profile: allowed(document.userinfo_endpoint)?,
        // Basic is what a provider does that says nothing.
        auth: if can("client_secret_post") && !can("client_secret_basic") {
            AuthType::RequestBody
        } else {
            AuthType::BasicAuth
        },
        names_itself: document.authorization_response_iss_parameter_supported == Some(true),
    })
}

#[derive(Deserialize)]
struct UserInfo {
    sub: Subject,
    #[serde(default)]
    preferred_username: Value,
    #[serde(default)]
    nickname: Value,
    #[serde(default)]
    name: Value,
    #[serde(default)]
    picture: Value,
}

pub(super) fn profile(issuer: &str, answer: &[u8]) -> Result<Profile, Failure> {
    let info: UserInfo = object(answer).ok_or(Failure::BadProfile("no JSON with a sub"))?;
    // Some have no preferred name to tell, but another one.
    let name = [&info.preferred_username, &info.nickname, &info.name].into_iter().find_map(text);
    Profile::new(issuer, &info.sub.to_string(), name, text(&info.picture))
        .ok_or(Failure::BadProfile("its sub cannot be kept"))
}

#[derive(Deserialize)]
struct IdClaims {
    iss: String,
    sub: Subject,
    aud: Audiences,
    #[serde(default)]
    azp: Option<String>,
    exp: f64,
    #[serde(default)]
    nonce: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audiences {
    One(String),
    Many(Vec<String>),
}

/// The id token says that this login was meant for us, and for this attempt. It came from the provider itself, over a
/// connection that proves who answers; then its signature need not be looked at (OpenID Connect Core 3.1.3.7, 6).
pub(super) fn check_id_token(
    id_token: &str,
    issuer: &str,
    client_id: &str,
    nonce: &str,
    profile: &Profile,
) -> Result<(), Failure> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970").as_secs();
    let bad = |what: &str| Failure::Provider(format!("its id token {what}"));
    let claims = id_token.split('.').nth(1).and_then(|claims| URL_SAFE_NO_PAD.decode(claims).ok());
    let claims: IdClaims = claims.and_then(|claims| object(&claims)).ok_or_else(|| bad("cannot be read"))?;
    let ours = match &claims.aud {
        Audiences::One(one) => one == client_id,
        Audiences::Many(many) => {
            many.iter().any(|one| one == client_id) && (many.len() == 1 || claims.azp.is_some())
        }
    };
    if claims.iss != issuer {
        Err(bad("is of another issuer"))
    } else if !ours || claims.azp.is_some_and(|azp| azp != client_id) {
        Err(bad("is for another client"))
    } else if claims.exp <= now.saturating_sub(LEEWAY) as f64 {
        Err(bad("has expired"))
    } else if claims.nonce.as_deref() != Some(nonce) {
        Err(bad("is of another attempt"))
    } else if claims.sub.to_string() != profile.subject {
        Err(bad("is about somebody else"))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ISSUER: &str = "https://id.example/realm";

    fn document(change: Value) -> Result<Endpoints, Failure> {
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
    fn a_document_of_another_issuer_or_with_unsafe_endpoints_is_not_used() {
        assert!(document(json!({})).is_ok());
        for change in [
            json!({ "issuer": "https://id.example" }),
            json!({ "issuer": "https://id.example/realm/" }),
            json!({ "token_endpoint": "http://id.example/token" }),
            json!({ "userinfo_endpoint": "http://127.0.0.1/me" }),
            json!({ "authorization_endpoint": "javascript:alert(1)" }),
            json!({ "userinfo_endpoint": null }),
        ] {
            assert!(matches!(document(change.clone()), Err(Failure::Provider(_))), "{change}");
        }
        assert!(read_document(ISSUER, b"<html>").is_err());
    }

    #[tokio::test]
    async fn endpoints_that_were_known_go_on_while_they_cannot_be_had() {
        // A port that is never open: of an address that is no machine's.
        let outbound = Outbound::new(Duration::from_millis(50)).unwrap();
        let known_for = |age: Duration| {
            let discovery = Discovery::new("http://127.255.255.255:1".into());
            let at = Instant::now().checked_sub(age).expect("the clock counts from long ago");
            let endpoints = Arc::new(document(json!({})).unwrap());
            *discovery.known.try_lock().unwrap() = Known { found: Some((endpoints, at)), failed: None };
            discovery
        };
        let asked = |discovery: &Discovery| discovery.known.try_lock().unwrap().failed.is_some();

        let fresh = known_for(FRESH - Duration::from_secs(60));
        assert!(fresh.endpoints(&outbound).await.is_ok() && !asked(&fresh));
        let stale = known_for(FRESH);
        assert!(stale.endpoints(&outbound).await.is_ok() && asked(&stale));
        let too_old = known_for(USABLE);
        assert!(matches!(too_old.endpoints(&outbound).await, Err(Failure::Unavailable(_))));
    }

    #[test]
    fn the_secret_is_shown_in_the_way_that_the_provider_takes() {
        let auth =
            |methods| document(json!({ "token_endpoint_auth_methods_supported": methods })).unwrap().auth;
        assert!(matches!(auth(json!(null)), AuthType::BasicAuth));
        assert!(matches!(auth(json!(["client_secret_post", "client_secret_basic"])), AuthType::BasicAuth));
        assert!(matches!(auth(json!(["private_key_jwt", "client_secret_post"])), AuthType::RequestBody));
    }

    #[test]
    fn somebody_without_a_preferred_name_has_another_one() {
        let name = |info: Value| profile(ISSUER, &serde_json::to_vec(&info).unwrap()).unwrap().username;
        assert_eq!(name(json!({ "sub": "1", "preferred_username": "jo", "name": "John" })), "jo");
        assert_eq!(name(json!({ "sub": "1", "preferred_username": null, "name": "John" })), "John");
        assert_eq!(name(json!({ "sub": 1, "preferred_username": " " })), "user");
        for odd in [json!({}), json!({ "sub": "" }), json!({ "sub": null }), json!({ "sub": -1 }), json!([])]
        {
            assert!(profile(ISSUER, &serde_json::to_vec(&odd).unwrap()).is_err(), "{odd}");
        }
    }

    #[test]
    fn an_id_token_is_for_us_now_and_about_the_same_person() {
        let profile = profile(ISSUER, br#"{"sub":"s1"}"#).unwrap();
        let check = |change: Value| {
            let mut claims =
                json!({ "iss": ISSUER, "sub": "s1", "aud": "us", "exp": 9_999_999_999u64, "nonce": "n" });
            claims.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            let token = format!("e30.{}.x", URL_SAFE_NO_PAD.encode(serde_json::to_vec(&claims).unwrap()));
            check_id_token(&token, ISSUER, "us", "n", &profile)
        };
        for good in [json!({}), json!({ "aud": ["us"] }), json!({ "aud": ["us", "them"], "azp": "us" })] {
            assert!(check(good.clone()).is_ok(), "{good}");
        }
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
            assert!(matches!(check(bad.clone()), Err(Failure::Provider(_))), "{bad}");
        }
        for odd in ["", "a.b.c", "..", "e30"] {
            assert!(check_id_token(odd, ISSUER, "us", "n", &profile).is_err(), "{odd}");
        }
    }
}
