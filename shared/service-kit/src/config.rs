//! Reading settings: every value is parsed and checked, and all problems are reported together, so that an operator mends
//! a deployment once and not once per mistake.

use std::{
    collections::BTreeSet,
    fmt,
    fs::File,
    io::{self, Read},
    str::FromStr,
    time::Duration,
};

use thiserror::Error;
use url::{Host, Url};

use crate::secrets::Secrets;

/// The largest secret that is read from a file.
const LARGEST_SECRET_BYTES: u64 = 64 * 1024;

/// What is wrong with the settings, one sentence each.
#[derive(Debug, Default, Error)]
pub struct Problems {
    sentences: Vec<String>,
    /// Settings whose file was a problem: nobody has to read in addition that they are not set.
    unreadable: BTreeSet<String>,
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} problem(s) with the settings", self.sentences.len())?;
        self.sentences.iter().try_for_each(|problem| write!(f, "\n  - {problem}"))
    }
}

impl Problems {
    pub fn add(&mut self, problem: impl Into<String>) {
        self.sentences.push(problem.into());
    }

    /// The value of a setting that must be given.
    pub fn require<'a>(&mut self, name: &str, value: Option<&'a str>) -> Option<&'a str> {
        let value = value.filter(|value| !value.is_empty());
        if value.is_none() && !self.unreadable.contains(name) {
            self.add(format!("{name} is not set"));
        }
        value
    }

    /// A secret setting: its value, or the content of the file that `<name>_FILE` names. The line break at the end of the file,
    /// which editors and `echo` leave there, does not belong to the secret. Both given, or a file without a secret: a problem.
    pub fn value_or_file(&mut self, name: &str, value: Option<&str>, file: &str) -> Option<String> {
        let value = value.filter(|value| !value.is_empty());
        if file.is_empty() {
            return value.map(str::to_owned);
        }
        let secret = match value {
            Some(_) => Err(format!("{name} and {name}_FILE are both set: set one of them")),
            None => read_secret(file).map_err(|error| format!("{name}_FILE: {file}: {error}")),
        };
        secret
            .map_err(|problem| {
                self.unreadable.insert(name.to_owned());
                self.add(problem);
            })
            .ok()
    }

    /// The value itself stays out of the message: it may be a secret in the wrong place.
    pub fn parse<T: FromStr>(&mut self, name: &str, value: &str) -> Option<T>
    where
        T::Err: fmt::Display,
    {
        value.parse().map_err(|error| self.add(format!("{name} cannot be read: {error}"))).ok()
    }

    pub fn number(&mut self, name: &str, value: &str, min: u64, max: u64) -> Option<u64> {
        let number = self.parse::<u64>(name, value)?;
        if (min..=max).contains(&number) {
            return Some(number);
        }
        self.add(format!("{name} is {number}, and must be from {min} to {max}"));
        None
    }

    pub fn seconds(&mut self, name: &str, value: &str, min: u64, max: u64) -> Option<Duration> {
        self.number(name, value, min, max).map(Duration::from_secs)
    }

    pub fn millis(&mut self, name: &str, value: &str, min: u64, max: u64) -> Option<Duration> {
        self.number(name, value, min, max).map(Duration::from_millis)
    }

    /// A secret, or several, comma-separated: the first is used, all are accepted.
    pub fn secrets(&mut self, name: &str, value: Option<&str>) -> Option<Secrets> {
        let secrets = Secrets::parse(self.require(name, value)?);
        if secrets.is_none() {
            self.add(format!("{name} is, or has in its list, a secret shorter than 32 characters"));
        }
        secrets
    }

    /// An orderly end must fit into the time before the platform kills the process. `grace` of zero: not known.
    pub fn ends_in_time(
        &mut self,
        grace: Option<Duration>,
        parts: &[(&str, Option<Duration>)],
        rest: Duration,
    ) {
        let Some(needed) = parts.iter().try_fold(rest, |sum, (_, part)| Some(sum + (*part)?)) else { return };
        let names: Vec<_> = parts.iter().map(|(name, _)| *name).collect();
        if let Some(grace) = grace.filter(|grace| !grace.is_zero() && *grace < needed) {
            self.add(format!(
                "TERMINATION_GRACE_SECONDS is {}, and an orderly end takes up to {}: {} and {} for the rest",
                grace.as_secs(),
                needed.as_secs(),
                names.join(", "),
                rest.as_secs(),
            ));
        }
    }

    /// `scheme://host[:port]`.
    pub fn origin(&mut self, name: &str, value: &str) -> Option<Origin> {
        self.parse(name, value)
    }

    /// Several of them, comma-separated; none is allowed.
    pub fn origins(&mut self, name: &str, value: &str) -> Vec<Origin> {
        let texts = value.split(',').map(str::trim).filter(|text| !text.is_empty());
        texts.filter_map(|text| self.origin(name, text)).collect()
    }

    /// The settings, if nothing was wrong; `build` gets each value by `?`.
    pub fn finish<T>(self, build: impl FnOnce() -> Option<T>) -> Result<T, Self> {
        if !self.sentences.is_empty() {
            return Err(self);
        }
        Ok(build().expect("a value is missing only after a problem was recorded"))
    }
}

