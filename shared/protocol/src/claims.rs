//! Tokens of ours: JWT signed with Ed25519 (`EdDSA`). `api` holds the private keys and publishes the public ones as a JWKS. There is
//! no leeway; algorithm, issuer and audience are pinned. Errors and logs never contain a token.

use std::collections::HashMap;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ed25519_zebra::{Signature, VerificationKey, VerificationKeyBytes, batch};
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, PublicKeyUse, ThumbprintHash},
};
use serde::{
    Deserialize, Serialize,
    de::{DeserializeOwned, IgnoredAny},
};
use thiserror::Error;

use crate::ids::{SessionId, UserId};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Audience {
    Api,
    /// The stream only; may travel in a query.
    Stream,
}

/// Times are seconds since 1970 (RFC 7519).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    pub sub: UserId,
    /// The session. `None` in stream tokens made from an external token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sid: Option<SessionId>,
    pub iat: i64,
    pub exp: i64,
    pub aud: Audience,
    pub iss: String,
    /// In stream tokens: the end of the session, which bounds the connection; `exp` bounds only opening it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_exp: Option<i64>,
}

impl Claims {
    /// The latest end of a stream opened with this token.
    pub fn stream_ends_at(&self) -> i64 {
        self.session_exp.unwrap_or(self.exp)
    }

    /// Whether they allow a request now, at a place for these audiences.
    pub fn judge(&self, accepted: &[Audience]) -> Result<(), TokenError> {
        if !accepted.contains(&self.aud) {
            return Err(TokenError::Audience);
        }
        if has_ended(self.exp) || self.session_exp.is_some_and(has_ended) {
            return Err(TokenError::Expired);
        }
        if self.aud == Audience::Api && self.sid.is_none() {
            return Err(TokenError::Invalid); // It could not be revoked.
        }
        Ok(())
    }
}

#[derive(Debug, Error)]
#[error("not an Ed25519 private key in PKCS#8 PEM")]
pub struct BadKey;

/// The private keys of `api`. The first signs and all are published, so that keys can be rotated.
pub struct SigningKeys {
    issuer: String,
    header: Header,
    signing: EncodingKey,
    jwks: JwkSet,
}

impl SigningKeys {
    pub fn from_pems(issuer: &str, first: &[u8], others: &[Vec<u8>]) -> Result<Self, BadKey> {
        let (signing, jwk) = read_pem(first)?;
        let header = Header { kid: jwk.common.key_id.clone(), ..Header::new(Algorithm::EdDSA) };
        let mut keys = vec![jwk];
        for pem in others {
            keys.push(read_pem(pem)?.1);
        }
        Ok(Self { issuer: issuer.into(), header, signing, jwks: JwkSet { keys } })
    }

    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    pub fn sign(&self, claims: &Claims) -> String {
        jsonwebtoken::encode(&self.header, claims, &self.signing)
            .expect("the key was checked when it was read, and claims are plain JSON")
    }

    /// The public halves, as served at [`crate::feed::JWKS_PATH`].
    pub fn jwks(&self) -> &JwkSet {
        &self.jwks
    }

    /// By thumbprint, sorted: the order of signing keys makes no difference to others.
    pub fn thumbprints(&self) -> Vec<&str> {
        let mut names: Vec<_> =
            self.jwks.keys.iter().filter_map(|jwk| jwk.common.key_id.as_deref()).collect();
        names.sort_unstable();
        names
    }

    pub fn verifier(&self) -> KeySet {
        KeySet::from_jwks(&self.issuer, &self.jwks)
    }
}

fn read_pem(pem: &[u8]) -> Result<(EncodingKey, Jwk), BadKey> {
    let key = EncodingKey::from_ed_pem(pem).map_err(|_| BadKey)?;
    let mut jwk = Jwk::from_encoding_key(&key, Algorithm::EdDSA).map_err(|_| BadKey)?;
    // RFC 7638: a thumbprint, so every replica uses the same name.
    let kid = jwk.thumbprint(ThumbprintHash::SHA256).map_err(|_| BadKey)?;
    jwk.common.key_id = Some(kid);
    jwk.common.public_key_use = Some(PublicKeyUse::Signature);
    Ok((key, jwk))
}

/// The cause of a rejection. Clients only see 401.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TokenError {
    #[error("signed with an unknown key")]
    UnknownKey,
    #[error("expired")]
    Expired,
    #[error("for another audience")]
    Audience,
    #[error("malformed token or invalid signature")]
    Invalid,
}

