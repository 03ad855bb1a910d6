//! A request, read piece by piece as the contract's order of checks wants it: first what its head says, last its body,
//! which is bounded in size and time.

use std::{convert::Infallible, net::IpAddr, pin::Pin, str::FromStr, time::Duration};

use bytes::{Buf, Bytes};
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, Method, header};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, MapAccess, Visitor, value::MapAccessDeserializer},
};
use service_kit::{client_address::ClientAddress, origins::is_cross_site, preference::essence};
use tokio::time::timeout;
use warp::Filter;

use super::error::ApiError;
use crate::{domain::device, request_context::RequestContext};

/// The contract's limit for a client's body.
pub(super) const BODY_LIMIT: usize = 16 * 1024;
/// For a whole body to arrive.
const BODY_TIME: Duration = Duration::from_secs(10);

/// Where browsers say that they fetch ahead: by the standard, and as Chrome, Safari and Firefox did before it.
const SAY_AHEAD: [&str; 4] = ["sec-purpose", "purpose", "x-purpose", "x-moz"];
const AHEAD: [&str; 3] = ["prefetch", "prerender", "preview"];

type Chunks = Pin<Box<dyn Stream<Item = Result<Bytes, warp::Error>> + Send + Sync>>;

pub(super) struct Inbound {
    pub(super) method: Method,
    pub(super) headers: HeaderMap,
    pub(super) context: RequestContext,
    pub(super) client: IpAddr,
    query: String,
    body: Chunks,
}

pub(super) fn inbound() -> impl Filter<Extract = (Inbound,), Error = warp::Rejection> + Copy {
    let query = warp::query::raw().or(warp::any().map(String::new)).unify();
    warp::method()
        .and(warp::header::headers_cloned())
        .and(warp::ext::get::<RequestContext>())
        .and(warp::ext::get::<ClientAddress>())
        .and(query)
        .and(warp::body::stream())
        .map(|method, headers, context, ClientAddress(client), query, body| Inbound {
            method,
            headers,
            context,
            client,
            query,
            body: boxed(body),
        })
}

fn boxed<B: Buf>(body: impl Stream<Item = Result<B, warp::Error>> + Send + Sync + 'static) -> Chunks {
    Box::pin(body.map(|chunk| chunk.map(|mut chunk| chunk.copy_to_bytes(chunk.remaining()))))
}

impl Inbound {
    /// One query parameter, decoded; the first of that name. An empty one is an absent one.
    pub(super) fn query(&self, name: &str) -> Option<String> {
        form_urlencoded::parse(self.query.as_bytes())
            .find(|(key, value)| key == name && !value.is_empty())
            .map(|(_, value)| value.into_owned())
    }

    /// What a session is called that is begun by this request.
    pub(super) fn device(&self) -> String {
        device::label(self.headers.get(header::USER_AGENT).map_or(b"", |value| value.as_bytes()))
    }

    /// Is this for somebody who looks at the answer now? Not what a browser fetches ahead, in case a link is followed, and not
    /// what a page of another site made it fetch.
    pub(super) fn is_deliberate(&self) -> bool {
        !is_cross_site(&self.headers) && !is_fetched_ahead(&self.headers)
    }

    /// 415, before anything is asked about the caller.
    pub(super) fn require_json(&self) -> Result<(), ApiError> {
        let value =
            self.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if essence(value).eq_ignore_ascii_case("application/json") {
            Ok(())
        } else {
            Err(ApiError::ContentType)
        }
    }

    /// The body as JSON: an object of this shape.
    pub(super) async fn json<T: DeserializeOwned>(&mut self, limit: usize) -> Result<T, ApiError> {
        let body = timeout(BODY_TIME, self.body(limit)).await.map_err(|_| ApiError::BodyTooSlow)??;
        // Text that is skipped while parsing would not be looked at.
        let text = std::str::from_utf8(&body).map_err(|error| {
            ApiError::BadBody(format!("The body is not UTF-8 from byte {} on", error.valid_up_to()))
        })?;
        serde_json::from_str::<Object<T>>(text).map(|object| object.0).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            ApiError::BadBody(match error.classify() {
                serde_json::error::Category::Data => {
                    format!("The body does not have the right shape at line {line}, column {column}")
                }
                _ => format!("The body is not JSON at line {line}, column {column}"),
            })
        })
    }

    async fn body(&mut self, limit: usize) -> Result<Vec<u8>, ApiError> {
        let announced =
            self.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        if announced.is_some_and(|length: u64| length > limit as u64) {
            return Err(ApiError::BodyTooLarge);
        }
        let mut body = Vec::new();
        while let Some(chunk) = self.body.next().await {
            let chunk = chunk.map_err(|_| ApiError::BadBody("The body broke off".into()))?;
            if body.len() + chunk.len() > limit {
                return Err(ApiError::BodyTooLarge);
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }
}

fn is_fetched_ahead(headers: &HeaderMap) -> bool {
    let values = SAY_AHEAD.iter().flat_map(|name| headers.get_all(*name));
    // `prefetch;prerender` is one value, `prefetch, other` are two.
    let words = values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split([',', ';']));
    let mut words = words.map(str::trim);
    words.any(|word| AHEAD.iter().any(|ahead| word.eq_ignore_ascii_case(ahead)))
}

/// A JSON object. Derived code alone would take an array of the values as well.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Members<T> {
            type Value = T;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, members: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(members))
            }
        }
        deserializer.deserialize_map(Members(std::marker::PhantomData)).map(Self)
    }
}

/// An id in a path. One that is no id is part of a known path all the same, and is answered like one that does not exist.
pub(super) struct PathId<T>(Option<T>);

impl<T: FromStr> FromStr for PathId<T> {
    type Err = Infallible;

    fn from_str(segment: &str) -> Result<Self, Infallible> {
        Ok(Self(segment.parse().ok()))
    }
}

impl<T> PathId<T> {
    pub(super) fn or(self, missing: ApiError) -> Result<T, ApiError> {
        self.0.ok_or(missing)
    }
}
