//! The route helper over warp: `at(path).get(…).post(…)`. A known path answers other methods with 405 and `Allow`, and HEAD
//! wherever it answers GET.

use std::sync::Arc;

use http::{HeaderValue, Method};
use warp::{Filter, filters::BoxedFilter, path::FullPath, reply::Response};

use super::{Api, HandlerResult, Label, endpoint::Endpoint, error::ApiError, request::inbound};

type Matches = dyn Fn(&str) -> Option<Vec<String>> + Send + Sync;

pub(super) struct Resource {
    label: &'static str,
    parameters: Box<Matches>,
    methods: Vec<(Method, Endpoint)>,
}

/// `{name}` in `pattern` stands for one segment.
pub(super) fn at(pattern: &'static str) -> Resource {
    matching(pattern, move |path| parameters(pattern, path))
}

/// Paths for which `parameters` returns some. `label` names them in logs and metrics.
pub(super) fn matching(
    label: &'static str,
    parameters: impl Fn(&str) -> Option<Vec<String>> + Send + Sync + 'static,
) -> Resource {
    Resource { label, parameters: Box::new(parameters), methods: Vec::new() }
}

impl Resource {
    pub(super) fn get(self, endpoint: Endpoint) -> Self {
        self.method(Method::GET, endpoint)
    }

    pub(super) fn post(self, endpoint: Endpoint) -> Self {
        self.method(Method::POST, endpoint)
    }

    pub(super) fn put(self, endpoint: Endpoint) -> Self {
        self.method(Method::PUT, endpoint)
    }

    pub(super) fn patch(self, endpoint: Endpoint) -> Self {
        self.method(Method::PATCH, endpoint)
    }

    pub(super) fn delete(self, endpoint: Endpoint) -> Self {
        self.method(Method::DELETE, endpoint)
    }

    /// Where `exists` is false, the path is unknown like any other.
    pub(super) fn only_if(self, exists: impl Fn(&[String]) -> bool + Send + Sync + 'static) -> Self {
        let all = self.parameters;
        let some = move |path: &str| all(path).filter(|parameters| exists(parameters));
        Self { parameters: Box::new(some), ..self }
    }

    fn method(mut self, method: Method, endpoint: Endpoint) -> Self {
        self.methods.push((method, endpoint));
        self
    }

    fn endpoint(&self, method: &Method) -> Result<&Endpoint, ApiError> {
        let wanted = if method == Method::HEAD { &Method::GET } else { method };
        let found = self.methods.iter().find(|(method, _)| method == wanted);
        found.map(|(_, endpoint)| endpoint).ok_or_else(|| ApiError::MethodNotAllowed(self.allow()))
    }

    fn allow(&self) -> HeaderValue {
        let names = self.methods.iter().map(|(method, _)| match *method {
            Method::GET => "GET, HEAD",
            ref other => other.as_str(),
        });
        HeaderValue::from_str(&names.collect::<Vec<_>>().join(", ")).expect("methods are ASCII")
    }
}

/// The first resource whose path matches answers; no other path is known.
pub(super) fn routes<const N: usize>(api: &Arc<Api>, resources: [Resource; N]) -> BoxedFilter<(Response,)> {
    let (api, resources) = (api.clone(), Arc::new(resources));
    let answer = move |path: FullPath, mut inbound: super::request::Inbound| {
        let (api, resources) = (api.clone(), resources.clone());
        async move {
            let request_id = inbound.context.request_id.clone();
            let found =
                resources.iter().find_map(|resource| Some((resource, (resource.parameters)(path.as_str())?)));
            let (label, answer): (_, HandlerResult) = match found {
                Some((resource, parameters)) => {
                    inbound.parameters = parameters;
                    let answer = match resource.endpoint(&inbound.method) {
                        Ok(endpoint) => endpoint.answer(api, inbound).await,
                        Err(error) => Err(error),
                    };
                    (resource.label, answer)
                }
                None => ("none", Err(ApiError::NOT_FOUND)),
            };
            let mut response = answer.unwrap_or_else(|error| error.into_response(&request_id));
            response.extensions_mut().insert(Label(label));
            response
        }
    };
    warp::path::full().and(inbound()).then(answer).boxed()
}

/// The segments that stand for the parameters of `pattern`, if `path` matches it. A slash at the end changes nothing.
fn parameters(pattern: &str, path: &str) -> Option<Vec<String>> {
    let path = path.strip_suffix('/').unwrap_or(path);
    let (mut wanted, mut given) = (pattern.split('/'), path.split('/'));
    let mut found = Vec::new();
    loop {
        match (wanted.next(), given.next()) {
            (None, None) => return Some(found),
            (Some(wanted), Some(given)) if wanted.starts_with('{') && !given.is_empty() => {
                found.push(given.to_owned());
            }
            (Some(wanted), Some(given)) if wanted == given => {}
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_matches_its_pattern_segment_by_segment() {
        let found = |pattern, path| {
            parameters(pattern, path)
                .map(|found| found.iter().map(String::as_str).collect::<Vec<_>>().join(" "))
        };
        for (pattern, path, parameters) in [
            ("/api/login", "/api/login", Some("")),
            ("/api/login", "/api/login/", Some("")),
            ("/api/{a}/x/{b}", "/api/1/x/no%2Fid", Some("1 no%2Fid")),
            ("/api/login", "/api/Login", None),
            ("/api/login", "/api", None),
            ("/api/login", "/api/login//", None),
            ("/api/login", "//api/login", None),
            ("/api/{a}", "/api/", None),
            ("/api/{a}", "/api/1/2", None),
            ("/api/{a}/x", "/api//x", None),
        ] {
            assert_eq!(found(pattern, path).as_deref(), parameters, "{pattern} {path}");
        }
    }
}
