//! Questions to Postgres, by way of `api`'s internal listener: where does a feed end, and what follows a place?
//!
//! Questions of many users are put into one request, so fifty thousand reconnects are a hundred requests. Every request is
//! answered in the end: while `api` cannot be reached they wait here and are retried. What may wait is bounded by the
//! requester, who has one request per connection and one per user; [`Backfill::retain`] drops those whose requester is gone.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    future::pending,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::{StreamExt, stream::FuturesUnordered};
use http::{Method, Request, Response, StatusCode, header};
use protocol::{
    event::Envelope,
    feed::{
        self, HeadsAnswer, HeadsRequest, KnownHead, Login, MAX_PAIRS, Range, RangeAfter, RangesAnswer,
        RangesRequest,
    },
    ids::{SessionId, UserId},
    keys_version::KeysVersion,
    position::{Position, Seq},
};
use serde::{Serialize, de::DeserializeOwned};
use service_kit::{
    backoff::Backoff,
    outbound::{Limits, Outbound},
    secrets::Secrets,
    traces::Tracer,
};
use tokio::{
    runtime::Handle,
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};

use crate::{
    frame::Event,
    metrics::{DeliveryPath, Kind, Metrics},
    trace,
};

/// How long a first request waits for others to share its request.
const GATHER: Duration = Duration::from_millis(2);
/// Requests of one kind that are under way at once. Each kind has its own, so that neither waits for the other: a session is
/// checked while many feeds are read.
const MAX_BATCHES: usize = 3;
const TIMEOUT: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Requests of all kinds in flight, those for keys and identities included.
const IN_FLIGHT: usize = 64;
/// An answer holds some 4,000 events of some 4 KiB at most.
const MAX_ANSWER: usize = 32 << 20;
/// The first pause after a failure, and the longest.
const BACKOFF: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(2)];

/// While a rotation is half done, or done wrongly, each request may be refused.
const REFUSALS_LOGGED_EVERY: Duration = Duration::from_mins(1);

/// `api`'s internal listener.
#[derive(Clone)]
pub struct ApiClient {
    outbound: Outbound,
    base: String,
    secrets: Secrets,
    refused: Arc<Mutex<RefusedState>>,
    metrics: Arc<Metrics>,
}

/// With so many idle connections.
fn outbound(idle: usize) -> Outbound {
    Outbound::plaintext(Limits {
        time: TIMEOUT,
        connect: CONNECT_TIMEOUT,
        body: MAX_ANSWER,
        in_flight: IN_FLIGHT,
        idle,
    })
}

/// Whether `api` refuses us, and what of it was logged.
#[derive(Default)]
struct RefusedState {
    now: bool,
    logged: Option<Instant>,
}

impl ApiClient {
    pub fn new(base: &str, secrets: Secrets, metrics: Arc<Metrics>) -> Self {
        let outbound = outbound(2 * MAX_BATCHES);
        Self { outbound, base: base.into(), secrets, refused: Arc::default(), metrics }
    }

    /// The same, with each request on a connection of its own: any replica may answer, not only those asked before.
    pub fn asking_any_replica(&self) -> Self {
        Self { outbound: outbound(0), ..self.clone() }
    }

    pub async fn get<A: DeserializeOwned>(&self, path: &str) -> anyhow::Result<A> {
        self.send(Method::GET, path, Bytes::new()).await
    }

    pub async fn post<A: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<A> {
        self.send(Method::POST, path, serde_json::to_vec(body)?.into()).await
    }

    async fn send<A: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<A> {
        let authorized = self.authorized(method, path, body);
        let response = timeout(TIMEOUT, authorized).await.context("api did not answer in time")??;
        let status = response.status();
        anyhow::ensure!(status == StatusCode::OK, "api answered {status} to {path}");
        serde_json::from_slice(response.body()).context("api's answer is of no known form")
    }