fn read_secret(file: &str) -> io::Result<String> {
    let mut secret = String::new();
    let read = File::open(file)?.take(LARGEST_SECRET_BYTES + 1).read_to_string(&mut secret)?;
    if u64::try_from(read).is_ok_and(|read| read > LARGEST_SECRET_BYTES) {
        return Err(io::Error::other(format!("the file is larger than {LARGEST_SECRET_BYTES} bytes")));
    }
    secret.truncate(secret.trim_end_matches(['\r', '\n']).len());
    if secret.is_empty() {
        return Err(io::Error::other("the file is empty"));
    }
    Ok(secret)
}

/// An origin in the one form in which browsers send it (RFC 6454, 6.2): `scheme://host[:port]`, the host in lower case and in
/// ASCII, without a default port. Settings may write it in another way; it is compared byte by byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(String);

#[derive(Debug, PartialEq, Eq, Error)]
pub enum NotAnOrigin {
    #[error("an origin has the form https://host or http://host:port, without a user, a path or a query")]
    Form,
    #[error("an origin names one host; `*` stands for none, list each origin")]
    Wildcard,
}

impl Origin {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn is_https(&self) -> bool {
        self.0.starts_with("https://")
    }

    /// Development conveniences are allowed on loopback only.
    pub fn is_loopback(&self) -> bool {
        let url = Url::parse(&self.0).expect("an origin is a URL");
        url.host().is_some_and(|host| is_loopback(&host))
    }
}

/// Does the host name this machine, whatever DNS says?
pub fn is_loopback(host: &Host<&str>) -> bool {
    match host {
        Host::Domain(name) => *name == "localhost" || name.ends_with(".localhost"),
        Host::Ipv4(address) => address.is_loopback(),
        Host::Ipv6(address) => address.is_loopback(),
    }
}

impl FromStr for Origin {
    type Err = NotAnOrigin;

