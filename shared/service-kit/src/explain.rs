//! `GET /admin/explain?user=&seq=` on the operations listener of both services: whether and how a user received an event. `api` reports
//! the feed, a gateway its delivery; only ids and times, never message text or tokens.

use http::StatusCode;
use serde::Serialize;
use warp::{Filter, Rejection, Reply};

use crate::ops::{json, not_allowed, plain, read};
use protocol::{
    ids::{MessageId, UserId},
    position::Seq,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExplainRequest {
    pub user: UserId,
    pub event: RequestedEvent,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestedEvent {
    Seq(Seq),
    /// The first event of this message; only `api` can find it.
    Message(MessageId),
}

#[derive(Debug)]
pub struct ExplainError(pub StatusCode, pub String);

/// Answers 200 with the explanation as JSON, 400 to a malformed request.
pub fn route<F, E>(
    explain: impl Fn(ExplainRequest) -> F + Clone + Send + Sync + 'static,
) -> impl Filter<Extract = (impl Reply,), Error = Rejection> + Clone + Send + Sync + 'static
where
    F: Future<Output = Result<E, ExplainError>> + Send,
    E: Serialize,
{
    let query = warp::query::raw().or(warp::any().map(String::new)).unify();
    let path = warp::path!("admin" / "explain");
    let get = path.and(read()).and(query).then(move |query: String| {
        let explain = explain.clone();
        async move {
            let explained = match parse(&query) {
                Ok(request) => explain(request).await,
                Err(problem) => Err(ExplainError(StatusCode::BAD_REQUEST, problem.into())),
            };
            match explained {
                Ok(explanation) => json(&explanation),
                Err(ExplainError(status, sentence)) => plain(status, format!("{sentence}\n")),
            }
        }
    });
    get.or(path.map(|| not_allowed("GET, HEAD"))).unify()
}

fn parse(query: &str) -> Result<ExplainRequest, &'static str> {
    let (mut user, mut events) = (None, Vec::new());
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        match &*name {
            "user" if user.is_none() => user = Some(value.parse().map_err(|_| "user must be a user's id")?),
            "seq" => {
                // Postgres holds no larger one.
                let seq = value.parse().ok().filter(|seq| (1..=i64::MAX.cast_unsigned()).contains(seq));
                events.push(RequestedEvent::Seq(seq.ok_or("seq must be an event's number, from 1")?));
            }
            "message" => {
                let message = value.parse().map_err(|_| "message must be a message's id")?;
                events.push(RequestedEvent::Message(message));
            }
            _ => return Err("ask as ?user=<id>&seq=<number>; api also knows ?user=<id>&message=<id>"),
        }
    }
    match (user, events.as_slice()) {
        (Some(user), &[event]) => Ok(ExplainRequest { user, event }),
        _ => Err("ask about one user and one event: ?user=<id>&seq=<number>"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_names_one_user_and_one_event() {
        let about = |event| Ok(ExplainRequest { user: UserId(7), event });
        assert_eq!(parse("user=7&seq=12"), about(RequestedEvent::Seq(12)));
        assert_eq!(parse("message=5&user=7"), about(RequestedEvent::Message(MessageId(5))));
        for bad in "user=7 seq=1 user=7&seq=0 user=7&seq=-1 user=x&seq=1 user=07&seq=1 user=7&seq=1&seq=2 user=7&user=8&seq=1 \
                    user=7&seq=1&message=1 user=7&seq=9223372036854775808 user=7&seq=1&verbose %"
            .split_whitespace()
            .chain([""])
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