/// The first 8 bytes of a key's thumbprint (RFC 7638), because a `kid` is arbitrary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyName(pub [u8; 8]);

impl KeyName {
    pub fn of(jwk: &Jwk) -> Option<Self> {
        let thumbprint = jwk.thumbprint(ThumbprintHash::SHA256).ok()?;
        thumbprint.as_bytes().first_chunk().copied().map(Self)
    }
}

/// The public keys by their `kid`.
pub struct KeySet {
    issuer: String,
    keys: HashMap<String, PublicKey>,
}

struct PublicKey {
    name: KeyName,
    /// Decompressed once: jsonwebtoken does it for each signature, which costs a sixth of the verification.
    key: VerificationKey,
}

impl KeySet {
    /// Skips keys of other kinds, without a name, and malformed ones.
    pub fn from_jwks(issuer: &str, jwks: &JwkSet) -> Self {
        let named = |jwk: &Jwk| {
            let key = VerificationKey::try_from(ed25519(jwk)?.try_get_as_bytes().ok()?).ok()?;
            Some((jwk.common.key_id.clone()?, PublicKey { name: KeyName::of(jwk)?, key }))
        };
        Self { issuer: issuer.into(), keys: jwks.keys.iter().filter_map(named).collect() }
    }

    pub fn names(&self) -> impl Iterator<Item = KeyName> {
        self.keys.values().map(|key| key.name)
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub fn verify(&self, token: &str, accepted: &[Audience]) -> Result<Claims, TokenError> {
        let signed = self.read(token)?;
        if !signed.is_genuine() {
            return Err(TokenError::Invalid);
        }
        let claims = signed.claims()?;
        claims.judge(accepted)?;
        Ok(claims)
    }

    /// Finds the key of a token and takes its signature apart.
    pub fn read<'a>(&'a self, token: &'a str) -> Result<SignedToken<'a>, TokenError> {
        #[derive(Deserialize)]
        struct Header {
            alg: String,
            #[serde(default)]
            kid: Option<String>,
            #[serde(default)]
            crit: Option<IgnoredAny>,
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::Invalid)?;
        let (header, claims) = signed.split_once('.').ok_or(TokenError::Invalid)?;
        let header: Header = decode(header)?;
        // No extension is supported (RFC 7515, section 4.1.11).
        if header.alg != "EdDSA" || header.crit.is_some() {
            return Err(TokenError::Invalid);
        }
        let key = header.kid.and_then(|kid| self.keys.get(&kid)).ok_or(TokenError::UnknownKey)?;
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| TokenError::Invalid)?;
        let signature = Signature::from_slice(&signature).map_err(|_| TokenError::Invalid)?;
        Ok(SignedToken { issuer: &self.issuer, key, signed, claims, signature })
    }
}

/// A token that names one of our keys. Its signature must be verified before its claims are read.
pub struct SignedToken<'a> {
    issuer: &'a str,
    key: &'a PublicKey,
    signed: &'a str,
    claims: &'a str,
    signature: Signature,
}

impl SignedToken<'_> {
    pub fn key(&self) -> KeyName {
        self.key.name
    }

    pub fn is_genuine(&self) -> bool {
        self.key.key.verify(&self.signature, self.signed.as_bytes()).is_ok()
    }

    /// The signature, to be verified together with others.
    pub fn signature(&self) -> batch::Item {
        batch::Item::from((VerificationKeyBytes::from(self.key.key), self.signature, self.signed))
    }

    /// The claims, if they are of our issuer. The signature must be verified already, the times and the audience must be judged.
    pub fn claims(&self) -> Result<Claims, TokenError> {
        let claims: Claims = decode(self.claims)?;
        if claims.iss == self.issuer { Ok(claims) } else { Err(TokenError::Invalid) }
    }
}

fn decode<T: DeserializeOwned>(part: &str) -> Result<T, TokenError> {
    let json = URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Invalid)?;
    serde_json::from_slice(&json).map_err(|_| TokenError::Invalid)
}

/// Whether an `exp` or the end of a session has passed: nothing is accepted "on or after" it (RFC 7519, section 4.1.4).
pub(crate) fn has_ended(at: i64) -> bool {
    at <= jsonwebtoken::get_current_timestamp().cast_signed()
}

