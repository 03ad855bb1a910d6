//! The route table: the stream, and nothing else.

mod auth;
mod stream;

use std::{convert::Infallible, sync::Arc};

use http::StatusCode;
use shared::{problem::Problem, server::PeerAddr};
use warp::{Filter, Rejection, Reply, reply::Response};

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
        .then(move |method, headers, query: String, PeerAddr(peer)| {
            let streams = streams.clone();
            async move { streams.answer(method, &headers, &query, peer).await }
        })
        .recover(not_found)
        .unify()
}

/// Whatever is no route of ours.
async fn not_found(_: Rejection) -> Result<Response, Infallible> {
    let problem = Problem::new(StatusCode::NOT_FOUND, "not_found", "Not found", stream::new_request_id());
    Ok(stream::finish(problem.into_response()))
}
