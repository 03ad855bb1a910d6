//! Who is calling: a token from the `Authorization` header, else from the session cookie; signed by us, and of a session
//! that still lives. And where from: a cookie is sent by whatever page asks, so then the page must be ours.

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use http::{HeaderMap, HeaderValue, header};
use jsonwebtoken::jwk::JwkSet;
use shared::{
    claims::{Audience, Claims, KeySet, SigningKeys},
    cursor::Cursor,
    ended::EndedSessions,
    feed::Identity,
    ids::UserId,
    origins::Origins,
};

use super::{error::ApiError, request::Inbound};
use crate::{
    commands::{Actor, CommandError},
    domain::user::User,
    foreign::Foreign,
    last_used::LastUsed,
    store::{
        Database,
        sessions::{self, Session},
    },
};

const COOKIE: &str = "session";

pub struct Auth {
    keys: SigningKeys,
    verifier: KeySet,
    origins: Arc<Origins>,
    lifetimes: Lifetimes,
    used: LastUsed,
    ended: EndedSessions,
    /// Whose tokens are accepted besides our own, and where their users are.
    foreign: Option<(Arc<Foreign>, Database)>,
}

/// How long what we hand out is good.
#[derive(Debug, Clone, Copy)]
pub struct Lifetimes {
    /// A session from its last refresh, and an `api` token at most.
    pub session: Duration,
    /// A stream token.
    pub stream_token: Duration,
}

/// A caller whose token is good; whether the session lives is asked next, alone or as a part of a command.
#[derive(Debug, Clone, Copy)]
pub(super) struct Credential {
    pub(super) actor: Actor,
    by_cookie: bool,
    /// Of the token, in seconds since 1970.
    pub(super) expires_at: i64,
}

/// A caller whose session lives.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) actor: Actor,
    pub(super) user: User,
    /// Their place in their feed, before anything else was read.
    pub(super) cursor: Cursor,
}

/// What is handed out.
pub(super) struct Token {
    pub(super) text: String,
    pub(super) expires_at: DateTime<Utc>,
}

impl Auth {
    pub fn new(keys: SigningKeys, origins: Arc<Origins>, lifetimes: Lifetimes, used: LastUsed) -> Self {
        let verifier = keys.verifier();
        Self { keys, verifier, origins, lifetimes, used, ended: EndedSessions::default(), foreign: None }
    }

    /// Accepts another issuer's tokens too.
    pub fn with_foreign(self, foreign: Option<Arc<Foreign>>, database: Database) -> Self {
        Self { foreign: foreign.map(|foreign| (foreign, database)), ..self }
    }

    /// Where the use of sessions is noted.
    pub(super) fn used(&self) -> &LastUsed {
        &self.used
    }

    /// How long a session lives without being refreshed.
    pub(super) fn lifetime(&self) -> Duration {
        self.lifetimes.session
    }

    pub(super) fn jwks(&self) -> &JwkSet {
        self.keys.jwks()
    }

    /// A token for exactly as long as its session.
    pub(super) fn issue(&self, user: UserId, session: Session) -> Token {
        let actor = Actor { user, session: Some(session.id) };
        self.sign(actor, session.expires_at, Audience::Api, self.lifetimes.session, None)
    }

