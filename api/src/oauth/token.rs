//! Exchanges the authorization code for an access token.

use http::{HeaderValue, StatusCode, header};
use oauth2::{
    AccessToken, AuthorizationCode, EndpointNotSet, EndpointSet, ExtraTokenFields, HttpResponse,
    PkceCodeVerifier, RequestTokenError, StandardRevocableToken, StandardTokenResponse, TokenResponse as _,
    basic::{
        BasicErrorResponse, BasicErrorResponseType, BasicRevocationErrorResponse,
        BasicTokenIntrospectionResponse, BasicTokenType,
    },
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use service_kit::{outbound::Outbound, quality_values::essence};

use super::{LoginFailure, error_code, request};

type TokenAnswer = StandardTokenResponse<IdToken, BasicTokenType>;

pub(super) type OAuthClient = oauth2::Client<
    BasicErrorResponse,
    TokenAnswer,
    BasicTokenIntrospectionResponse,
    StandardRevocableToken,
    BasicRevocationErrorResponse,
    EndpointSet,
    EndpointNotSet,
    EndpointNotSet,
    EndpointNotSet,
    EndpointSet,
>;

#[derive(Clone, Serialize, Deserialize)]
pub(super) struct IdToken {
    #[serde(default)]
    id_token: Option<String>,
}

impl ExtraTokenFields for IdToken {}

/// Required, and must not show the token.
impl std::fmt::Debug for IdToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IdToken")
    }
}

pub(super) struct ProviderTokens(TokenAnswer);

impl ProviderTokens {
    pub(super) fn access(&self) -> &str {
        AccessToken::secret(self.0.access_token())
    }

    pub(super) fn id_token(&self) -> Option<&str> {
        self.0.extra_fields().id_token.as_deref()
    }
}

pub(super) async fn exchange(
    client: &OAuthClient,
    outbound: &Outbound,
    code: String,
    verifier: String,
) -> Result<ProviderTokens, LoginFailure> {
    let http = |request| {
        let outbound = outbound.clone();
        async move { self::request(&outbound, request).await.map(normalized) }
    };
    let response = client
        .exchange_code(AuthorizationCode::new(code))
        .set_pkce_verifier(PkceCodeVerifier::new(verifier))
        .request_async(&http)
        .await;
    response.map(ProviderTokens).map_err(|error| match error {
        RequestTokenError::Request(error) => error.into(),
        RequestTokenError::ServerResponse(error) => match error.error() {
            BasicErrorResponseType::Extension(code)
                if matches!(code.as_str(), "temporarily_unavailable" | "server_error") =>
            {
                LoginFailure::Unavailable(error_code(code))
            }
            code => LoginFailure::Provider(error_code(code.as_ref())),
        },
        // The errors may repeat the answer, and so a token.
        RequestTokenError::Parse(..) | RequestTokenError::Other(_) => {
            LoginFailure::Provider("its token response is malformed".into())
        }
    })
}

/// The token response in the standard form: GitHub answers 200 to an invalid code and may answer form-encoded, and some providers
/// write numbers as strings in members that are not used here.
fn normalized(response: HttpResponse) -> HttpResponse {
    let (mut head, body) = response.into_parts();
    let form = head.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let is_form =
        form.is_some_and(|form| essence(form).eq_ignore_ascii_case("application/x-www-form-urlencoded"));
    let members: Map<String, Value> = if is_form {
        form_urlencoded::parse(&body).map(|(name, value)| (name.into(), value.into())).collect()
    } else {
        match serde_json::from_slice(&body) {
            Ok(members) => members,
            Err(_) => return HttpResponse::from_parts(head, body),
        }
    };
    let keep = |names: &[&str]| -> Vec<u8> {
        let kept = members.iter().filter(|(name, value)| names.contains(&name.as_str()) && !value.is_null());
        let kept: Map<_, _> = kept.map(|(name, value)| (name.clone(), value.clone())).collect();
        serde_json::to_vec(&kept).expect("it was JSON")
    };
    let body = if members.get("error").is_some_and(|error| !error.is_null()) {
        head.status = StatusCode::BAD_REQUEST;
        keep(&["error"])
    } else {
        keep(&["access_token", "token_type", "id_token"])
    };
    head.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    HttpResponse::from_parts(head, body)
}

#[cfg(test)]
mod tests {
    use http::Response;

    use super::*;

    fn normalize(status: u16, form: &str, body: &str) -> (u16, String) {
        let response = Response::builder().status(status).header("content-type", form);
        let response = normalized(response.body(body.as_bytes().to_vec()).unwrap());
        (response.status().as_u16(), String::from_utf8(response.into_body()).unwrap())
    }

    #[test]
    fn error_is_recognised_with_any_status() {
        let refused = (400, r#"{"error":"bad_verification_code"}"#.to_owned());
        let json = r#"{"error":"bad_verification_code","error_description":"The code is …"}"#;
        assert_eq!(normalize(200, "application/json; charset=utf-8", json), refused);
        let form = "error=bad_verification_code&error_description=The+code+is";
        assert_eq!(normalize(200, "application/x-www-form-urlencoded; charset=utf-8", form), refused);
    }

    #[test]
    fn unused_members_are_ignored() {
        let plain = (200, r#"{"access_token":"a","token_type":"bearer"}"#.to_owned());
        let json = r#"{"access_token":"a","token_type":"bearer","expires_in":"28800","scope":["x"],"id_token":null}"#;
        assert_eq!(normalize(200, "application/json", json), plain);
        let form = "access_token=a&scope=read%3Auser&token_type=bearer";
        assert_eq!(normalize(200, "application/x-www-form-urlencoded", form), plain);
        for odd in ["", "<html>", "[]", "7"] {
            assert_eq!(normalize(200, "text/html", odd), (200, odd.to_owned()));
        }
    }
}
