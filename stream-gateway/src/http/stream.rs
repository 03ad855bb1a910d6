//! `GET /api/messages`: authenticates, admits, and hands the socket to the engine.
//!
//! Until the token and `Accept` are checked, errors are statuses. Afterwards the status is 200, and a rejection is a `goodbye`
//! in band, because a browser's `EventSource` gives up permanently on any other status.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use protocol::{
    claims::KeyName,
    external::ExternalClaims,
    ids::{SessionId, UserId},
    position::Position,
    problem::Problem,
};
use rand::RngExt;
use service_kit::{
    client_address::TrustedProxies,
    cookies::Cookies,
    ended_sessions::EndedSessions,
    http::{request_id, set_common_headers},
    limiter::Subject,
    origins::{OriginNotAllowed, Origins, is_preflight},
    quality_values::weight,
    server,
};
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    sync::{
        Semaphore,
        mpsc::{self, error::TrySendError},
    },
    time::timeout,
};
use warp::reply::Response;

use super::parameters::{heartbeat, last_event_id, presented};
use crate::{
    engine::{NewStream, Resume},
    frame::{self, FIRST_RETRY, Framing, Goodbye},
    identities::Identities,
    keys::{Keys, VerifiedClaims, VerifiedToken, VerifyError},
    limits::{Permit, StreamLimits},
    metrics::{Code, Metrics, Reason},
};

/// Bytes of a usual head, with its `retry`.
const HEAD_CAPACITY: usize = 512;
/// For writing a head into an empty socket.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

pub struct Streams {
    pub keys: Arc<Keys>,
    pub identities: Arc<Identities>,
    pub limits: Arc<StreamLimits>,
    pub ended: EndedSessions,
    pub metrics: Arc<Metrics>,
    pub origins: Origins,
    pub cookies: Cookies,
    pub trusted_proxies: TrustedProxies,
    pub max_age: Duration,
    pub new_streams: mpsc::Sender<NewStream>,
    /// Permits for goodbyes that wait for the client to close; without one, a goodbye is a single write.
    pub rejecting: Arc<Semaphore>,
    /// Set when the drain begins.
    pub draining: AtomicBool,
}

impl Streams {
    pub async fn answer(
        &self,
        method: Method,
        version: Version,
        headers: &HeaderMap,
        query: &str,
        peer: IpAddr,
    ) -> Response {
        let request_id = request_id(headers);
        let client = self.trusted_proxies.client(peer, headers);
        if is_preflight(&method, headers) {
            return self.origins.answer_preflight("GET", headers);
        }
        let origin = self.origins.named(headers);
        let mut response = match method {
            Method::GET => match self.open(version, headers, query, client, &request_id, origin).await {
                Ok(response) => return response,
                Err(error) => self.error(&error, &request_id),
            },
            _ => self.error(&StreamError::Method, &request_id),
        };
        self.origins.let_read(origin, response.headers_mut());
        response
    }

    async fn open(
        &self,
        version: Version,
        headers: &HeaderMap,
        query: &str,
        client: IpAddr,
        request_id: &str,
        origin: Option<&HeaderValue>,
    ) -> Result<Response, StreamError> {
        let presented = presented(headers, query, &self.cookies).ok_or(StreamError::Unauthorized)?;
        let principal = match self.keys.verify(&presented.tokens).await {
            Ok(verified) => self.first_live(verified),
            Err(VerifyError::Token(reason)) => {
                tracing::debug!(%client, request.id = request_id, %reason, "stream request rejected: unauthorized");
                return Err(StreamError::Unauthorized);
            }
            Err(VerifyError::NoKeys) => None,
        };
        if presented.from_cookie {
            self.origins.check_cookie(&Method::GET, headers).map_err(StreamError::Origin)?;
        }
        if !accepts_event_stream(headers) {
            return Err(StreamError::NotAcceptable);
        }
        let head = self.head(version, request_id, origin);
        let Some(principal) = principal else {
            return Ok(self.reject(head, "no_keys", Goodbye::Drain));
        };
        if self.draining.load(Ordering::Relaxed) {
            return Ok(self.reject(head, "drain", Goodbye::Drain));
        }
        if let Some((user, session)) = self.ended(&principal) {
            tracing::debug!(user.id = %user, session.id = %session, %client, "stream rejected: its session has ended");
            return Ok(self.reject(head, "revoked", Goodbye::Revoked));
        }
        match self.limits.admit(principal.who.counted(), client).await {
            Ok(permit) => Ok(self.hand_off(principal, headers, query, head, permit)),
            Err(full) => {
                tracing::debug!(user.id = principal.who.user().map(display), %client, limit = full.as_str(), "stream rejected: over a limit; the client retries later");
                Ok(self.reject(head, full.as_str(), Goodbye::Busy))
            }
        }
    }

