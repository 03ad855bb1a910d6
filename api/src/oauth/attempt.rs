//! What a browser carries through a login at a provider: which provider, the `state` and `nonce` that must come back, the
//! verifier that proves it was us who asked, and until when. It is kept by the browser and by nobody here, so that a login
//! may begin at one replica and end at another, and costs nothing if it never ends.
//!
//! It is signed, so that nobody can make one up. The key is derived from `STATE_SECRET`, which all replicas share, with a label of
//! its own. Of several secrets the first signs and all are accepted, so that a rotation interrupts no login.
//! It is not encrypted: whoever can read this browser's cookies needs no login of theirs.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use service_kit::secrets::Secrets;
use sha2::Sha256;

/// For a person to log in at the provider.
pub const LIFETIME: Duration = Duration::from_mins(10);
const LABEL: &[u8] = b"messenger api: oauth attempt, version 1";
/// A sealed attempt is some 300 bytes; more is not looked at.
const LONGEST: usize = 2_048;

/// One attempt of one browser to log in.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    pub provider: String,
    pub state: String,
    pub verifier: String,
    pub nonce: String,
    /// Seconds since 1970.
    expires_at: u64,
}

impl Attempt {
    /// Begins now.
    pub fn new(provider: &str, state: String, verifier: String, nonce: String) -> Self {
        let expires_at = (now() + LIFETIME).as_secs();
        Self { provider: provider.into(), state, verifier, nonce, expires_at }
    }
}

#[derive(Clone)]
pub struct Seal {
    signs: Hmac<Sha256>,
    accepted: Vec<Hmac<Sha256>>,
}

impl Seal {
    pub fn new(secrets: &Secrets) -> Self {
        let key = |secret: &str| mac(&mac(secret.as_bytes()).chain_update(LABEL).finalize().into_bytes());
        Self { signs: key(secrets.first()), accepted: secrets.iter().map(key).collect() }
    }

    /// As the value of a cookie.
    pub fn seal(&self, attempt: &Attempt) -> String {
        let said = serde_json::to_vec(attempt).expect("an attempt is texts and a number");
        let said = URL_SAFE_NO_PAD.encode(said);
        let signature = self.signs.clone().chain_update(&said).finalize().into_bytes();
        format!("{said}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    /// `None`: not sealed by us, or too long ago.
    pub fn open(&self, sealed: &str) -> Option<Attempt> {
        self.open_at(sealed, now())
    }

    fn open_at(&self, sealed: &str, now: Duration) -> Option<Attempt> {
        if sealed.len() > LONGEST {
            return None;
        }
        let (said, signature) = sealed.split_once('.')?;
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        // Compares in constant time.
        let fits = |key: &Hmac<Sha256>| key.clone().chain_update(said).verify_slice(&signature).is_ok();
        self.accepted.iter().any(fits).then_some(())?;
        let attempt: Attempt = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(said).ok()?).ok()?;
        (now.as_secs() < attempt.expires_at).then_some(attempt)
    }
}

fn mac(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes a key of any length")
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "a secret for states that is long enough";
    const NEWER: &str = "another secret that is long enough too";

    fn seal(list: &str) -> Seal {
        Seal::new(&Secrets::parse(list).unwrap())
    }

    fn attempt() -> Attempt {
        Attempt::new("github", "the state".into(), "the verifier".into(), "the nonce".into())
    }

    #[test]
    fn every_replica_opens_what_another_has_sealed() {
        let sealed = seal(SECRET).seal(&attempt());
        assert!(sealed.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)), "{sealed}");
        let opened = seal(SECRET).open(&sealed).expect("it is ours");
        assert!(opened == attempt() || opened.expires_at + 1 == attempt().expires_at);
    }

    #[test]
    fn what_others_made_or_changed_is_not_opened() {
        let seal = seal(SECRET);
        let sealed = seal.seal(&attempt());
        for index in 0..sealed.len() {
            let mut bytes = sealed.clone().into_bytes();
            bytes[index] = if bytes[index] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert!(seal.open(&changed).is_none(), "{changed}");
        }
        assert!(self::seal(NEWER).open(&sealed).is_none());
        let (said, _) = sealed.split_once('.').unwrap();
        for odd in ["", ".", said, &format!("{said}."), &format!("{sealed}x"), &"a.".repeat(2_000)] {
            assert!(seal.open(odd).is_none(), "{odd}");
        }
        // The secret itself, without the label, is another key.
        let signature = mac(SECRET.as_bytes()).chain_update(said).finalize().into_bytes();
        assert!(seal.open(&format!("{said}.{}", URL_SAFE_NO_PAD.encode(signature))).is_none());
    }

    /// Replicas are one step apart at most, and a login may be under way at each step.
    #[test]
    fn a_login_survives_a_rotation_of_the_state_secret() {
        let steps = [SECRET, &format!("{SECRET},{NEWER}"), &format!("{NEWER},{SECRET}"), NEWER].map(seal);
        for pair in steps.windows(2) {
            assert!(pair[0].open(&pair[1].seal(&attempt())).is_some());
            assert!(pair[1].open(&pair[0].seal(&attempt())).is_some());
        }
        assert!(steps[3].open(&steps[0].seal(&attempt())).is_none(), "the old one is accepted no more");
    }

    #[test]
    fn an_attempt_ends_after_ten_minutes() {
        let seal = seal(SECRET);
        let attempt = attempt();
        let sealed = seal.seal(&attempt);
        let end = Duration::from_secs(attempt.expires_at);
        assert!(seal.open_at(&sealed, end.checked_sub(Duration::from_secs(1)).unwrap()).is_some());
        assert!(seal.open_at(&sealed, end).is_none());
    }
}