/// Checks the length because the verifier slices 32 bytes unchecked.
pub(crate) fn ed25519(jwk: &Jwk) -> Option<DecodingKey> {
    let AlgorithmParameters::OctetKeyPair(pair) = &jwk.algorithm else { return None };
    if pair.curve != EllipticCurve::Ed25519 {
        return None;
    }
    let key = DecodingKey::from_ed_components(&pair.x).ok()?;
    (key.try_get_as_bytes().ok()?.len() == 32).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ISSUER: &str = "http://localhost";
    // Made for these tests only.
    const PEM_A: &[u8] = b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f\n-----END PRIVATE KEY-----\n";
    const PEM_B: &[u8] = b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIB8eHRwbGhkYFxYVFBMSERAPDg0MCwoJCAcGBQQDAgEA\n-----END PRIVATE KEY-----\n";

    fn claims(exp: i64) -> Claims {
        Claims {
            sub: UserId(1),
            sid: Some(SessionId(2)),
            iat: 0,
            exp,
            aud: Audience::Api,
            iss: ISSUER.into(),
            session_exp: None,
        }
    }

    const FAR: i64 = 4_000_000_000;

    #[test]
    fn a_token_is_good_for_its_audience_until_it_expires() {
        let keys = SigningKeys::from_pems(ISSUER, PEM_A, &[]).unwrap();
        let verifier = keys.verifier();
        let token = keys.sign(&claims(FAR));
        assert_eq!(verifier.verify(&token, &[Audience::Api, Audience::Stream]), Ok(claims(FAR)));
        assert_eq!(verifier.verify(&token, &[Audience::Stream]), Err(TokenError::Audience));
        assert_eq!(verifier.verify(&keys.sign(&claims(1)), &[Audience::Api]), Err(TokenError::Expired));
    }

    #[test]
    fn a_token_is_expired_in_the_second_of_its_exp() {
        let keys = SigningKeys::from_pems(ISSUER, PEM_A, &[]).unwrap();
        let now = jsonwebtoken::get_current_timestamp().cast_signed();
        let verify = |claims| keys.verifier().verify(&keys.sign(&claims), &[Audience::Stream]).map(|_| ());
        let stream = Claims { aud: Audience::Stream, ..claims(now + 60) };
        let of_session = |end| Claims { session_exp: Some(end), ..stream.clone() };
        assert_eq!(verify(Claims { exp: now, ..stream.clone() }), Err(TokenError::Expired));
        assert_eq!(verify(of_session(now)), Err(TokenError::Expired));
        assert_eq!(verify(of_session(now + 60)), Ok(()));
    }

    #[test]
    fn rotation_accepts_both_keys_and_no_other() {
        let old = SigningKeys::from_pems(ISSUER, PEM_A, &[]).unwrap();
        let new = SigningKeys::from_pems(ISSUER, PEM_B, &[PEM_A.to_vec()]).unwrap();
        let accepted = &[Audience::Api];
        assert!(new.verifier().verify(&old.sign(&claims(FAR)), accepted).is_ok());
        assert!(new.verifier().verify(&new.sign(&claims(FAR)), accepted).is_ok());
        assert_eq!(old.verifier().verify(&new.sign(&claims(FAR)), accepted), Err(TokenError::UnknownKey));
    }

    #[test]
    fn forged_tokens_are_rejected() {
        let keys = SigningKeys::from_pems(ISSUER, PEM_A, &[]).unwrap();
        let verifier = keys.verifier();
        let token = keys.sign(&claims(FAR));
        let [header, body, signature] = token.split('.').collect::<Vec<_>>().try_into().unwrap();
        let hmac = jsonwebtoken::encode(
            &Header { kid: keys.header.kid.clone(), ..Header::new(Algorithm::HS256) },
            &claims(FAR),
            &EncodingKey::from_secret(PEM_A),
        )
        .unwrap();
        let other_issuer = keys.sign(&Claims { iss: "http://elsewhere".into(), ..claims(FAR) });
        let flipped = if signature.starts_with('A') { "B" } else { "A" };
        for bad in [
            String::new(),
            "a.b.c".into(),
            hmac,
            other_issuer,
            format!("{header}.{body}."),
            format!("{header}.{body}.{flipped}{}", &signature[1..]),
            format!("{header}.{body}x.{signature}"),
        ] {
            assert!(verifier.verify(&bad, &[Audience::Api]).is_err(), "{bad}");
        }
    }

    #[test]
    fn malformed_published_key_is_skipped() {
        let jwks: JwkSet = serde_json::from_str(
            r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AAAA","kid":"short"},{"kty":"oct","k":"AAAA","kid":"hmac"}]}"#,
        )
        .unwrap();
        assert!(KeySet::from_jwks(ISSUER, &jwks).is_empty());
    }
}
