//! The version of a set of public keys. Every replica of `api` sends it with each answer about heads and every few seconds over
//! Redis; a gateway that sees a newer one fetches the keys.
//!
//! During a deploy, replicas of two configurations run side by side. The one started last counts, so gateways do not alternate.

use chrono::Utc;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeysVersion {
    /// The replica's settings: our own keys, and how to check external tokens.
    pub configured: Version,
    /// The external issuer's keys, once the replica has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<Version>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Version {
    /// Equal for equal content.
    pub digest: String,
    /// The time at which the replica got it, in milliseconds since 1970 by its own clock.
    pub since: i64,
}

impl Version {
    pub fn of(content: &impl Serialize) -> Self {
        let json = serde_json::to_vec(content).expect("keys and settings are plain JSON");
        Self { digest: format!("{:.32x}", Sha256::digest(json)), since: Utc::now().timestamp_millis() }
    }

    fn replaces(&self, other: &Self) -> bool {
        self.digest != other.digest && self.since > other.since
    }
}

impl KeysVersion {
    /// Whether both versions mean the same keys, as far as the replica had them.
    pub fn agrees_with(&self, other: &Self) -> bool {
        let external = match (&self.external, &other.external) {
            (Some(a), Some(b)) => a.digest == b.digest,
            _ => true,
        };
        self.configured.digest == other.configured.digest && external
    }

    pub fn replaces(&self, other: &Self) -> bool {
        if self.configured.digest != other.configured.digest {
            return self.configured.replaces(&other.configured);
        }
        match (&self.external, &other.external) {
            (Some(a), Some(b)) => a.replaces(b),
            (Some(_), None) => true,
            (None, _) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(digest: &str, since: i64) -> Version {
        Version { digest: digest.into(), since }
    }

    fn keys(configured: Version, external: Option<Version>) -> KeysVersion {
        KeysVersion { configured, external }
    }

    #[test]
    fn last_started_configuration_counts() {
        let (old, new) = (keys(version("a", 1), None), keys(version("b", 2), None));
        assert!(new.replaces(&old) && !old.replaces(&new) && !old.agrees_with(&new));
        let restarted = keys(version("b", 9), None);
        assert!(!restarted.replaces(&new) && restarted.agrees_with(&new));
        // Fetched keys belong to a configuration.
        let old = keys(version("a", 1), Some(version("x", 9)));
        assert!(new.replaces(&old) && !old.replaces(&new));
    }

    #[test]
    fn last_fetched_keys_of_a_configuration_count() {
        let of = |started, external| keys(version("a", started), external);
        let (old, new) = (of(5, Some(version("x", 6))), of(1, Some(version("y", 7))));
        assert!(new.replaces(&old) && !old.replaces(&new) && !old.agrees_with(&new));
        let none_yet = of(9, None);
        assert!(!none_yet.replaces(&old) && none_yet.agrees_with(&old) && old.replaces(&none_yet));
    }

    #[test]
    fn equal_content_has_equal_digests() {
        assert_eq!(Version::of(&["k"]).digest, Version::of(&["k"]).digest);
        assert_ne!(Version::of(&["k"]).digest, Version::of(&["l"]).digest);
    }
}
