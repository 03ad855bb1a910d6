//! A request, of which the checks read the head first and the body last. The body is bounded in size and time.

use std::{net::IpAddr, pin::Pin, str::FromStr, time::Duration};

use bytes::{Buf, Bytes};
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, Method, header};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, MapAccess, Visitor, value::MapAccessDeserializer},
};
use service_kit::{client_address::ClientAddress, origins::is_cross_site, quality_values::essence};
use tokio::time::timeout;
use warp::Filter;

use super::error::ApiError;
use crate::{domain::device, request_context::RequestContext};

const BODY_TIME: Duration = Duration::from_secs(10);

/// Headers that mark a prefetch: of the standard, and of older Chrome, Safari and Firefox.
const PREFETCH_HEADERS: [&str; 4] = ["sec-purpose", "purpose", "x-purpose", "x-moz"];
const PREFETCH_VALUES: [&str; 3] = ["prefetch", "prerender", "preview"];

type BodyChunks = Pin<Box<dyn Stream<Item = Result<Bytes, warp::Error>> + Send + Sync>>;

pub(super) struct Inbound {
    pub(super) method: Method,
    pub(super) headers: HeaderMap,
    pub(super) context: RequestContext,
    pub(super) client: IpAddr,
    /// Parameters of the path, in the order of its pattern.
    pub(super) parameters: Vec<String>,
    /// Bytes; set by the endpoint.
    pub(super) largest_body: usize,
    query: String,
    body: BodyChunks,
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
            parameters: Vec::new(),
            largest_body: 0,
            query,
            body: boxed(body),
        })
}

fn boxed<B: Buf>(body: impl Stream<Item = Result<B, warp::Error>> + Send + Sync + 'static) -> BodyChunks {
    Box::pin(body.map(|chunk| chunk.map(|mut chunk| chunk.copy_to_bytes(chunk.remaining()))))
}

impl Inbound {
    /// The first query parameter of this name, decoded. An empty one counts as absent.
    pub(super) fn query(&self, name: &str) -> Option<String> {
        form_urlencoded::parse(self.query.as_bytes())
            .find(|(key, value)| key == name && !value.is_empty())
            .map(|(_, value)| value.into_owned())
    }

    /// All query parameters of this name, decoded.
    pub(super) fn queries(&self, name: &str) -> impl Iterator<Item = String> {
        form_urlencoded::parse(self.query.as_bytes())
            .filter(move |(key, _)| key == name)
            .map(|(_, value)| value.into_owned())
    }

    /// The path's first parameter as an id; `None` if malformed.
    pub(super) fn id<T: FromStr>(&self) -> Option<T> {
        self.nth_id(0)
    }

    pub(super) fn nth_id<T: FromStr>(&self, nth: usize) -> Option<T> {
        self.parameters.get(nth)?.parse().ok()
    }

    /// The parameter `limit` of a list.
    pub(super) fn limit(&self, default: i64, largest: i64) -> Result<i64, ApiError> {
        let Some(text) = self.query("limit") else { return Ok(default) };
        let limit = text.parse().ok().filter(|limit| (1..=largest).contains(limit));
        limit.ok_or_else(|| ApiError::unacceptable("limit", format!("Limit must be from 1 to {largest}")))
    }

    pub(super) fn device(&self) -> String {
        device::label(self.headers.get(header::USER_AGENT).map_or(b"", |value| value.as_bytes()))
    }

    /// Whether the user sees the answer now: not for a prefetch, nor for a request that a page of another site caused.
    pub(super) fn is_deliberate(&self) -> bool {
        !is_cross_site(&self.headers) && !is_prefetch(&self.headers)
    }

    pub(super) fn require_json(&self) -> Result<(), ApiError> {
        let value =
            self.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if essence(value).eq_ignore_ascii_case("application/json") {
            Ok(())
        } else {
            Err(ApiError::ContentType)
        }
    }

    /// The whole body.
    pub(super) async fn text(&mut self) -> Result<String, ApiError> {
        let body = timeout(BODY_TIME, self.body()).await.map_err(|_| ApiError::BodyTooSlow)??;
        // The parser does not check text that it skips.
        String::from_utf8(body).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            ApiError::BadBody(format!("The body is not UTF-8 from byte {at} on"))
        })
    }

    pub(super) fn parse<T: DeserializeOwned>(text: &str) -> Result<T, ApiError> {
        serde_json::from_str(text).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            ApiError::BadBody(match error.classify() {
                serde_json::error::Category::Data => {
                    format!("The body does not have the right shape at line {line}, column {column}")
                }
                _ => format!("The body is not JSON at line {line}, column {column}"),
            })
        })
    }

    async fn body(&mut self) -> Result<Vec<u8>, ApiError> {
        let limit = self.largest_body;
        let announced =
            self.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        if announced.is_some_and(|length: u64| length > limit as u64) {
            return Err(ApiError::BodyTooLarge);
        }
        let mut body = Vec::new();
        while let Some(chunk) = self.body.next().await {
            let chunk = chunk.map_err(|_| ApiError::BadBody("The body is incomplete".into()))?;
            if body.len() + chunk.len() > limit {
                return Err(ApiError::BodyTooLarge);
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }
}

fn is_prefetch(headers: &HeaderMap) -> bool {
    let values = PREFETCH_HEADERS.iter().flat_map(|name| headers.get_all(*name));
    // `prefetch;prerender` is one value, `prefetch, other` are two.
    let words = values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split([',', ';']));
    let mut words = words.map(str::trim);
    words.any(|word| PREFETCH_VALUES.iter().any(|value| word.eq_ignore_ascii_case(value)))
}

/// A JSON object. Derived code alone would accept an array of the values as well.
pub(super) struct JsonObject<T>(pub(super) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for JsonObject<T> {
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

pub(super) trait FromBody: Sized + Send + 'static {
    /// Checks the head before the body is read.
    fn require(_: &Inbound) -> Result<(), ApiError> {
        Ok(())
    }

    fn read(inbound: &mut Inbound) -> impl Future<Output = Result<Self, ApiError>> + Send;
}

/// The body is ignored.
pub(super) struct NoBody;

impl FromBody for NoBody {
    async fn read(_: &mut Inbound) -> Result<Self, ApiError> {
        Ok(Self)
    }
}

/// A JSON object.
pub(super) struct Json<T>(pub(super) T);

impl<T: DeserializeOwned + Send + 'static> FromBody for Json<T> {
    fn require(inbound: &Inbound) -> Result<(), ApiError> {
        inbound.require_json()
    }

    async fn read(inbound: &mut Inbound) -> Result<Self, ApiError> {
        let JsonObject(value) = Inbound::parse(&inbound.text().await?)?;
        Ok(Self(value))
    }
}
