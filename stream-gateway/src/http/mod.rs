//! The route table: the stream. Not found is a route too, not a rejection, so that its response is made like every other.

mod parameters;
mod stream;

use std::{convert::Infallible, sync::Arc};

use http::Version;
use service_kit::server::PeerAddr;
use warp::{Filter, Reply};

pub use self::stream::Streams;

pub fn routes(
    streams: Arc<Streams>,
) -> impl Filter<Extract = (impl Reply,), Error = Infallible> + Clone + Send + Sync + 'static {
    let query = warp::query::raw().or(warp::any().map(String::new)).unify();
    warp::path!("api" / "messages")
        .and(warp::method())
        .and(warp::header::headers_cloned())
        .and(query)
        .and(warp::ext::get::<PeerAddr>())
        .and(warp::ext::get::<Version>())
        .then(move |method, headers, query: String, PeerAddr(peer), version| {
            let streams = streams.clone();
            async move { streams.answer(method, version, &headers, &query, peer.ip()).await }
        })
        .or(warp::any().and(warp::header::headers_cloned()).map(|headers| stream::not_found(&headers)))
        .unify()
}
