//! Authentication: verifies tokens, finds their user, checks the origin of requests by cookie.

use std::sync::Arc;

use protocol::{
    claims::{Audience, SigningKeys},
    feed::{Identity, Login},
    keys_version::{KeysVersion, Version},
    position::Position,
};
use service_kit::{
    cookies::Cookies, ended_sessions::EndedSessions, http::PresentedTokens, origins::Origins,
    verified_tokens::TokenVerifier,
};

use super::{HandlerResult, error::ApiError, request::Inbound, services::Services};
use crate::{
    commands::{Actor, CommandContext},
    domain::{
        service_token::{Scope, ServiceToken},
        user::{AddableBy, OwnUser, User},
    },
    external::ExternalUsers,
    last_used::LastUsed,
    request_context::RequestContext,
    store::{
        StoreError,
        service_tokens::Service,
        sessions::{self, FoundCaller},
    },
};

pub struct Auth {
    verifier: TokenVerifier,
    /// Identifies the configured keys: gateways compare it to learn of a removed one.
    version: Version,
    origins: Arc<Origins>,
    cookies: Cookies,
    used: LastUsed,
    ended: EndedSessions,
    context: CommandContext,
    external: Option<Arc<ExternalUsers>>,
    services: Services,
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

/// Another back end.
#[derive(Debug)]
pub(super) struct ServiceCaller {
    pub(super) service: Arc<Service>,
    pub(super) context: RequestContext,
}

#[derive(Debug)]
pub(super) struct LiveCaller {
    pub(super) actor: Actor,
    pub(super) user: User,
    pub(super) shares_presence: bool,
    pub(super) addable_by: AddableBy,
    /// Their position in their feed before anything else was read.
    pub(super) cursor: Position,
    /// Exact at `cursor`.
    pub(super) unread_total: i64,
}

impl Auth {
    pub fn new(
        keys: &SigningKeys,
        origins: Arc<Origins>,
        used: LastUsed,
        context: CommandContext,
        external: Option<Arc<ExternalUsers>>,
    ) -> Self {
        let issuer = external.as_ref().map(|external| external.issuer());
        let version = Version::of(&(keys.thumbprints(), issuer));
        let (verifier, cookies) = (TokenVerifier::new(keys.verifier()), Cookies::new(origins.own()));
        let services = Services::new(context.database.clone());
        let ended = EndedSessions::default();
        Self { verifier, version, origins, cookies, used, ended, context, external, services }
    }

    pub fn keys_version(&self) -> KeysVersion {
        let external = self.external.as_ref().and_then(|external| external.version());
        KeysVersion { configured: self.version.clone(), external }
    }

    pub(super) fn used(&self) -> &LastUsed {
        &self.used
    }

    /// The credential of a user, checked without the database.
    pub(super) async fn credential(&self, inbound: &Inbound) -> Result<Credential, ApiError> {
        let PresentedTokens { tokens, from_cookie } = self.presented(inbound)?;
        if let Some(token) = service_token(&tokens, from_cookie) {
            self.services.find(&token).await?.ok_or(ApiError::Unauthorized)?;
            return Err(ApiError::USER_REQUIRED);
        }
        let credential = Credential { from_cookie, ..self.first_valid(&tokens).await? };
        let Actor { user, session } = credential.actor;
        if let Some(session) = session {
            self.used.note(Login { user, session });
        }
        inbound.context.note_caller(user);
        Ok(credential)
    }

    /// The other back end, if its token allows this.
    pub(super) async fn service(&self, inbound: &Inbound, scope: Scope) -> Result<Arc<Service>, ApiError> {
        let PresentedTokens { tokens, from_cookie } = self.presented(inbound)?;
        let Some(token) = service_token(&tokens, from_cookie) else {
            // A user's. 401 if it is not valid.
            let credential = self.credential(inbound).await?;
            let error = self.check_origin(credential, inbound).err().unwrap_or(ApiError::SERVICE_REQUIRED);
            let error = self.unauthorized_or(credential.actor, error).await;
            if let ApiError::Unauthorized = error {
                self.remember_ended(credential.actor);
            }
            return Err(error);
        };
        let service = self.services.find(&token).await?.ok_or(ApiError::Unauthorized)?;
        inbound.context.note_service(&service.name);
        if service.scopes.contains(&scope) { Ok(service) } else { Err(ApiError::lacks(scope)) }
    }

    fn presented(&self, inbound: &Inbound) -> Result<PresentedTokens, ApiError> {
        PresentedTokens::find(&inbound.headers, None, &self.cookies).ok_or(ApiError::Unauthorized)
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

    /// The first credential whose session is live. Several valid ones are rare.
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

    pub(super) async fn reader(&self, credential: Credential) -> Result<LiveCaller, ApiError> {
        let actor = credential.actor;
        let find = async |connection: &mut _| sessions::caller(connection, actor.session, actor.user).await;
        let FoundCaller { user: OwnUser { user, shares_presence, addable_by }, head: cursor, unread_total } =
            self.context.database.run(find).await?.ok_or(ApiError::Unauthorized)?;
        Ok(LiveCaller { actor, user, shares_presence, addable_by, cursor, unread_total })
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

/// Only in the header: no browser has one.
fn service_token(tokens: &[String], from_cookie: bool) -> Option<ServiceToken> {
    tokens.first().filter(|_| !from_cookie).and_then(|token| ServiceToken::presented(token))
}
