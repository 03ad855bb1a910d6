//! The tokens and cookies that are issued.

use std::time::Duration;

use chrono::{DateTime, Utc};
use http::HeaderValue;
use jsonwebtoken::jwk::JwkSet;
use protocol::{
    claims::{Audience, Claims, SigningKeys},
    ids::UserId,
};
use service_kit::{config::Origin, cookies::Cookies};

use crate::{commands::Actor, config::Lifetimes, store::sessions::Session};

pub struct Tokens {
    keys: SigningKeys,
    cookies: Cookies,
    lifetimes: Lifetimes,
}

pub(super) struct Token {
    pub(super) text: String,
    pub(super) expires_at: DateTime<Utc>,
}

impl Tokens {
    pub fn new(keys: SigningKeys, origin: &Origin, lifetimes: Lifetimes) -> Self {
        Self { keys, cookies: Cookies::new(origin), lifetimes }
    }

    pub(super) fn jwks(&self) -> &JwkSet {
        self.keys.jwks()
    }

    /// Lifetime of a new session.
    pub(super) fn lifetime(&self) -> Duration {
        self.lifetimes.session
    }

    /// A token that is valid for as long as its session.
    pub(super) fn issue(&self, user: UserId, session: Session) -> Token {
        let actor = Actor { user, session: Some(session.id) };
        self.sign(actor, session.expires_at, Audience::Api, self.lifetimes.session, None)
    }

    /// A token that opens streams. An open stream may last until `ends_at`, the end of the session.
    pub(super) fn issue_for_stream(&self, actor: Actor, ends_at: DateTime<Utc>) -> Token {
        let session_exp = Some(ends_at.timestamp());
        self.sign(actor, ends_at, Audience::Stream, self.lifetimes.stream_token, session_exp)
    }

    fn sign(
        &self,
        actor: Actor,
        ends_at: DateTime<Utc>,
        aud: Audience,
        lifetime: Duration,
        session_exp: Option<i64>,
    ) -> Token {
        let now = Utc::now();
        // Rounded down to seconds: never past the session, which ends by the database's clock, nor past `lifetime`.
        let exp = ends_at.min(now + lifetime).timestamp();
        let claims = Claims {
            sub: actor.user,
            sid: actor.session,
            iat: now.timestamp(),
            exp,
            aud,
            iss: self.keys.issuer().to_owned(),
            session_exp,
        };
        let expires_at = DateTime::from_timestamp(exp, 0).expect("it came from a timestamp");
        Token { text: self.keys.sign(&claims), expires_at }
    }

    pub(super) fn cookie(&self, token: &Token) -> HeaderValue {
        let age = (token.expires_at - Utc::now()).num_seconds();
        self.cookies.set(self.cookies.session(), &token.text, age.try_into().unwrap_or(0))
    }

    pub(super) fn no_cookie(&self) -> HeaderValue {
        self.cookies.set(self.cookies.session(), "", 0)
    }
}
