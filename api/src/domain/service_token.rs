//! Service tokens: what other back ends of the product authenticate with.

use std::str::FromStr;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};
use thiserror::Error;

/// What the bearer may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Publish events to any user.
    Publish,
    /// Create and change users of the external issuer, and open their streams.
    Users,
    /// Erase and export users.
    Admin,
}

impl Scope {
    const ALL: [Self; 3] = [Self::Publish, Self::Users, Self::Admin];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Publish => "publish",
            Self::Users => "users",
            Self::Admin => "admin",
        }
    }

    pub fn stored(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.as_str() == name)
    }
}

/// What operators call a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceName(String);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a name is 1 to 64 letters, digits, dots, dashes and underscores")]
pub struct BadServiceName;

impl FromStr for ServiceName {
    type Err = BadServiceName;

    fn from_str(name: &str) -> Result<Self, BadServiceName> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        if (1..=64).contains(&name.len()) && name.bytes().all(is_plain) {
            Ok(Self(name.to_owned()))
        } else {
            Err(BadServiceName)
        }
    }
}

impl ServiceName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Tells service tokens from those of users, and lets scanners for leaked secrets find them.
const PREFIX: &str = "msk_";

/// A token as it is presented. Not `Debug`: it is a secret.
pub struct ServiceToken(String);

impl ServiceToken {
    pub fn random() -> Self {
        Self(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>())))
    }

    /// `None`: it is meant to be another kind of token.
    pub fn presented(token: &str) -> Option<Self> {
        token.starts_with(PREFIX).then(|| Self(token.to_owned()))
    }

    pub fn secret(&self) -> &str {
        &self.0
    }

    /// All that is stored.
    pub fn hash(&self) -> [u8; 32] {
        Sha256::digest(&self.0).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_token_is_msk_and_32_random_bytes() {
        let (one, other) = (ServiceToken::random(), ServiceToken::random());
        let bytes = URL_SAFE_NO_PAD.decode(one.secret().strip_prefix("msk_").unwrap()).unwrap();
        assert_eq!(bytes.len(), 32);
        assert_ne!(one.secret(), other.secret());
        let again = ServiceToken::presented(one.secret()).unwrap();
        assert_eq!(again.hash(), one.hash());
        assert_ne!(again.hash(), other.hash());
        assert!(ServiceToken::presented("eyJhbGciOiJFZERTQSJ9.e30.x").is_none());
    }

    #[test]
    fn service_name_is_plain() {
        for good in ["a", "shop-1.eu_west", &"n".repeat(64)] {
            assert_eq!(good.parse::<ServiceName>().unwrap().as_str(), good);
        }
        for bad in ["", "a b", "é", "a\n", &"n".repeat(65)] {
            assert!(bad.parse::<ServiceName>().is_err(), "{bad:?}");
        }
    }
}
