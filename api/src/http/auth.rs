//! Who is calling: a token from the `Authorization` header, else from the session cookie; signed by us, and of a session
//! that still lives. And where from: a cookie is sent by whatever page asks, so then the page must be ours.
//!
//! A session that was found to have ended is remembered in one place, whichever handler found it: [`Auth::answered`].

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use http::{HeaderValue, StatusCode};
use jsonwebtoken::jwk::JwkSet;
use protocol::{
    claims::{Audience, Claims, KeySet, SigningKeys},
    feed::{Identity, Login},
    ids::{SessionId, UserId},
    keys_version::{KeysVersion, Version},
    position::Position,
};
use service_kit::{cookies::Cookies, ended::EndedSessions, http::PresentedTokens, origins::Origins};

use super::{error::ApiError, request::Inbound};
use crate::{
    commands::{Actor, Context},
    domain::user::User,
    external::External,
    last_used::LastUsed,
    request_context::RequestContext,
    store::{
        Database,
        sessions::{self, Session},
    },
};

pub struct Auth {
    keys: SigningKeys,
    verifier: KeySet,
    /// Identifies the configured keys: gateways compare it to learn of a removed one.
    version: Version,
    origins: Arc<Origins>,
    cookies: Cookies,
    lifetimes: Lifetimes,
    used: LastUsed,
    ended: EndedSessions,
    context: Context,
    /// Whose tokens are accepted besides our own.
    external: Option<Arc<External>>,
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
    from_cookie: bool,
    /// Of the token, in seconds since 1970.
    pub(super) expires_at: i64,
}

/// A caller whose session lives.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) actor: Actor,
    pub(super) user: User,
    /// Their place in their feed, before anything else was read.
    pub(super) cursor: Position,
}

/// What is handed out.
pub(super) struct Token {
    pub(super) text: String,
    pub(super) expires_at: DateTime<Utc>,
}

impl Auth {
    pub fn new(
        keys: SigningKeys,
        origins: Arc<Origins>,
        lifetimes: Lifetimes,
        used: LastUsed,
        context: Context,
    ) -> Self {
        let (verifier, version) = (keys.verifier(), Version::of(&keys.thumbprints()));
        let cookies = Cookies::new(origins.own());
        let ended = EndedSessions::default();
        Self { keys, verifier, version, origins, cookies, lifetimes, used, ended, context, external: None }
    }

    /// Accepts another issuer's tokens too.
    pub fn with_external(self, external: Option<Arc<External>>) -> Self {
        let issuer = external.as_ref().map(|external| external.issuer());
        let version = Version::of(&(self.keys.thumbprints(), issuer));
        Self { version, external, ..self }
    }

    /// Of the keys by which tokens are checked here.
    pub fn keys_version(&self) -> KeysVersion {
        let external = self.external.as_ref().and_then(|external| external.version());
        KeysVersion { configured: self.version.clone(), external }
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
        let age = (token.expires_at - Utc::now()).num_seconds();
        self.cookies.set(self.cookies.session(), &token.text, age.try_into().unwrap_or(0))
    }

    /// The browser forgets the cookie.
    pub(super) fn no_cookie(&self) -> HeaderValue {
        self.cookies.set(self.cookies.session(), "", 0)
    }

    /// What can be said of the caller without asking the database. A bad credential is not made up for by another one.
    pub(super) async fn credential(&self, inbound: &Inbound) -> Result<Credential, ApiError> {
        let PresentedTokens { tokens, from_cookie } =
            PresentedTokens::find(&inbound.headers, None, &self.cookies).ok_or(ApiError::Unauthorized)?;
        let credential = self.first_good(&tokens, from_cookie).await?;
        let Actor { user, session } = credential.actor;
        if let Some(session) = session {
            self.used.note(Login { user, session });
        }
        inbound.context.note_caller(user, session);
        Ok(credential)
    }

    /// Beside our cookie may be others of its name, of other programs or of other times: the first good one counts.
    async fn first_good(&self, tokens: &[String], from_cookie: bool) -> Result<Credential, ApiError> {
        let mut good = Vec::new();
        let mut refusal = ApiError::Unauthorized;
        for token in tokens {
            match self.verify(token, from_cookie).await {
                Ok(credential) => good.push(credential),
                Err(ApiError::Unauthorized) => {}
                Err(cannot_be_told) => refusal = cannot_be_told,
            }
        }
        match good[..] {
            [] => Err(refusal),
            [only] => Ok(only),
            _ => self.first_live(&good).await,
        }
    }

    /// Of several, which hardly ever are, one whose session lives. Of one it is asked later, as a part of what it is for.
    async fn first_live(&self, credentials: &[Credential]) -> Result<Credential, ApiError> {
        for credential in credentials {
            let Actor { user, session } = credential.actor;
            let live = async |connection: &mut _| sessions::is_live(connection, session, user).await;
            if self.context.database.run(live).await? {
                return Ok(*credential);
            }
            self.remember_ended(user, session);
        }
        Err(ApiError::Unauthorized)
    }

    async fn verify(&self, token: &str, from_cookie: bool) -> Result<Credential, ApiError> {
        if let Some(external) = self.external.as_ref().filter(|external| external.issued(token)) {
            let claims = external.verify(token).await?;
            let user = external.user_of(&self.context, &Identity::from(&claims)).await?;
            let actor = Actor { user, session: None };
            return Ok(Credential { actor, from_cookie, expires_at: claims.exp });
        }
        let claims = self.verifier.verify(token, &[Audience::Api]).map_err(|error| {
            tracing::debug!(reason = %error, "token refused");
            ApiError::Unauthorized
        })?;
        if claims.sid.is_some_and(|session| self.ended.contains(claims.sub, session)) {
            return Err(ApiError::Unauthorized);
        }
        let actor = Actor { user: claims.sub, session: claims.sid };
        Ok(Credential { actor, from_cookie, expires_at: claims.exp })
    }

    /// 401, then 403: the whole question, in one query.
    pub(super) async fn caller(&self, database: &Database, inbound: &Inbound) -> Result<Caller, ApiError> {
        let credential = self.credential(inbound).await?;
        let actor = credential.actor;
        let found = database
            .run(async |connection| sessions::caller(connection, actor.session, actor.user).await)
            .await?;
        let (user, cursor) = found.ok_or(ApiError::Unauthorized)?;
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
                return Err(ApiError::Unauthorized);
            }
        }
        input
    }

    /// Inspects every answer. A 401 to a valid token means that its session has ended: from now on the token is refused before
    /// anything is counted. Otherwise it could still use up the limits of its user.
    pub(super) fn answered(&self, context: &RequestContext, status: StatusCode) {
        if let Some((user, session)) = context.caller()
            && status == StatusCode::UNAUTHORIZED
        {
            self.remember_ended(user, session);
        }
    }

    fn remember_ended(&self, user: UserId, session: Option<SessionId>) {
        if let Some(session) = session {
            self.ended.note(user, session);
        }
    }

    /// 403: a cookie proves who sends, not who meant it.
    pub(super) fn check_origin(&self, credential: Credential, inbound: &Inbound) -> Result<(), ApiError> {
        if credential.from_cookie {
            self.origins.check_cookie(&inbound.method, &inbound.headers)?;
        }
        Ok(())
    }
}
