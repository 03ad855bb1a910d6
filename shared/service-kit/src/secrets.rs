//! A shared secret that can be rotated: a list whose first entry is used and whose entries are all accepted. `Debug` hides it.

use std::fmt;

use thiserror::Error;

/// In characters.
const MIN_LENGTH: usize = 32;

#[derive(Debug, PartialEq, Eq, Error)]
#[error("each secret must have at least {MIN_LENGTH} characters")]
pub struct TooShort;

/// At least one secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Secrets {
    first: String,
    others: Vec<String>,
}

impl Secrets {
    /// From a comma-separated list; white space and empty entries are ignored.
    pub fn parse(list: &str) -> Result<Self, TooShort> {
        let mut secrets =
            list.split(',').map(str::trim).filter(|secret| !secret.is_empty()).map(str::to_owned);
        let secrets = Self { first: secrets.next().ok_or(TooShort)?, others: secrets.collect() };
        let long_enough = secrets.iter().all(|secret| secret.len() >= MIN_LENGTH);
        long_enough.then_some(secrets).ok_or(TooShort)
    }

    pub fn random() -> Self {
        Self { first: format!("{:032x}", rand::random::<u128>()), others: Vec::new() }
    }

    pub fn first(&self) -> &str {
        &self.first
    }

    /// All accepted secrets, the first one first.
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
        let [one, two] = ["1".repeat(MIN_LENGTH), "2".repeat(MIN_LENGTH)];
        let secrets = Secrets::parse(&format!(" {one} , {two},")).unwrap();
        assert_eq!(secrets.first(), one);
        assert_eq!(secrets.iter().collect::<Vec<_>>(), [&one, &two]);
        assert_eq!(format!("{secrets:?}"), "2 secret(s)");
    }

    #[test]
    fn a_list_with_a_short_secret_is_rejected() {
        let good = "1".repeat(MIN_LENGTH);
        for bad in ["", ",", "short", &format!("{good},short"), &format!("short,{good}")] {
            assert_eq!(Secrets::parse(bad), Err(TooShort), "{bad}");
        }
    }
}
