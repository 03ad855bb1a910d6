//! The login providers. Providers without settings are disabled; incomplete settings are a problem.

use service_kit::{
    config::is_loopback,
    settings::{Settings, text},
};
use thiserror::Error;
use url::Url;

#[derive(Clone, Default)]
pub struct ClientRegistration {
    pub client_id: String,
    pub client_secret: String,
}

#[derive(Clone)]
pub enum ProviderSettings {
    /// Neither URL ends with a slash.
    GitHub { url: String, api_url: String, registration: ClientRegistration },
    /// Exactly as the provider writes it.
    Oidc { issuer: String, registration: ClientRegistration },
}

const GITHUB_URL: &str = "https://github.com";
const GITHUB_API_URL: &str = "https://api.github.com";

#[derive(Debug, Error)]
pub enum InvalidProviderUrl {
    #[error("it must have the form https://host/path, without a query")]
    Form,
    #[error("http:// is allowed for loopback hosts only, because secrets are sent there")]
    Unprotected,
}

/// Paths are appended to it, so it must not have a query.
fn provider_url(text: &str) -> Result<Url, InvalidProviderUrl> {
    protected_url(text)
        .and_then(|url| if url.query().is_none() { Ok(url) } else { Err(InvalidProviderUrl::Form) })
}

/// Checks that codes and tokens may be sent to a URL.
pub fn protected_url(text: &str) -> Result<Url, InvalidProviderUrl> {
    let url = Url::parse(text).map_err(|_| InvalidProviderUrl::Form)?;
    let plain = url.fragment().is_none() && url.username().is_empty() && url.password().is_none();
    let host = url.host().filter(|_| plain).ok_or(InvalidProviderUrl::Form)?;
    match url.scheme() {
        "https" => Ok(url),
        "http" if is_loopback(&host) => Ok(url),
        "http" => Err(InvalidProviderUrl::Unprotected),
        _ => Err(InvalidProviderUrl::Form),
    }
}

pub(super) fn read(s: &mut Settings) -> Vec<ProviderSettings> {
    github(s).into_iter().chain(oidc(s)).collect()
}

fn github(s: &mut Settings) -> Option<ProviderSettings> {
    let registration = registration(
        s,
        ["GITHUB_CLIENT_ID", "GITHUB_CLIENT_SECRET"],
        "Client id of an OAuth app at GitHub with the callback {ORIGIN}/api/oauth/github/callback; enables login with GitHub",
    );
    // Normalised, because it is compared and is part of each account's key.
    let server = |text: &str| provider_url(text).map(|url| url.as_str().trim_end_matches('/').to_owned());
    let url = s.with("GITHUB_URL", GITHUB_URL, "GitHub Enterprise: https://host", server);
    let api_url = s.with("GITHUB_API_URL", GITHUB_API_URL, "Its API: https://host/api/v3", server);
    let registration = registration?;
    // With only one of the two, tokens of a company's own server would be sent to github.com.
    if (url == GITHUB_URL) != (api_url == GITHUB_API_URL) {
        s.problem(
            &["GITHUB_URL", "GITHUB_API_URL"],
            "GITHUB_URL and GITHUB_API_URL belong to different servers; set both or neither",
        );
    }
    Some(ProviderSettings::GitHub { url, api_url, registration })
}

fn oidc(s: &mut Settings) -> Option<ProviderSettings> {
    let registration = registration(
        s,
        ["OIDC_CLIENT_ID", "OIDC_CLIENT_SECRET"],
        "Client id at the OpenID Connect provider, registered with the callback {ORIGIN}/api/oauth/oidc/callback",
    );
    let issuer = s.with(
        "OIDC_ISSUER",
        "",
        "OpenID Connect provider, exactly as it calls itself; enables login with it",
        |issuer| {
            if issuer.is_empty() { Ok(None) } else { provider_url(issuer).map(|_| Some(issuer.to_owned())) }
        },
    );
    let Some(issuer) = issuer else {
        if registration.is_some() {
            s.require("OIDC_ISSUER", "");
        }
        return None;
    };
    let registration = registration.unwrap_or_default();
    s.require("OIDC_CLIENT_ID", &registration.client_id);
    s.require("OIDC_CLIENT_SECRET", &registration.client_secret);
    Some(ProviderSettings::Oidc { issuer, registration })
}