    #[expect(clippy::disallowed_methods, reason = "one connection, for a few seconds at most")]
    fn hand_off(
        &self,
        principal: Principal,
        headers: &HeaderMap,
        query: &str,
        ResponseHead { mut bytes, framing }: ResponseHead,
        permit: Permit,
    ) -> Response {
        let resume = match last_event_id(headers, query) {
            None => Resume::Head,
            Some(text) => {
                let cursor = std::str::from_utf8(&text).ok().and_then(|text| text.parse::<Position>().ok());
                cursor.map_or(Resume::Invalid, Resume::After)
            }
        };
        let (lasts, ends_why) = lifetime(principal.ends_at, SystemTime::now(), self.max_age);
        let ends = Instant::now() + lasts;
        let (session, key) = (principal.session, principal.key);
        let heartbeat = heartbeat(query);
        bytes.extend(framing.bytes(&frame::retry(rand::rng().random_range(FIRST_RETRY))));
        let new_streams = self.new_streams.clone();
        let metrics = self.metrics.clone();
        let admit = move |socket: std::net::TcpStream, user: UserId, head: Bytes| {
            let stream = NewStream {
                socket,
                user,
                session,
                key,
                resume,
                heartbeat,
                framing,
                head,
                ends,
                ends_why,
                permit,
            };
            if let Err(rejected) = new_streams.try_send(stream) {
                let (stream, limit, why) = match rejected {
                    TrySendError::Full(stream) => (stream, "queue_full", Goodbye::Busy),
                    TrySendError::Closed(stream) => (stream, "drain", Goodbye::Drain),
                };
                metrics.streams_rejected.get_or_create(&Reason { reason: limit }).inc();
                write_goodbye(&stream.socket, &stream.head, framing, why);
            }
        };
        let subject = match principal.who {
            Who::User(user) => {
                return server::hand_off(move |socket| admit(socket, user, bytes.into()));
            }
            Who::Subject(claims) => claims,
        };
        // The head is written immediately, even if `api` is down; the user is looked up meanwhile.
        let (identities, metrics) = (self.identities.clone(), self.metrics.clone());
        server::hand_off(move |socket| {
            let Ok(mut socket) = TcpStream::from_std(socket) else { return };
            tokio::spawn(async move {
                let written = timeout(HEAD_TIMEOUT, socket.write_all(&bytes)).await;
                let user = identities.user_of(&subject).await;
                let (Ok(Ok(())), Ok(socket)) = (written, socket.into_std()) else { return };
                if let Some(user) = user {
                    admit(socket, user, Bytes::new());
                } else {
                    metrics.streams_rejected.get_or_create(&Reason { reason: "no_identity" }).inc();
                    write_goodbye(&socket, b"", framing, Goodbye::Busy);
                }
            });
        })
    }

    /// Of several valid tokens, the first whose session is not known to have ended, else the first.
    fn first_live(&self, verified: Vec<VerifiedToken>) -> Option<Principal> {
        let mut principals: Vec<_> = verified.into_iter().map(|token| self.principal(token)).collect();
        let live = principals.iter().position(|principal| self.ended(principal).is_none());
        (!principals.is_empty()).then(|| principals.swap_remove(live.unwrap_or(0)))
    }

    fn ended(&self, principal: &Principal) -> Option<(UserId, SessionId)> {
        let (Who::User(user), Some(session)) = (&principal.who, principal.session) else { return None };
        self.ended.contains(*user, session).then_some((*user, session))
    }

    fn principal(&self, VerifiedToken { claims, key }: VerifiedToken) -> Principal {
        match claims {
            VerifiedClaims::Own(claims) => {
                let ends_at = claims.stream_ends_at();
                Principal { who: Who::User(claims.sub), session: claims.sid, key, ends_at }
            }
            VerifiedClaims::External(claims) => {
                let ends_at = claims.exp;
                let who = self.identities.known(&claims).map_or(Who::Subject(claims), Who::User);
                Principal { who, session: None, key, ends_at }
            }
        }
    }

