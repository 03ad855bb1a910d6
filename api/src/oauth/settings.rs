//! Settings of providers. Providers without settings are disabled; incomplete settings are an error.

use service_kit::config::{Problems, is_loopback};
use thiserror::Error;
use url::Url;

/// The client credentials at a provider.
#[derive(Clone)]
pub struct Registration {
    pub client_id: String,
    pub client_secret: String,
}

#[derive(Clone)]
pub enum ProviderSettings {
    /// Neither URL ends with a slash.
    GitHub { url: String, api_url: String, registration: Registration },
    /// Exactly as the provider writes it.
    Oidc { issuer: String, registration: Registration },
}

pub const GITHUB_URL: &str = "https://github.com";
pub const GITHUB_API_URL: &str = "https://api.github.com";

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

impl ProviderSettings {
    /// `None`: disabled, or a problem was recorded.
    pub fn github(problems: &mut Problems, url: &str, api_url: &str, id: &str, secret: &str) -> Option<Self> {
        if id.is_empty() && secret.is_empty() {
            return None;
        }
        let registration = registration(problems, ["GITHUB_CLIENT_ID", "GITHUB_CLIENT_SECRET"], [id, secret]);
        let mut base = |name, text: &str| match provider_url(text) {
            // Normalized, because it is compared and stored with accounts.
            Ok(url) => Some(url.as_str().trim_end_matches('/').to_owned()),
            Err(error) => {
                problems.add(format!("{name} is invalid: {error}"));
                None
            }
        };
        let (url, api_url) = (base("GITHUB_URL", url), base("GITHUB_API_URL", api_url));
        // One of them alone would send tokens of a company's server to github.com.
        if let (Some(url), Some(api_url)) = (&url, &api_url)
            && (url == GITHUB_URL) != (api_url == GITHUB_API_URL)
        {
            problems.add("GITHUB_URL and GITHUB_API_URL name different servers; set both or neither");
        }
        Some(Self::GitHub { url: url?, api_url: api_url?, registration: registration? })
    }

    pub fn oidc(problems: &mut Problems, issuer: &str, id: &str, secret: &str) -> Option<Self> {
        if issuer.is_empty() && id.is_empty() && secret.is_empty() {
            return None;
        }
        let registration = registration(problems, ["OIDC_CLIENT_ID", "OIDC_CLIENT_SECRET"], [id, secret]);
        let issuer = problems.require("OIDC_ISSUER", Some(issuer))?;
        if let Err(error) = provider_url(issuer) {
            problems.add(format!("OIDC_ISSUER is invalid: {error}"));
            return None;
        }
        Some(Self::Oidc { issuer: issuer.to_owned(), registration: registration? })
    }
}

fn registration(problems: &mut Problems, names: [&str; 2], values: [&str; 2]) -> Option<Registration> {
    let client_id = problems.require(names[0], Some(values[0])).map(str::to_owned);
    let client_secret = problems.require(names[1], Some(values[1])).map(str::to_owned);
    Some(Registration { client_id: client_id?, client_secret: client_secret? })
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn incomplete_settings_are_an_error_and_none_disable_it() {
        let said = |settings: &dyn Fn(&mut Problems) -> Option<ProviderSettings>| {
            let mut problems = Problems::default();
            let made = settings(&mut problems).is_some();
            let said = problems.finish(|| Some(())).err().map(|problems| problems.to_string());
            assert!(
                !made || said.is_none() || said.as_ref().is_some_and(|said| said.contains("both or neither"))
            );
            (made, said.unwrap_or_default())
        };
        let github = |url: &'static str, api: &'static str, id: &'static str, secret: &'static str| {
            said(&move |problems| ProviderSettings::github(problems, url, api, id, secret))
        };
        assert_eq!(github(GITHUB_URL, GITHUB_API_URL, "", ""), (false, String::new()));
        assert_eq!(github(GITHUB_URL, GITHUB_API_URL, "id", "secret"), (true, String::new()));
        let enterprise = github("https://git.example/", "https://git.example/api/v3", "id", "secret");
        assert_eq!(enterprise, (true, String::new()));
        assert_eq!(
            github("https://GitHub.com:443/", GITHUB_API_URL, "id", "secret"),
            (true, String::new()),
            "it is the same server"
        );
        assert!(github(GITHUB_URL, GITHUB_API_URL, "id", "").1.contains("GITHUB_CLIENT_SECRET is not set"));
        assert!(github(GITHUB_URL, GITHUB_API_URL, "", "x").1.contains("GITHUB_CLIENT_ID is not set"));
        assert!(github("https://git.example", GITHUB_API_URL, "id", "x").1.contains("both or neither"));
        assert!(github("http://git.example", "nowhere", "id", "x").1.contains("2 problem(s)"));

        let oidc = |issuer: &'static str, id: &'static str, secret: &'static str| {
            said(&move |problems| ProviderSettings::oidc(problems, issuer, id, secret))
        };
        assert_eq!(oidc("", "", ""), (false, String::new()));
        assert_eq!(oidc("https://id.example/", "id", "secret"), (true, String::new()));
        assert!(oidc("https://id.example", "", "").1.contains("2 problem(s)"));
        assert!(oidc("", "id", "secret").1.contains("OIDC_ISSUER is not set"));
        assert!(oidc("http://id.example", "id", "secret").1.contains("loopback"));
    }
}
