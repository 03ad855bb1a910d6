//! Which providers there are. One without settings does not exist; one with half of its settings is a problem.

use service_kit::config::{Problems, is_loopback};
use thiserror::Error;
use url::Url;

/// What a provider knows us by.
#[derive(Clone)]
pub struct Registration {
    pub client_id: String,
    pub client_secret: String,
}

#[derive(Clone)]
pub enum ProviderSettings {
    /// Neither URL ends with a slash.
    GitHub { url: String, api_url: String, registration: Registration },
    /// Exactly as the provider calls itself.
    Oidc { issuer: String, registration: Registration },
}

pub const GITHUB_URL: &str = "https://github.com";
pub const GITHUB_API_URL: &str = "https://api.github.com";

#[derive(Debug, Error)]
pub enum NotAProviderUrl {
    #[error("a provider's address has the form https://host/path, without a query")]
    Form,
    #[error("http:// is for loopback hosts only: what is said there is a secret")]
    Unprotected,
}

/// Something is put behind a provider's address, so it ends with its path.
fn provider_url(text: &str) -> Result<Url, NotAProviderUrl> {
    protected_url(text)
        .and_then(|url| if url.query().is_none() { Ok(url) } else { Err(NotAProviderUrl::Form) })
}

/// May codes and tokens be sent there?
pub fn protected_url(text: &str) -> Result<Url, NotAProviderUrl> {
    let url = Url::parse(text).map_err(|_| NotAProviderUrl::Form)?;
    let plain = url.fragment().is_none() && url.username().is_empty() && url.password().is_none();
    let host = url.host().filter(|_| plain).ok_or(NotAProviderUrl::Form)?;
    match url.scheme() {
        "https" => Ok(url),
        "http" if is_loopback(&host) => Ok(url),
        "http" => Err(NotAProviderUrl::Unprotected),
        _ => Err(NotAProviderUrl::Form),
    }
}

impl ProviderSettings {
    /// `None`: it does not exist, or a problem was recorded.
    pub fn github(problems: &mut Problems, url: &str, api_url: &str, id: &str, secret: &str) -> Option<Self> {
        if id.is_empty() && secret.is_empty() {
            return None;
        }
        let registration = registration(problems, ["GITHUB_CLIENT_ID", "GITHUB_CLIENT_SECRET"], [id, secret]);
        let mut base = |name, text: &str| match provider_url(text) {
            // In one form, however it was written: it is compared, and accounts are kept by it.
            Ok(url) => Some(url.as_str().trim_end_matches('/').to_owned()),
            Err(error) => {
                problems.add(format!("{name} cannot be used: {error}"));
                None
            }
        };
        let (url, api_url) = (base("GITHUB_URL", url), base("GITHUB_API_URL", api_url));
        // One of them alone would send tokens of a company's own server to github.com.
        if let (Some(url), Some(api_url)) = (&url, &api_url)
            && (url == GITHUB_URL) != (api_url == GITHUB_API_URL)
        {
            problems.add("GITHUB_URL and GITHUB_API_URL are of different servers: set both or neither");
        }
        Some(Self::GitHub { url: url?, api_url: api_url?, registration: registration? })
    }

    /// The same.
    pub fn oidc(problems: &mut Problems, issuer: &str, id: &str, secret: &str) -> Option<Self> {
        if issuer.is_empty() && id.is_empty() && secret.is_empty() {
            return None;
        }
        let registration = registration(problems, ["OIDC_CLIENT_ID", "OIDC_CLIENT_SECRET"], [id, secret]);
        let issuer = problems.require("OIDC_ISSUER", Some(issuer))?;
        if let Err(error) = provider_url(issuer) {
            problems.add(format!("OIDC_ISSUER cannot be used: {error}"));
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
    fn half_of_the_settings_is_a_problem_and_none_of_them_is_none() {
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
