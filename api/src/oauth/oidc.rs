//! Any provider that speaks `OpenID` Connect: it tells where it is asked for what, and who logged in.

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

use super::{Endpoints, Failure, ask, object, settings::protected_url};
use crate::domain::user::Profile;

/// A provider's endpoints are asked for again after this.
const FRESH: Duration = Duration::from_hours(1);
/// While they cannot be had, those that were known go on for so long.
const USABLE: Duration = Duration::from_hours(24);
/// After a failure nobody asks for so long: a provider that is down is not asked by everybody who wants to log in.
const PAUSE: Duration = Duration::from_secs(2);
/// How far the provider's clock may be off from ours.
const LEEWAY: i64 = 60;

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
        // The issuer is compared as it calls itself; its address may need writing in another way, as a host that is not ASCII.
        let url = Url::parse(&url).expect("the setting was checked to be a URL");
        let request = Request::get(url.as_str())
            .header(header::ACCEPT, "application/json")
            .body(Vec::new())
            .expect("a URL is an address");
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
        Ok(parsed) if parsed.scheme() == "https" || !must_be_https => Ok(String::from(parsed)),
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

/// Who logged in, as the provider answers to their access token.
#[derive(Deserialize)]
pub(super) struct UserInfo {
    #[serde(deserialize_with = "jose::subject")]
    pub(super) sub: String,
    #[serde(flatten)]
    person: Person,
}

pub(super) fn user_info(answer: &[u8]) -> Result<UserInfo, Failure> {
    object(answer).ok_or(Failure::BadProfile("no JSON with a sub"))
}

/// `told`: by the id token. AD FS answers with the subject alone, and has the names there.
pub(super) fn profile(issuer: &str, info: &UserInfo, told: &Person) -> Result<Profile, Failure> {
    let name = info.person.name().or(told.name());
    let picture = info.person.picture.as_deref().or(told.picture.as_deref());
    Profile::new(issuer, &info.sub, name, picture).ok_or(Failure::BadProfile("its sub cannot be kept"))
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

/// The id token says that this login was meant for us, and for this attempt; and what the person is called. It came from the
/// provider itself, over a connection that proves who answers; then its signature need not be looked at (`OpenID` Connect Core
/// 3.1.3.7, 6).
pub(super) fn check_id_token(
    id_token: &str,
    issuer: &str,
    client_id: &str,
    nonce: &str,
    subject: &str,
) -> Result<Person, Failure> {
    let bad = |what: &str| Failure::Provider(format!("its id token {what}"));
    let claims = Unverified::read(id_token).and_then(|token| token.claims::<IdClaims>());
    let claims = claims.ok_or_else(|| bad("cannot be read"))?;
    let audiences = claims.aud.as_slice();
    let ours = audiences.iter().any(|one| one == client_id) && (audiences.len() == 1 || claims.azp.is_some());
    if claims.iss != issuer {
        Err(bad("is of another issuer"))
    } else if !ours || claims.azp.is_some_and(|azp| azp != client_id) {
        Err(bad("is for another client"))
    } else if claims.exp.second() <= Utc::now().timestamp() - LEEWAY {
        Err(bad("has expired"))
    } else if claims.nonce.as_deref() != Some(nonce) {
        Err(bad("is of another attempt"))
    } else if claims.sub != subject {
        Err(bad("is about somebody else"))
    } else {
        Ok(claims.person)
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
    use serde_json::{Value, json};
    use service_kit::outbound::Limits;

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
        let outbound = Outbound::new(Limits::external(Duration::from_millis(50))).unwrap();
        let known_for = |age: Duration| {
            let discovery = Discovery::new("http://127.255.255.255:1".into());
            let at = Instant::now().checked_sub(age).expect("the clock counts from long ago");
            let endpoints = Arc::new(document(json!({})).unwrap());
            *discovery.known.try_lock().unwrap() = Known { found: Some((endpoints, at)), failed: None };
            discovery
        };
        let asked = |discovery: &Discovery| discovery.known.try_lock().unwrap().failed.is_some();

        let fresh = known_for(FRESH.checked_sub(Duration::from_mins(1)).unwrap());
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
    fn a_person_has_the_first_name_that_the_provider_tells() {
        let read = |info: Value, told: Value| {
            let info = user_info(&serde_json::to_vec(&info).unwrap())?;
            profile(ISSUER, &info, &serde_json::from_value(told).unwrap())
        };
        let name = |info: Value, told: Value| read(info, told).unwrap().username;
        let none = || json!({});
        assert_eq!(name(json!({ "sub": "1", "preferred_username": "jo", "name": "John" }), none()), "jo");
        assert_eq!(name(json!({ "sub": "1", "preferred_username": null, "name": "John" }), none()), "John");
        assert_eq!(name(json!({ "sub": 1, "preferred_username": " " }), none()), "user");
        let told = json!({ "unique_name": "jo", "upn": "jo@corp.example", "picture": "https://a.example/1" });
        assert_eq!(name(json!({ "sub": "1" }), told.clone()), "jo");
        assert_eq!(name(json!({ "sub": "1", "name": "John" }), told.clone()), "John");
        let avatar = read(json!({ "sub": "1" }), told).unwrap().avatar_url;
        assert_eq!(avatar.as_deref(), Some("https://a.example/1"));
        for odd in [json!({}), json!({ "sub": "" }), json!({ "sub": null }), json!({ "sub": -1 }), json!([])]
        {
            assert!(read(odd.clone(), none()).is_err(), "{odd}");
        }
    }

    #[test]
    fn an_id_token_is_for_us_now_and_about_the_same_person() {
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
            assert!(matches!(check(bad.clone()), Err(Failure::Provider(_))), "{bad}");
        }
        assert!(check_with(json!({ "alg": "RS256", "crit": ["x"], "x": 1 }), json!({})).is_err());
        for odd in ["", "a.b.c", "..", "e30"] {
            assert!(check_id_token(odd, ISSUER, "us", "n", "s1").is_err(), "{odd}");
        }
    }
}