    /// By the first secret that `api` accepts: during a rotation it may not know the first one yet, or know another only.
    async fn authorized(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<Response<Bytes>> {
        for secret in self.secrets.iter() {
            let request = Request::builder()
                .method(&method)
                .uri(format!("{}{path}", self.base))
                .header(header::AUTHORIZATION, feed::authorization(secret))
                .header(header::CONTENT_TYPE, "application/json")
                .body(body.clone())?;
            let response = self.outbound.send(request).await.context("api gave no answer")?;
            if response.status() != StatusCode::UNAUTHORIZED {
                self.note_refused(false);
                return Ok(response);
            }
            self.metrics.api_unauthorized.inc();
            self.note_refused(true);
        }
        anyhow::bail!("api refuses every secret of INTERNAL_SECRET (401 to {path})")
    }

    fn note_refused(&self, refused: bool) {
        let mut state = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        state.now = refused;
        if refused && state.logged.is_none_or(|logged| logged.elapsed() > REFUSALS_LOGGED_EVERY) {
            state.logged = Some(Instant::now());
            tracing::error!(
                secrets = self.secrets.iter().count(),
                "api refused a secret of INTERNAL_SECRET; trying the others; compare the setting of both services"
            );
        }
    }

    /// Whether `api` refuses all secrets, as of the last request.
    pub fn is_refused(&self) -> bool {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).now
    }
}

/// What follows a place?
#[derive(Debug, Clone, Copy)]
pub struct RangeRequest<A> {
    pub user: UserId,
    pub after: Seq,
    /// Who gets the answer.
    pub requester: A,
    /// By which way its events come to whoever gets them.
    pub path: DeliveryPath,
    /// The user's place in this process when the request was asked.
    pub requested_at: Option<Position>,
}

#[derive(Debug)]
pub struct RangeAnswer {
    pub head: Option<Position>,
    pub events: Vec<Event>,
    pub more: bool,
}

/// Where does a feed end?
#[derive(Debug, Clone, Copy)]
pub struct HeadRequest {
    pub user: UserId,
    pub requested_at: Option<Position>,
    pub why: HeadReason,
    /// A session by which this user is said to be here: is it theirs, and does it live?
    pub session: Option<SessionId>,
}