/// `None`: neither is given.
fn registration(s: &mut Settings, [id, secret]: [&str; 2], help: &str) -> Option<ClientRegistration> {
    let client_id = s.with(id, "", help, text);
    let client_secret = s.secret(secret, "", "Client secret", text);
    if client_id.is_empty() && client_secret.as_ref().is_some_and(String::is_empty) {
        return None;
    }
    let client_secret = client_secret.unwrap_or_default();
    s.require(id, &client_id);
    s.require(secret, &client_secret);
    Some(ClientRegistration { client_id, client_secret })
}

#[cfg(test)]
mod tests {
    use service_kit::settings::Given;

    use super::*;

    #[test]
    fn a_provider_is_reached_by_https_or_on_this_machine() {
        for good in
            ["https://id.example", "https://id.example/realms/x/", "http://localhost:3000", "http://[::1]"]
        {
            assert!(provider_url(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "id.example",
            "http://id.example",
            "http://localhost.example",
            "https://id.example?x=1",
            "https://id.example/#x",
            "https://me:secret@id.example",
            "ftp://localhost",
            "javascript:alert(1)",
        ] {
            assert!(provider_url(bad).is_err(), "{bad}");
        }
    }

    fn configured<const N: usize>(given: [(&str, &str); N]) -> Result<usize, String> {
        let given = Given::from(given);
        let mut settings = Settings::new(&given);
        let providers = read(&mut settings);
        settings.finish(|| Some(providers.len())).map_err(|problems| problems.to_string())
    }

    #[test]
    fn incomplete_provider_settings_are_a_problem() {
        let github = |url, api, id, secret| {
            let names = ["GITHUB_URL", "GITHUB_API_URL", "GITHUB_CLIENT_ID", "GITHUB_CLIENT_SECRET"];
            let [a, b, c, d] = names;
            configured([(a, url), (b, api), (c, id), (d, secret)])
        };
        assert_eq!(github("", "", "", ""), Ok(0));
        assert_eq!(github("", "", "id", "secret"), Ok(1));
        assert_eq!(github("https://git.example/", "https://git.example/api/v3", "id", "secret"), Ok(1));
        assert_eq!(github("https://GitHub.com:443/", "", "id", "secret"), Ok(1), "it is the same server");
        for (problem, found) in [
            ("GITHUB_CLIENT_SECRET is not set", github("", "", "id", "")),
            ("GITHUB_CLIENT_ID is not set", github("", "", "", "x")),
            ("both or neither", github("https://git.example", "", "id", "x")),
            ("2 problem(s)", github("http://git.example", "nowhere", "id", "x")),
        ] {
            assert!(found.as_ref().is_err_and(|problems| problems.contains(problem)), "{problem}: {found:?}");
        }

        let oidc = |issuer, id, secret| {
            configured([("OIDC_ISSUER", issuer), ("OIDC_CLIENT_ID", id), ("OIDC_CLIENT_SECRET", secret)])
        };
        assert_eq!(oidc("", "", ""), Ok(0));
        assert_eq!(oidc("https://id.example/", "id", "secret"), Ok(1));
        for (problem, found) in [
            ("2 problem(s)", oidc("https://id.example", "", "")),
            ("OIDC_ISSUER is not set", oidc("", "id", "secret")),
            ("loopback", oidc("http://id.example", "id", "secret")),
        ] {
            assert!(found.as_ref().is_err_and(|problems| problems.contains(problem)), "{problem}: {found:?}");
        }
    }
}
