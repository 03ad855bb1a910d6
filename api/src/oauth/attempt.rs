//! The state of a login, which the browser keeps in a cookie: provider, `state`, `nonce`, PKCE verifier and expiry. Any replica can
//! finish a login, and an abandoned one costs nothing.
//!
//! The cookie is signed with a key derived from `STATE_SECRET`, which all replicas share. The first secret signs and all are accepted,
//! so that a rotation interrupts no login. It is not encrypted: reading a browser's cookies is worse than reading this one.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use service_kit::secrets::Secrets;
use sha2::Sha256;

pub const LIFETIME: Duration = Duration::from_mins(10);
const LABEL: &[u8] = b"messenger api: oauth attempt, version 1";
/// A sealed attempt has about 300 bytes; longer ones are rejected.
const MAX_LENGTH: usize = 2_048;

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

    pub fn seal(&self, attempt: &Attempt) -> String {
        let payload = serde_json::to_vec(attempt).expect("an attempt is texts and a number");
        let payload = URL_SAFE_NO_PAD.encode(payload);
        let signature = self.signs.clone().chain_update(&payload).finalize().into_bytes();
        format!("{payload}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    /// `None`: an invalid signature, or expired.
    pub fn open(&self, sealed: &str) -> Option<Attempt> {
        self.open_at(sealed, now())
    }

    fn open_at(&self, sealed: &str, now: Duration) -> Option<Attempt> {
        if sealed.len() > MAX_LENGTH {
            return None;
        }
        let (payload, signature) = sealed.split_once('.')?;
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        // Compares in constant time.
        let fits = |key: &Hmac<Sha256>| key.clone().chain_update(payload).verify_slice(&signature).is_ok();
        self.accepted.iter().any(fits).then_some(())?;
        let attempt: Attempt = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()?;
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
    fn a_forged_or_changed_attempt_is_rejected() {
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