    /// A token that opens streams for a while; what it opens may last until `ends_at`, the end of the session.
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
        // Whole seconds, rounded down: never past the session, whose end is by the database's clock, nor longer than a
        // token may live by ours.
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
        let age = (token.expires_at - Utc::now()).num_seconds().max(0);
        self.set_cookie(&token.text, age)
    }

    /// The browser forgets the cookie: it does so only if the attributes are the same.
    pub(super) fn no_cookie(&self) -> HeaderValue {
        self.set_cookie("", 0)
    }

    fn set_cookie(&self, value: &str, age: i64) -> HeaderValue {
        let secure = if self.origins.own().is_https() { "; Secure" } else { "" };
        let cookie = format!("{COOKIE}={value}; Path=/; Max-Age={age}; HttpOnly; SameSite=Lax{secure}");
        HeaderValue::from_str(&cookie).expect("a token is base64 and dots")
    }

    /// What can be said of the caller without asking the database. A bad credential is not made up for by another one.
    pub(super) async fn credential(&self, inbound: &Inbound) -> Result<Credential, ApiError> {
        let credential = self.read_credential(&inbound.headers).await?;
        inbound.trace.note_user(credential.actor.user);
        Ok(credential)
    }

    async fn read_credential(&self, headers: &HeaderMap) -> Result<Credential, ApiError> {
        let (token, by_cookie) = match bearer(headers)? {
            Some(token) => (token, false),
            None => (cookie(headers, COOKIE).ok_or(ApiError::Unauthorized)?, true),
        };
        if let Some((foreign, database)) = self.foreign.as_ref().filter(|(foreign, _)| foreign.issued(token))
        {
            let claims = foreign.verify(token).await?;
            let user = foreign.user_of(database, &Identity::from(&claims)).await?;
            let actor = Actor { user, session: None };
            return Ok(Credential { actor, by_cookie, expires_at: claims.exp });
        }
        let claims = self.verifier.verify(token, &[Audience::Api]).map_err(|error| {
            tracing::debug!(reason = %error, "token refused");
            ApiError::Unauthorized
        })?;
        if let Some(session) = claims.sid {
            if self.ended.contains(claims.sub, session) {
                return Err(ApiError::Unauthorized);
            }
            self.used.note(session);
        }
        Ok(Credential {
            actor: Actor { user: claims.sub, session: claims.sid },
            by_cookie,
            expires_at: claims.exp,
        })
    }

    /// 401, then 403: the whole question, in one query.
    pub(super) async fn caller(&self, database: &Database, inbound: &Inbound) -> Result<Caller, ApiError> {
        let credential = self.credential(inbound).await?;
        let actor = credential.actor;
        let found = database
            .run(async |connection| sessions::caller(connection, actor.session, actor.user).await)
            .await?;
        let (user, cursor) = found.ok_or_else(|| self.has_ended(actor))?;
        self.check_origin(credential, inbound)?;
        Ok(Caller { actor, user, cursor })
    }

    /// For commands, whose own statement asks whether the session lives: one round trip less. When the request is refused
    /// before it gets there, the question is asked now, because 401 goes before whatever `input` says.
    pub(super) async fn or_unauthorized<T>(
        &self,
        database: &Database,
        credential: Credential,
        input: Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        if input.is_err() {
            let actor = credential.actor;
            let live = database
                .run(async |connection| sessions::is_live(connection, actor.session, actor.user).await)
                .await?;
            if !live {
                return Err(self.has_ended(actor));
            }
        }
        input
    }

    /// What a command says, whose own statement may have found that the session has ended.
    pub(super) fn told<T, R: std::error::Error>(
        &self,
        credential: Credential,
        outcome: Result<T, CommandError<R>>,
    ) -> Result<T, CommandError<R>> {
        if matches!(outcome, Err(CommandError::NoSession)) {
            let _ = self.has_ended(credential.actor);
        }
        outcome
    }

    /// 401, and from now on at once: or else whoever still has the token could use up the limits of its user.
    fn has_ended(&self, actor: Actor) -> ApiError {
        if let Some(session) = actor.session {
            self.ended.note(actor.user, session);
        }
        ApiError::Unauthorized
    }

    /// 403: a cookie proves who sends, not who meant it.
    pub(super) fn check_origin(&self, credential: Credential, inbound: &Inbound) -> Result<(), ApiError> {
        let meant = !credential.by_cookie || self.origins.may_use_cookie(&inbound.method, &inbound.headers);
        if meant { Ok(()) } else { Err(ApiError::ForeignOrigin) }
    }
}

/// The token of the `Authorization` header. A header of another form is a bad credential, not an absent one.
fn bearer(headers: &HeaderMap) -> Result<Option<&str>, ApiError> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let only = values.next().is_none();
    let value = value.to_str().ok().filter(|_| only).ok_or(ApiError::Unauthorized)?;
    let (scheme, token) = value.split_once(' ').ok_or(ApiError::Unauthorized)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(ApiError::Unauthorized);
    }
    Ok(Some(token.trim()))
}

/// The value of the first cookie of this name.
pub(super) fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers
        .get_all(header::COOKIE)
        .iter()
        // As bytes, because another program's cookie beside ours may be no text.
        .flat_map(|value| value.as_bytes().split(|b| *b == b';'))
        .filter_map(|pair| std::str::from_utf8(pair).ok())
        .find_map(|pair| pair.trim().strip_prefix(name)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (name.clone(), HeaderValue::from_str(value).unwrap())).collect()
    }

    #[test]
    fn only_a_bearer_header_names_a_token() {
        let bearer_of = |values: &[&str]| {
            bearer(&headers(header::AUTHORIZATION, values))
                .map(|token| token.map(str::to_owned))
                .map_err(|_| ())
        };
        assert_eq!(bearer_of(&[]), Ok(None));
        assert_eq!(bearer_of(&["Bearer a.b.c"]), Ok(Some("a.b.c".into())));
        assert_eq!(bearer_of(&["bEARER  a.b.c"]), Ok(Some("a.b.c".into())));
        for bad in [&["Basic a"][..], &["Bearer"], &[""], &["a.b.c"], &["Bearer a", "Bearer b"]] {
            assert_eq!(bearer_of(bad), Err(()), "{bad:?}");
        }
    }

    #[test]
    fn the_session_cookie_is_found_among_others() {
        let cookie_of = |values: &[&str]| cookie(&headers(header::COOKIE, values), COOKIE).map(str::to_owned);
        assert_eq!(cookie_of(&["a=b; session=x.y.z; c=d"]), Some("x.y.z".into()));
        assert_eq!(cookie_of(&["a=b", "session=x"]), Some("x".into()));
        let mut beside_noise = HeaderMap::new();
        let noise = HeaderValue::from_bytes(b"a=\xff; session=x").unwrap();
        beside_noise.insert(header::COOKIE, noise);
        assert_eq!(cookie(&beside_noise, COOKIE), Some("x"));
        for none in [&[][..], &["sessions=x"], &["mysession=x"], &["session"]] {
            assert_eq!(cookie_of(none), None, "{none:?}");
        }
    }
}
