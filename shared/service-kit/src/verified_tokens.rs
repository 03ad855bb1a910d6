//! Remembers which tokens were verified, because a client sends the same one with every request, and the signature is half of what
//! a small request costs.

use std::sync::Arc;

use moka::{policy::EvictionPolicy, sync::Cache};
use protocol::claims::{Audience, Claims, KeySet, TokenError};
use sha2::{Digest, Sha256};

/// The clients of a replica that send requests at about the same time; some 350 bytes each. A token that was evicted costs its
/// signature again.
const CAPACITY: u64 = 10_000;

/// Verifies tokens by one set of keys. Other keys need a new verifier, which remembers nothing.
pub struct TokenVerifier {
    keys: KeySet,
    /// Signed by one of the keys, and good for some audience when they came. By the hash of the whole token, so that no token stays
    /// in memory.
    verified: Cache<[u8; 32], Arc<Claims>>,
}

impl TokenVerifier {
    pub fn new(keys: KeySet) -> Self {
        let verified = Cache::builder().max_capacity(CAPACITY).eviction_policy(EvictionPolicy::lru());
        Self { keys, verified: verified.build() }
    }

    /// As [`KeySet::verify`]: times and audience are judged at each call.
    pub fn verify(&self, token: &str, accepted: &[Audience]) -> Result<Arc<Claims>, TokenError> {
        let hash = Sha256::digest(token).into();
        if let Some(claims) = self.verified.get(&hash) {
            claims.judge(accepted)?;
            return Ok(claims);
        }
        let claims = Arc::new(self.keys.verify(token, accepted)?);
        self.verified.insert(hash, claims.clone());
        Ok(claims)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use protocol::{
        claims::SigningKeys,
        ids::{SessionId, UserId},
    };

    use super::*;

    const ISSUER: &str = "http://localhost";
    // Made for these tests only.
    const PEM: &[u8] = b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f\n-----END PRIVATE KEY-----\n";
    const API: &[Audience] = &[Audience::Api];

    fn claims(user: i64, exp: i64) -> Claims {
        let sid = Some(SessionId(2));
        Claims {
            sub: UserId(user),
            sid,
            iat: 0,
            exp,
            aud: Audience::Api,
            iss: ISSUER.into(),
            session_exp: None,
        }
    }

    fn now() -> i64 {
        std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs().cast_signed()
    }

    fn remembered(verifier: &TokenVerifier) -> u64 {
        verifier.verified.run_pending_tasks();
        verifier.verified.entry_count()
    }

    #[test]
    fn only_verified_tokens_are_remembered() {
        let keys = SigningKeys::from_pems(ISSUER, PEM, &[]).unwrap();
        let verifier = TokenVerifier::new(keys.verifier());
        let token = keys.sign(&claims(1, now() + 60));
        for bad in [
            format!("{token}A"),
            token[..token.len() - 2].to_owned(),
            keys.sign(&claims(1, now())),
            keys.sign(&Claims { aud: Audience::Stream, ..claims(1, now() + 60) }),
            keys.sign(&Claims { sid: None, ..claims(1, now() + 60) }),
            String::new(),
        ] {
            assert!(verifier.verify(&bad, API).is_err(), "{bad}");
        }
        assert_eq!(remembered(&verifier), 0);
        for _ in 0..2 {
            assert_eq!(*verifier.verify(&token, API).unwrap(), claims(1, now() + 60));
        }
        assert_eq!(remembered(&verifier), 1);
        verifier.verified.insert(Sha256::digest("seen").into(), Arc::new(claims(2, now() + 60)));
        assert_eq!(verifier.verify("seen", API).unwrap().sub, UserId(2), "it is not verified again");
        assert_eq!(verifier.verify(&token, &[Audience::Stream]), Err(TokenError::Audience));
    }

    #[test]
    fn remembered_token_is_rejected_from_the_second_of_its_exp() {
        let keys = SigningKeys::from_pems(ISSUER, PEM, &[]).unwrap();
        let verifier = TokenVerifier::new(keys.verifier());
        let exp = now() + 2;
        let token = keys.sign(&claims(1, exp));
        assert!(verifier.verify(&token, API).is_ok());
        while now() < exp {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(verifier.verify(&token, API), Err(TokenError::Expired));
        assert_eq!(remembered(&verifier), 1, "it was judged, not verified again");
    }

    #[test]
    fn remembered_tokens_are_bounded() {
        let keys = SigningKeys::from_pems(ISSUER, PEM, &[]).unwrap();
        let verifier = TokenVerifier::new(keys.verifier());
        for hash in 0..2 * CAPACITY {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&hash.to_le_bytes());
            verifier.verified.insert(key, Arc::new(claims(1, 1)));
        }
        assert!(remembered(&verifier) <= CAPACITY);
    }
}
