//! The checks before every handler, in the order of docs/api.md. A handler is reached only through one of five combinators, each
//! of which gives it what those checks have found, so no handler can leave a check out:
//!
//! - [`open`]: content type → rate limit → body.
//! - [`read`]: credential and session → origin → rate limit.
//! - [`change`]: content type → credential → origin → rate limit → body → input; the command itself checks the session.
//! - [`service`]: content type → service token → its scope → rate limit → body → input.
//! - [`gateway`]: the shared secret → body.

use std::{pin::Pin, sync::Arc};

use super::{
    Api, HandlerResult,
    auth::{Caller, LiveCaller, ServiceCaller},
    error::ApiError,
    internal::require_secret,
    limits::Rate,
    request::{FromBody, Inbound, NoBody},
};
use crate::domain::service_token::Scope;

type Run = dyn Fn(Arc<Api>, Inbound, Option<Rate>) -> Pin<Box<dyn Future<Output = HandlerResult> + Send>>
    + Send
    + Sync;

const LARGEST_BODY: usize = 16 * 1024;

pub(super) struct Endpoint {
    rate: Option<Rate>,
    largest_body: usize,
    run: Box<Run>,
}

impl Endpoint {
    fn new<F: Future<Output = HandlerResult> + Send + 'static>(
        run: impl Fn(Arc<Api>, Inbound, Option<Rate>) -> F + Send + Sync + 'static,
    ) -> Self {
        let run = Box::new(move |api, inbound, rate| Box::pin(run(api, inbound, rate)) as _);
        Self { rate: None, largest_body: LARGEST_BODY, run }
    }

    /// Bytes of the body, instead of [`LARGEST_BODY`].
    pub(super) fn largest_body(self, largest_body: usize) -> Self {
        Self { largest_body, ..self }
    }

    pub(super) fn limit(self, rate: Rate) -> Self {
        Self { rate: Some(rate), ..self }
    }

    pub(super) async fn answer(&self, api: Arc<Api>, mut inbound: Inbound) -> HandlerResult {
        inbound.largest_body = self.largest_body;
        (self.run)(api, inbound, self.rate).await
    }
}

pub(super) fn open<B: FromBody, F: Future<Output = HandlerResult> + Send + 'static>(
    handler: impl Fn(Arc<Api>, Inbound, B) -> F + Clone + Send + Sync + 'static,
) -> Endpoint {
    Endpoint::new(move |api, mut inbound, rate| {
        let handler = handler.clone();
        async move {
            B::require(&inbound)?;
            api.limits.check(rate, inbound.client, None).await?;
            let body = B::read(&mut inbound).await?;
            handler(api, inbound, body).await
        }
    })
}

pub(super) fn read<F: Future<Output = HandlerResult> + Send + 'static>(
    handler: impl Fn(Arc<Api>, LiveCaller, Inbound) -> F + Clone + Send + Sync + 'static,
) -> Endpoint {
    Endpoint::new(move |api, inbound, rate| {
        let handler = handler.clone();
        async move {
            let credential = api.auth.credential(&inbound).await?;
            let read = async {
                let reader = api.auth.reader(credential).await?;
                api.auth.check_origin(credential, &inbound)?;
                api.limits.check(rate, inbound.client, Some(reader.user.id)).await?;
                handler(api.clone(), reader, inbound).await
            };
            let answer = read.await;
            api.auth.note_ended(credential.actor, &answer);
            answer
        }
    })
}

/// A route that changes something for a user. `input` reads what the request alone shows; `run` is the command.
pub(super) fn change<B: FromBody, I: Send + 'static, F: Future<Output = HandlerResult> + Send + 'static>(
    input: impl Fn(&Inbound, B) -> Result<I, ApiError> + Clone + Send + Sync + 'static,
    run: impl Fn(Arc<Api>, Caller, I) -> F + Clone + Send + Sync + 'static,
) -> Endpoint {
    Endpoint::new(move |api, mut inbound, rate| {
        let (input, run) = (input.clone(), run.clone());
        async move {
            B::require(&inbound)?;
            let credential = api.auth.credential(&inbound).await?;
            let actor = credential.actor;
            let checked = async {
                api.auth.check_origin(credential, &inbound)?;
                api.limits.check(rate, inbound.client, Some(actor.user)).await?;
                let body = B::read(&mut inbound).await?;
                input(&inbound, body)
            };
            let answer = match checked.await {
                Ok(input) => run(api.clone(), Caller::new(credential, inbound.context), input).await,
                // 401 precedes all of these, and the command that would have checked the session does not run.
                Err(error) => Err(api.auth.unauthorized_or(actor, error).await),
            };
            api.auth.note_ended(actor, &answer);
            answer
        }
    })
}

/// A change whose only input is its caller.
#[expect(clippy::unnecessary_wraps, reason = "one form for all inputs")]
pub(super) fn nothing(_: &Inbound, _: NoBody) -> Result<(), ApiError> {
    Ok(())
}

/// A route for other back ends, with a limit for each of them.
pub(super) fn service<B: FromBody, I: Send + 'static, F: Future<Output = HandlerResult> + Send + 'static>(
    scope: Scope,
    input: impl Fn(&Inbound, B) -> Result<I, ApiError> + Clone + Send + Sync + 'static,
    run: impl Fn(Arc<Api>, ServiceCaller, I) -> F + Clone + Send + Sync + 'static,
) -> Endpoint {
    Endpoint::new(move |api, mut inbound, _| {
        let (input, run) = (input.clone(), run.clone());
        async move {
            B::require(&inbound)?;
            let service = api.auth.service(&inbound, scope).await?;
            api.limits.check_service(service.id).await?;
            let body = B::read(&mut inbound).await?;
            let input = input(&inbound, body)?;
            run(api, ServiceCaller { service, context: inbound.context }, input).await
        }
    })
}

pub(super) fn gateway<B: FromBody, F: Future<Output = HandlerResult> + Send + 'static>(
    handler: impl Fn(Arc<Api>, Inbound, B) -> F + Clone + Send + Sync + 'static,
) -> Endpoint {
    Endpoint::new(move |api, mut inbound, _| {
        let handler = handler.clone();
        async move {
            require_secret(&inbound, &api)?;
            let body = B::read(&mut inbound).await?;
            handler(api, inbound, body).await
        }
    })
}