    fn from_str(text: &str) -> Result<Self, NotAnOrigin> {
        if text.contains('*') {
            return Err(NotAnOrigin::Wildcard);
        }
        // The parser, as browsers' address bars, repairs much that would be a mistake in a setting.
        let repaired = |c: char| c.is_whitespace() || c.is_control() || c == '\\';
        let (_, behind) = text.split_once("://").ok_or(NotAnOrigin::Form)?;
        if text.contains(repaired) || behind.starts_with('/') {
            return Err(NotAnOrigin::Form);
        }
        let url = Url::parse(text).map_err(|_| NotAnOrigin::Form)?;
        // A lone slash is all the path that an origin can be written with.
        let bare = url.path() == "/" && !behind.contains(['@', '?', '#']);
        if !bare || !matches!(url.scheme(), "http" | "https") {
            return Err(NotAnOrigin::Form);
        }
        Ok(Self(url.origin().ascii_serialization()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_problems_are_told_at_once_and_no_value_is_repeated() {
        let mut problems = Problems::default();
        let port = problems.parse::<u16>("PORT", "hunter2");
        let secret = problems.secrets("SECRET", Some("hunter2"));
        let url = problems.require("URL", None).map(str::to_owned);
        let error = problems.finish(|| Some((port?, secret?, url?))).unwrap_err().to_string();
        for name in ["PORT", "SECRET", "URL"] {
            assert!(error.contains(name), "{error}");
        }
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn secret_is_given_by_value_or_by_file_and_not_by_both() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            path.display().to_string()
        };
        let read = |value: Option<&str>, file: &str| {
            let mut problems = Problems::default();
            let secret = problems.value_or_file("SECRET", value, file);
            let secret = problems.require("SECRET", secret.as_deref()).map(str::to_owned);
            problems.finish(|| secret).map_err(|problems| problems.to_string())
        };
        let (kept, empty) = (file("kept", "hunter2 \r\n"), file("empty", "\n"));
        let large = file("large", &"x".repeat(70_000));
        let missing = folder.path().join("missing").display().to_string();
        assert_eq!(read(Some("hunter2"), "").unwrap(), "hunter2");
        assert_eq!(read(Some(""), &kept).unwrap(), "hunter2 ", "the line break alone is left out");
        for (value, file, problem) in [
            (None, "", "SECRET is not set"),
            (Some("hunter2"), &*kept, "SECRET and SECRET_FILE are both set"),
            (None, &empty, "SECRET_FILE: /"),
            (None, &large, "SECRET_FILE: /"),
            (None, &missing, "SECRET_FILE: /"),
        ] {
            let problems = read(value, file).unwrap_err();
            assert!(problems.contains(problem), "{problems}");
            assert!(problems.starts_with("1 problem(s)") && !problems.contains("hunter2"), "{problems}");
        }
    }

    #[test]
    fn an_end_that_would_be_cut_short_is_a_problem() {
        let told = |grace, wait: Option<u64>| {
            let mut problems = Problems::default();
            let parts = [("WAIT", wait.map(Duration::from_secs)), ("WINDOW", Some(Duration::from_secs(20)))];
            problems.ends_in_time(Some(Duration::from_secs(grace)), &parts, Duration::from_secs(15));
            problems.finish(|| Some(())).err().map(|problems| problems.to_string())
        };
        assert_eq!(told(40, Some(5)), None);
        assert_eq!(told(0, Some(5)), None, "not known");
        assert_eq!(told(1, None), None, "told elsewhere");
        let problem = told(39, Some(5)).unwrap();
        assert!(
            problem.contains("39") && problem.contains("40") && problem.contains("WAIT, WINDOW"),
            "{problem}"
        );
    }

    #[test]
    fn an_origin_is_written_as_browsers_send_it() {
        for (given, sent) in [
            ("https://chat.example", "https://chat.example"),
            ("https://chat.example:443", "https://chat.example"),
            ("http://chat.example:80/", "http://chat.example"),
            ("http://chat.example:443", "http://chat.example:443"),
            ("HTTPS://Chat.Example:8443", "https://chat.example:8443"),
            ("https://chat.example:", "https://chat.example"),
            ("https://chat.example:08443", "https://chat.example:8443"),
            ("https://bücher.example", "https://xn--bcher-kva.example"),
            ("https://XN--BCHER-KVA.example", "https://xn--bcher-kva.example"),
            ("http://localhost:3000", "http://localhost:3000"),
            ("http://127.0.0.1:1", "http://127.0.0.1:1"),
            ("http://[0:0:0:0:0:0:0:1]:8080", "http://[::1]:8080"),
        ] {
            assert_eq!(given.parse::<Origin>().map(|origin| origin.0), Ok(sent.to_owned()), "{given}");
        }
    }

    #[test]
    fn a_setting_that_can_match_no_origin_is_refused() {
        for bad in [
            "",
            "null",
            "chat.example",
            "chat.example:443",
            "https:chat.example",
            "https:///chat.example",
            "https:\\\\chat.example",
            " https://chat.example",
            "https://chat.exa\nmple",
            "https://",
            "https://chat.example:99999",
            "https://chat.example//",
            "https://chat.example/path",
            "https://chat.example?",
            "https://chat.example#",
            "https://@chat.example",
            "https://me:secret@chat.example",
            "https://chat.example,https://shop.example",
            "https://a b.example",
            "ftp://chat.example",
            "file:///etc",
        ] {
            assert_eq!(bad.parse::<Origin>(), Err(NotAnOrigin::Form), "{bad}");
        }
        for wildcard in ["*", "https://*", "https://*.chat.example", "http://localhost:*"] {
            assert_eq!(wildcard.parse::<Origin>(), Err(NotAnOrigin::Wildcard), "{wildcard}");
        }
    }

    #[test]
    fn a_loopback_origin_is_this_machine_by_any_name() {
        let loopback = |text: &str| text.parse::<Origin>().unwrap().is_loopback();
        assert!(
            ["http://localhost:3000", "http://127.0.0.1", "http://[::1]:8080", "http://a.localhost"]
                .into_iter()
                .all(loopback)
        );
        assert!(
            !["https://chat.example", "http://localhost.example", "http://127.0.0.1.example"]
                .into_iter()
                .any(loopback)
        );
    }
}