impl HeadRequest {
    pub fn login(&self) -> Option<Login> {
        self.session.map(|session| Login { user: self.user, session })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadReason {
    /// The sequencer does not know its place.
    Position,
    /// A connection came: is its session still good?
    Join,
    /// The regular look at everybody, or the one after a doubt.
    Reconcile,
}

#[derive(Debug)]
pub struct HeadsAnswered {
    /// Which request this answers; see [`Backfill::head_requests`].
    pub batch: u32,
    pub requests: Vec<HeadRequest>,
    /// Those that differ from what was asked about.
    pub heads: HashMap<UserId, Option<Position>>,
    pub ended: HashSet<Login>,
    /// Which keys the replica has that answered.
    pub keys: KeysVersion,
}

pub enum Answers<A> {
    Ranges(Vec<(RangeRequest<A>, RangeAnswer)>),
    Heads(HeadsAnswered),
}

type Finished<A> = (Result<Answers<A>, Failed<A>>, Instant);

/// The requests_ come back, to be asked again.
enum Failed<A> {
    Ranges(Vec<RangeRequest<A>>),
    Heads(Vec<HeadRequest>),
}

pub struct Backfill<A> {
    api: ApiClient,
    /// Requests and the parsing of answers run there, not where events are delivered.
    workers: Handle,
    tracer: Tracer,
    metrics: Arc<Metrics>,
    ranges: VecDeque<RangeRequest<A>>,
    heads: VecDeque<HeadRequest>,
    in_flight: FuturesUnordered<JoinHandle<Finished<A>>>,
    range_batches_in_flight: usize,
    head_batches_in_flight: usize,
    /// Requests about heads that were sent so far.
    head_batches: u32,
    /// Until when requests_ gather to share a request.
    gather_until: Instant,
    /// Until when `api` is left alone after a failure.
    paused_until: Instant,
    /// Zero while `api` answers.
    pause: Duration,
    backoff: Backoff,
}

impl<A: Copy + Send + 'static> Backfill<A> {
    pub fn new(api: ApiClient, workers: Handle, tracer: Tracer, metrics: Arc<Metrics>) -> Self {
        Self {
            api,
            workers,
            tracer,
            metrics,
            ranges: VecDeque::new(),
            heads: VecDeque::new(),
            in_flight: FuturesUnordered::new(),
            range_batches_in_flight: 0,
            head_batches_in_flight: 0,
            head_batches: 0,
            gather_until: Instant::now(),
            paused_until: Instant::now(),
            pause: Duration::ZERO,
            backoff: Backoff::new(BACKOFF[0], BACKOFF[1]),
        }
    }

    pub fn request_range(&mut self, request: RangeRequest<A>) {
        self.gather();
        self.ranges.push_back(request);
    }

    pub fn request_head(&mut self, request: HeadRequest) {
        self.gather();
        self.heads.push_back(request);
    }

    /// How many requests about heads were sent so far. What is asked from now on is in a later one. The number wraps around.
    pub fn head_batches(&self) -> u32 {
        self.head_batches
    }

    /// Whether `api` fails to answer at present.
    pub fn failing(&self) -> bool {
        self.pause > Duration::ZERO
    }

    /// Drops waiting requests_ that nobody wants answered any more.
    pub fn retain(
        &mut self,
        range: impl FnMut(&RangeRequest<A>) -> bool,
        head: impl FnMut(&HeadRequest) -> bool,
    ) {
        self.ranges.retain(range);
        self.heads.retain(head);
    }

    /// The next answers. Waits for ever when nothing was asked; may be dropped and called again at any point.
    pub async fn next(&mut self) -> Answers<A> {
        loop {
            self.launch();
            let may_launch = self.may_request_ranges() || self.may_request_heads();
            let not_before = self.not_before();
            tokio::select! {
                Some(done) = self.in_flight.next() => {
                    let (result, started) = match done {
                        Ok(done) => done,
                        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                        Err(_) => pending().await, // Cancelled: the process is ending.
                    };
                    match &result {
                        Ok(Answers::Ranges(_)) | Err(Failed::Ranges(_)) => self.range_batches_in_flight -= 1,
                        Ok(Answers::Heads(_)) | Err(Failed::Heads(_)) => self.head_batches_in_flight -= 1,
                    }
                    match result {
                        Ok(answers) => {
                            self.pause = Duration::ZERO;
                            self.backoff.reset();
                            return answers;
                        }
                        Err(failed) => self.put_back(failed, started),
                    }
                }
                () = sleep_until(not_before), if may_launch => {}
                () = pending(), if !may_launch && self.in_flight.is_empty() => {}
            }
        }
    }

    fn gather(&mut self) {
        if self.ranges.is_empty() && self.heads.is_empty() {
            self.gather_until = Instant::now() + GATHER;
        }
    }

    fn not_before(&self) -> Instant {
        self.gather_until.max(self.paused_until)
    }

    fn may_request_ranges(&self) -> bool {
        !self.ranges.is_empty() && self.range_batches_in_flight < MAX_BATCHES
    }

    fn may_request_heads(&self) -> bool {
        !self.heads.is_empty() && self.head_batches_in_flight < MAX_BATCHES
    }

    #[expect(clippy::disallowed_methods, reason = "the delivery thread awaits it")]
    fn launch(&mut self) {
        let started = Instant::now();
        if started < self.not_before() {
            return;
        }
        while self.may_request_ranges() {
            self.range_batches_in_flight += 1;
            let batch: Vec<_> = self.ranges.drain(..self.ranges.len().min(MAX_PAIRS)).collect();
            self.count("ranges", batch.len());
            let (api, tracer, metrics) = (self.api.clone(), self.tracer.clone(), self.metrics.clone());
            self.in_flight.push(
                self.workers
                    .spawn(async move { (request_ranges(&api, batch, &tracer, &metrics).await, started) }),
            );
        }
        while self.may_request_heads() {
            self.head_batches_in_flight += 1;
            self.head_batches = self.head_batches.wrapping_add(1);
            let number = self.head_batches;
            let batch: Vec<_> = self.heads.drain(..self.heads.len().min(MAX_PAIRS)).collect();
            self.count("heads", batch.len());
            let api = self.api.clone();
            self.in_flight
                .push(self.workers.spawn(async move { (request_heads(&api, number, batch).await, started) }));
        }
    }

    fn count(&self, kind: &'static str, users: usize) {
        self.metrics.backfill_requests.get_or_create(&Kind { kind }).inc_by(users as u64);
    }

    /// Several requests that fail together count as one failure: those that began before the pause prove nothing new.
    fn put_back(&mut self, failed: Failed<A>, started: Instant) {
        let (kind, users) = match failed {
            Failed::Ranges(batch) => {
                let users = batch.len();
                batch.into_iter().rev().for_each(|request| self.ranges.push_front(request));
                ("ranges", users)
            }
            Failed::Heads(batch) => {
                let users = batch.len();
                batch.into_iter().rev().for_each(|request| self.heads.push_front(request));
                ("heads", users)
            }
        };
        self.metrics.backfill_requests_failed.get_or_create(&Kind { kind }).inc_by(users as u64);
        if started >= self.paused_until {
            self.pause = self.backoff.next_delay();
        }
        self.paused_until = Instant::now() + self.pause;
    }
}

async fn request_ranges<A: Copy>(
    api: &ApiClient,
    batch: Vec<RangeRequest<A>>,
    tracer: &Tracer,
    metrics: &Metrics,
) -> Result<Answers<A>, Failed<A>> {
    let pairs = batch.iter().map(|request| RangeAfter { user: request.user, after: request.after }).collect();
    let answer = api.post::<RangesAnswer>(feed::RANGES_PATH, &RangesRequest { ranges: pairs }).await;
    let answer = answer.and_then(|answer| {
        let matches = answer.ranges.len() == batch.len()
            && batch.iter().zip(&answer.ranges).all(|(q, a)| (q.user, q.after) == (a.user, a.after));
        anyhow::ensure!(matches, "api answered other ranges than were asked for");
        Ok(answer)
    });
    match answer {
        Ok(answer) => {
            let answers = batch.into_iter().zip(answer.ranges).map(|(request, mut range)| {
                let possible = possible(&range);
                if possible < range.events.len() {
                    tracing::error!(user.id = %range.user, after = range.after, "api answered a range that cannot be");
                    range.events.truncate(possible);
                    range.more = true;
                }
                let (events, whole) = encode(range.user, range.events, request.path, tracer, metrics);
                (request, RangeAnswer { head: range.head, events, more: range.more || !whole })
            });
            Ok(Answers::Ranges(answers.collect()))
        }
        Err(error) => {
            tracing::warn!(
                error = format!("{error:#}"),
                users = batch.len(),
                "cannot read feeds; trying again"
            );
            Err(Failed::Ranges(batch))
        }
    }
}

/// How many of the events can be: of the feed that the head is of, behind the place, without holes, up to the head. The first
/// may be any: older ones are perhaps no longer kept. One damaged feed must not keep the others of its request waiting, so
/// what cannot be is cut off here, and who needs it is told to reload.
fn possible(range: &Range) -> usize {
    let Some(head) = range.head else { return 0 };
    let mut last = None;
    let fits = |event: &&Envelope| {
        let follows =
            last.map_or(event.seq > range.after, |last: Seq| last.checked_add(1) == Some(event.seq));
        last = Some(event.seq);
        follows && event.epoch == head.epoch && event.seq <= head.seq
    };
    range.events.iter().take_while(fits).count()
}

/// Up to the first event that this build cannot pass on. A reader that needs it is told to reload.
fn encode(
    user: UserId,
    envelopes: Vec<Envelope>,
    path: DeliveryPath,
    tracer: &Tracer,
    metrics: &Metrics,
) -> (Vec<Event>, bool) {
    let mut events = Vec::with_capacity(envelopes.len());
    for envelope in envelopes {
        match trace::receive(tracer, user, &envelope, path) {
            Ok(event) => events.push(event),
            Err(error) => {
                metrics.backfill_requests_failed.get_or_create(&Kind { kind: "encode" }).inc();
                tracing::error!(%error, user.id = %user, event.seq = envelope.seq, "an event of the feed cannot be sent");
                return (events, false);
            }
        }
    }
    (events, true)
}

async fn request_heads<A>(
    api: &ApiClient,
    number: u32,
    batch: Vec<HeadRequest>,
) -> Result<Answers<A>, Failed<A>> {
    let request = HeadsRequest {
        users: batch.iter().map(|q| KnownHead { user: q.user, head: q.requested_at }).collect(),
        logins: batch.iter().filter_map(HeadRequest::login).collect(),
    };
    let answer = api.post::<HeadsAnswer>(feed::HEADS_PATH, &request).await.and_then(|answer| {
        let heads: HashMap<_, _> = answer.heads.into_iter().map(|head| (head.user, head.head)).collect();
        let whole = batch.iter().all(|q| q.requested_at.is_some() || heads.contains_key(&q.user));
        anyhow::ensure!(whole, "api left out heads that were asked for");
        Ok((heads, answer.ended_logins.into_iter().collect(), answer.keys))
    });
    match answer {
        Ok((heads, ended, keys)) => {
            Ok(Answers::Heads(HeadsAnswered { batch: number, requests: batch, heads, ended, keys }))
        }
        Err(error) => {
            tracing::warn!(
                error = format!("{error:#}"),
                users = batch.len(),
                "cannot read heads; trying again"
            );
            Err(Failed::Heads(batch))
        }
    }
}