    /// 200 with a `goodbye`, and the end of the body.
    #[expect(clippy::disallowed_methods, reason = "one connection, for a few seconds at most")]
    fn reject(
        &self,
        ResponseHead { mut bytes, framing }: ResponseHead,
        limit: &'static str,
        why: Goodbye,
    ) -> Response {
        self.metrics.streams_rejected.get_or_create(&Reason { reason: limit }).inc();
        let permit = self.rejecting.clone().try_acquire_owned();
        server::hand_off(move |socket| {
            let Ok(permit) = permit else { return write_goodbye(&socket, &bytes, framing, why) };
            let Ok(mut socket) = TcpStream::from_std(socket) else { return };
            bytes.extend(closing_bytes(framing, why));
            tokio::spawn(async move {
                use tokio::io::{AsyncReadExt, AsyncWriteExt};
                let goodbye = async {
                    socket.write_all(&bytes).await?;
                    socket.shutdown().await?;
                    // Closing with unread input would make the kernel discard what the client has not read yet.
                    let mut ignored = [0; 1_024];
                    for _ in 0..64 {
                        if socket.read(&mut ignored).await? == 0 {
                            break;
                        }
                    }
                    std::io::Result::Ok(())
                };
                let _ = timeout(Duration::from_secs(2), goodbye).await;
                drop(permit);
            });
        })
    }

