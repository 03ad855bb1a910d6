//! A shared secret that can be rotated: a list, of which the first is used and all are accepted. It never shows itself.

use std::fmt;

/// In characters: guessing it is hopeless.
const SHORTEST: usize = 32;

/// At least one secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Secrets {
    first: String,
    others: Vec<String>,
}

impl Secrets {
    /// From a comma-separated list, in which white space around a secret and empty entries do not count. `None`: one of
    /// them is too short, or there is none.
    pub fn parse(list: &str) -> Option<Self> {
        let mut secrets =
            list.split(',').map(str::trim).filter(|secret| !secret.is_empty()).map(str::to_owned);
        let secrets = Self { first: secrets.next()?, others: secrets.collect() };
        let long_enough = secrets.iter().all(|secret| secret.len() >= SHORTEST);
        long_enough.then_some(secrets)
    }

    /// One that nobody else has, for what nobody else is to open.
    pub fn random() -> Self {
        Self { first: format!("{:032x}", rand::random::<u128>()), others: Vec::new() }
    }

    /// The one to use.
    pub fn first(&self) -> &str {
        &self.first
    }

    /// All that are accepted, beginning with the first.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.first).chain(&self.others).map(String::as_str)
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} secret(s)", 1 + self.others.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_a_list_is_used_and_all_are_accepted() {
        let [one, two] = ["1".repeat(SHORTEST), "2".repeat(SHORTEST)];
        let secrets = Secrets::parse(&format!(" {one} , {two},")).unwrap();
        assert_eq!(secrets.first(), one);
        assert_eq!(secrets.iter().collect::<Vec<_>>(), [&one, &two]);
        assert_eq!(format!("{secrets:?}"), "2 secret(s)");
    }

    #[test]
    fn a_short_secret_spoils_the_list() {
        let good = "1".repeat(SHORTEST);
        for bad in ["", ",", "short", &format!("{good},short"), &format!("short,{good}")] {
            assert_eq!(Secrets::parse(bad), None, "{bad}");
        }
    }
}
