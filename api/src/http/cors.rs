//! CORS: preflights are answered before all checks, and pages of allowed origins may read every answer, including errors.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::Request;
use service_kit::origins::{Origins, is_preflight};
use tower_service::Service;
use warp::reply::Response;

use super::Label;

const METHODS: &str = "GET, HEAD, POST, PUT, PATCH, DELETE";

#[derive(Clone)]
pub struct Cors<S> {
    routes: S,
    origins: Arc<Origins>,
}

impl<S> Cors<S> {
    pub fn new(routes: S, origins: Arc<Origins>) -> Self {
        Self { routes, origins }
    }
}

impl<S, B> Service<Request<B>> for Cors<S>
where
    S: Service<Request<B>, Response = Response, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.routes.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        if is_preflight(request.method(), request.headers()) {
            let mut response: Response = self.origins.answer_preflight(METHODS, request.headers());
            response.extensions_mut().insert(Label("preflight"));
            return Box::pin(std::future::ready(Ok(response)));
        }
        let origins = self.origins.clone();
        let page = origins.named(request.headers()).cloned();
        let answer = self.routes.call(request);
        Box::pin(async move {
            let Ok(mut response) = answer.await;
            origins.let_read(page.as_ref(), response.headers_mut());
            Ok(response)
        })
    }
}
