//! Authentication: which tokens are accepted, whose they are, from which page a cookie may come; and the tokens and cookies
//! that are issued.

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use http::HeaderValue;
use jsonwebtoken::jwk::JwkSet;
use protocol::{
    claims::{Audience, Claims, KeySet, SigningKeys},
    feed::{Identity, Login},
    ids::UserId,
    keys_version::{KeysVersion, Version},
    position::Position,
};
use service_kit::{cookies::Cookies, ended_sessions::EndedSessions, http::PresentedTokens, origins::Origins};

use super::{HandlerResult, error::ApiError, request::Inbound};
use crate::{
    commands::{Actor, CommandContext},
    config::Lifetimes,
    domain::user::User,
    external::External,
    last_used::LastUsed,
    request_context::RequestContext,
    store::{
        StoreError,
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
    context: CommandContext,
    external: Option<Arc<External>>,
}

/// A valid token. Whether its session is live is checked next, alone or by the statement of a command.
#[derive(Debug, Clone, Copy)]
pub(super) struct Credential {
    pub(super) actor: Actor,
    from_cookie: bool,
    /// In seconds since 1970.
    expires_at: i64,
}

/// The caller of a command. The command itself checks that the session is live.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) actor: Actor,
    /// When the token expires, in seconds since 1970.
    pub(super) expires_at: i64,
    pub(super) context: RequestContext,
}

impl Caller {
    pub(super) fn new(Credential { actor, expires_at, .. }: Credential, context: RequestContext) -> Self {
        Self { actor, expires_at, context }
    }
}

/// A caller whose session is live.
#[derive(Debug)]
pub(super) struct Reader {
    pub(super) actor: Actor,
    pub(super) user: User,
    /// Their position in their feed before anything else was read.
    pub(super) cursor: Position,
}

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
        context: CommandContext,
    ) -> Self {
        let (verifier, version) = (keys.verifier(), Version::of(&keys.thumbprints()));
        let cookies = Cookies::new(origins.own());
        let ended = EndedSessions::default();
        Self { keys, verifier, version, origins, cookies, lifetimes, used, ended, context, external: None }
    }

    pub fn with_external(self, external: Option<Arc<External>>) -> Self {
        let issuer = external.as_ref().map(|external| external.issuer());
        let version = Version::of(&(self.keys.thumbprints(), issuer));
        Self { version, external, ..self }
    }

    /// The version of the keys by which tokens are verified.
    pub fn keys_version(&self) -> KeysVersion {
        let external = self.external.as_ref().and_then(|external| external.version());
        KeysVersion { configured: self.version.clone(), external }
    }

    pub(super) fn used(&self) -> &LastUsed {
        &self.used
    }

    pub(super) fn lifetime(&self) -> Duration {
        self.lifetimes.session
    }

    pub(super) fn jwks(&self) -> &JwkSet {
        self.keys.jwks()
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

    /// The credential, checked without the database.
    pub(super) async fn credential(&self, inbound: &Inbound) -> Result<Credential, ApiError> {
        let PresentedTokens { tokens, from_cookie } =
            PresentedTokens::find(&inbound.headers, None, &self.cookies).ok_or(ApiError::Unauthorized)?;
        let credential = Credential { from_cookie, ..self.first_valid(&tokens).await? };
        let Actor { user, session } = credential.actor;
        if let Some(session) = session {
            self.used.note(Login { user, session });
        }
        inbound.context.note_caller(user);
        Ok(credential)
    }

    /// There may be several cookies of our name, from other programs or older deployments: the first valid one counts.
    async fn first_valid(&self, tokens: &[String]) -> Result<Credential, ApiError> {
        let mut valid = Vec::new();
        let mut error = ApiError::Unauthorized;
        for token in tokens {
            match self.verify(token).await {
                Ok(credential) => valid.push(credential),
                Err(ApiError::Unauthorized) => {}
                Err(unknown) => error = unknown,
            }
        }
        match valid[..] {
            [] => Err(error),
            [only] => Ok(only),
            _ => self.first_live(&valid).await,
        }
    }

    /// Of several valid ones, which are rare, the first whose session is live.
    async fn first_live(&self, credentials: &[Credential]) -> Result<Credential, ApiError> {
        for credential in credentials {
            if self.is_live(credential.actor).await? {
                return Ok(*credential);
            }
            self.remember_ended(credential.actor);
        }
        Err(ApiError::Unauthorized)
    }

    async fn verify(&self, token: &str) -> Result<Credential, ApiError> {
        if let Some(external) = self.external.as_ref().filter(|external| external.issued(token)) {
            let claims = external.verify(token).await.inspect_err(|error| {
                tracing::debug!(reason = %error, "external token rejected");
            })?;
            let user = external.user_of(&self.context, &Identity::from(&claims)).await?;
            let actor = Actor { user, session: None };
            return Ok(Credential { actor, from_cookie: false, expires_at: claims.exp });
        }
        let claims = self.verifier.verify(token, &[Audience::Api]).map_err(|error| {
            tracing::debug!(reason = %error, "token rejected");
            ApiError::Unauthorized
        })?;
        if claims.sid.is_some_and(|session| self.ended.contains(claims.sub, session)) {
            return Err(ApiError::Unauthorized);
        }
        let actor = Actor { user: claims.sub, session: claims.sid };
        Ok(Credential { actor, from_cookie: false, expires_at: claims.exp })
    }

    pub(super) async fn reader(&self, credential: Credential) -> Result<Reader, ApiError> {
        let actor = credential.actor;
        let find = async |connection: &mut _| sessions::caller(connection, actor.session, actor.user).await;
        let (user, cursor) = self.context.database.run(find).await?.ok_or(ApiError::Unauthorized)?;
        Ok(Reader { actor, user, cursor })
    }

    /// The error of a request that ends before its command has checked the session.
    pub(super) async fn unauthorized_or(&self, actor: Actor, error: ApiError) -> ApiError {
        match self.is_live(actor).await {
            Ok(true) => error,
            Ok(false) => ApiError::Unauthorized,
            Err(failure) => failure.into(),
        }
    }

    async fn is_live(&self, Actor { user, session }: Actor) -> Result<bool, StoreError> {
        self.context.database.run(async |connection| sessions::is_live(connection, session, user).await).await
    }

    /// A 401 to a valid token means that its session has ended. From then on the token is rejected before any rate limit:
    /// otherwise it could still use up the limits of its user.
    pub(super) fn note_ended(&self, actor: Actor, answer: &HandlerResult) {
        if let Err(ApiError::Unauthorized) = answer {
            self.remember_ended(actor);
        }
    }

    fn remember_ended(&self, Actor { user, session }: Actor) {
        if let Some(session) = session {
            self.ended.note(user, session);
        }
    }

    /// Browsers send a cookie for any page, so the page must be ours.
    pub(super) fn check_origin(&self, credential: Credential, inbound: &Inbound) -> Result<(), ApiError> {
        if credential.from_cookie {
            self.origins.check_cookie(&inbound.method, &inbound.headers)?;
        }
        Ok(())
    }
}