    fn error(&self, error: &StreamError, request_id: &str) -> Response {
        let (status, code, message) = match error {
            StreamError::Method => {
                (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "Method not allowed".into())
            }
            StreamError::Unauthorized => (StatusCode::UNAUTHORIZED, "unauthorized", "Unauthorized".into()),
            StreamError::Origin(why) => (StatusCode::FORBIDDEN, OriginNotAllowed::CODE, why.to_string()),
            StreamError::NotAcceptable => (
                StatusCode::NOT_ACCEPTABLE,
                "not_acceptable",
                "This endpoint requires an EventSource connection".into(),
            ),
        };
        self.metrics.stream_request_errors.get_or_create(&Code { code }).inc();
        let mut problem = Problem::new(status, code, message, request_id);
        if let StreamError::NotAcceptable = error {
            problem.detail = Some("Send the header Accept: text/event-stream".into());
        }
        let mut response: Response = problem.into_response();
        match error {
            StreamError::Method => {
                response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET"))
            }
            StreamError::Unauthorized => {
                response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))
            }
            StreamError::Origin(_) | StreamError::NotAcceptable => None,
        };
        response
    }

    fn head(&self, version: Version, request_id: &str, origin: Option<&HeaderValue>) -> ResponseHead {
        let framing = Framing::of(version);
        let mut headers = HeaderMap::new();
        for (name, value) in [
            (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
            (header::CACHE_CONTROL, "no-cache, no-transform"),
            (HeaderName::from_static("x-accel-buffering"), "no"),
            (header::CONNECTION, "close"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        if let Framing::Chunked = framing {
            headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        let ascii = |text: &str| HeaderValue::from_str(text).expect("ids and dates are visible ASCII");
        headers.insert(header::DATE, ascii(&httpdate::fmt_http_date(SystemTime::now())));
        set_common_headers(&mut headers, ascii(request_id));
        self.origins.let_read(origin, &mut headers);
        let mut bytes = Vec::with_capacity(HEAD_CAPACITY);
        bytes.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
        for (name, value) in &headers {
            for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
                bytes.extend_from_slice(part);
            }
        }
        bytes.extend_from_slice(b"\r\n");
        ResponseHead { bytes, framing }
    }
}

/// The owner of the token, and how long the token allows the stream.
struct Principal {
    who: Who,
    session: Option<SessionId>,
    /// The key that signed the token.
    key: KeyName,
    /// Seconds since 1970.
    ends_at: i64,
}

enum Who {
    User(UserId),
    /// Of the external issuer; the user is not known here yet.
    Subject(ExternalClaims),
}

impl Who {
    /// Rate limits count by user or, until that is known, by subject.
    fn counted(&self) -> Subject<'_> {
        match self {
            Self::User(user) => Subject::User(*user),
            Self::Subject(claims) => Subject::Name(&claims.sub),
        }
    }

    /// If known.
    fn user(&self) -> Option<UserId> {
        if let Self::User(user) = self { Some(*user) } else { None }
    }
}

enum StreamError {
    Method,
    Unauthorized,
    Origin(OriginNotAllowed),
    NotAcceptable,
}

pub(super) fn not_found(headers: &HeaderMap) -> Response {
    Problem::new(StatusCode::NOT_FOUND, "not_found", "Not found", request_id(headers)).into_response()
}

fn accepts_event_stream(headers: &HeaderMap) -> bool {
    weight(headers, header::ACCEPT, "text/event-stream").is_some_and(|weight| weight > 0)
}

struct ResponseHead {
    bytes: Vec<u8>,
    framing: Framing,
}

/// Lifetime of a stream: until the last minute before its token expires, or a random age, whichever comes first.
fn lifetime(ends_at: i64, now: SystemTime, max_age: Duration) -> (Duration, Goodbye) {
    /// Never after the token expires: a quarter second for the wheel, half a second for a goodbye into a full socket.
    const MARGIN: f64 = 1.0;
    const LAST: f64 = 60.0;
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let left = (ends_at as f64 - now - MARGIN).max(0.0);
    let mut rng = rand::rng();
    let expires_in = left - rng.random_range(0.0..=LAST.min(left / 2.0));
    let rotates_in = max_age.as_secs_f64() * rng.random_range(0.5..=1.0);
    if expires_in <= rotates_in {
        (Duration::from_secs_f64(expires_in), Goodbye::Expired)
    } else {
        (Duration::from_secs_f64(rotates_in), Goodbye::Rotate)
    }
}

fn closing_bytes(framing: Framing, why: Goodbye) -> Bytes {
    framing.last(&frame::goodbye(why, rand::rng().random_range(why.retry())))
}

/// One write without waiting: the socket's buffer is empty.
fn write_goodbye(mut socket: &std::net::TcpStream, head: &[u8], framing: Framing, why: Goodbye) {
    use std::io::Write;
    let _ = socket.write_all(&[head, &closing_bytes(framing, why)].concat());
    let _ = socket.shutdown(std::net::Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use protocol::claims::{Audience, Claims};

    use super::*;

    fn claims(exp: i64) -> Claims {
        Claims {
            sub: UserId(1),
            sid: Some(SessionId(1)),
            iat: 0,
            exp,
            aud: Audience::Api,
            iss: String::new(),
            session_exp: None,
        }
    }

    #[test]
    fn a_stream_ends_in_the_last_minute_before_its_token_does() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let age = Duration::from_secs(1_000_000);
        for _ in 0..1_000 {
            let (lasts, why) = lifetime(2_000, now, age);
            assert_eq!(why, Goodbye::Expired);
            assert!((939.0..1_000.0).contains(&lasts.as_secs_f64()), "{lasts:?}");
            let (short, _) = lifetime(1_010, now, age);
            assert!((4.0..10.0).contains(&short.as_secs_f64()), "{short:?}");
            assert_eq!(lifetime(999, now, age).0, Duration::ZERO);
        }
    }

    #[test]
    fn a_stream_token_bounds_the_stream_by_its_session() {
        let claims = Claims { session_exp: Some(5_000), ..claims(1_060) };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        assert!(
            lifetime(claims.stream_ends_at(), now, Duration::from_secs(1_000_000)).0
                > Duration::from_mins(65)
        );
    }

    #[test]
    fn a_stream_ends_at_a_random_age() {
        let age = Duration::from_secs(100);
        let ages: Vec<_> = (0..100).map(|_| lifetime(i64::MAX, SystemTime::now(), age)).collect();
        assert!(
            ages.iter().all(|(lasts, why)| (50..=100).contains(&lasts.as_secs()) && *why == Goodbye::Rotate)
        );
        assert!(ages.iter().any(|(lasts, _)| lasts.as_secs() < 70));
    }

    #[test]
    fn accept_must_name_the_event_stream() {
        let accepts = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, value.parse().unwrap());
            accepts_event_stream(&headers)
        };
        assert!(["text/event-stream", "text/html, Text/Event-Stream;q=0.9"].into_iter().all(accepts));
        let rejected = [
            "*/*",
            "text/*",
            "text/event-streams",
            "",
            "text/event-stream;q=0",
            "text/event-stream; q=0.0, */*",
        ];
        assert!(!rejected.into_iter().any(accepts));
    }
}
