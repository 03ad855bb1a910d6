//! A fake `api`: feeds in memory, answers that can be delayed, refused or falsified, and a record of all requests.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use chrono::Utc;
use http::{HeaderMap, Response, StatusCode, header};
use jsonwebtoken::jwk::JwkSet;
use protocol::{
    event::{self, Envelope},
    feed::{
        self, ExternalKeysAnswer, HEADS_PATH, HeadsAnswer, HeadsRequest, IDENTITY_PATH, IdentityAnswer,
        IdentityRequest, KEYS_PATH, KeysAnswer, Login, RANGES_PATH, Range, RangeAfter, RangesAnswer,
        RangesRequest, UserHead,
    },
    ids::{SessionId, UserId},
    keys_version::{KeysVersion, Version},
    position::{Epoch, Position, Seq},
};
use serde::Serialize;
use serde_json::{json, value::RawValue};
use testkit::{
    http::serve,
    issuer::{IssuerKey, published},
    soon,
};
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::DropGuard;
use warp::Filter;

pub(crate) const SECRET: &str = "the-internal-secret-of-these-tests";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Answers are made on request and sent when the fault changes.
    Holding,
    Failing,
    FailingAfter(Duration),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ApiRequest {
    Heads { users: Vec<(UserId, Option<Position>)>, logins: Vec<Login> },
    Ranges(Vec<RangeAfter>),
    Keys,
    Identities(Vec<String>),
}

impl ApiRequest {
    pub(crate) fn size(&self) -> usize {
        match self {
            Self::Heads { users, .. } => users.len(),
            Self::Ranges(pairs) => pairs.len(),
            Self::Keys => 0,
            Self::Identities(subjects) => subjects.len(),
        }
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Record(Vec<ApiRequest>);

impl Record {
    pub(crate) fn requests(&self) -> &[ApiRequest] {
        &self.0
    }

    pub(crate) fn range_requests(&self) -> impl Iterator<Item = &Vec<RangeAfter>> {
        self.0.iter().filter_map(|request| match request {
            ApiRequest::Ranges(pairs) => Some(pairs),
            _ => None,
        })
    }

    pub(crate) fn ranges(&self, user: UserId) -> Vec<Seq> {
        self.range_requests().flatten().filter(|pair| pair.user == user).map(|pair| pair.after).collect()
    }

    pub(crate) fn heads(&self, user: UserId) -> usize {
        let users = self.0.iter().filter_map(|request| match request {
            ApiRequest::Heads { users, .. } => Some(users),
            _ => None,
        });
        users.flatten().filter(|(id, _)| *id == user).count()
    }

    pub(crate) fn identities(&self) -> Vec<&[String]> {
        self.0
            .iter()
            .filter_map(|request| match request {
                ApiRequest::Identities(subjects) => Some(subjects.as_slice()),
                _ => None,
            })
            .collect()
    }

    pub(crate) fn keys(&self) -> usize {
        self.0.iter().filter(|request| **request == ApiRequest::Keys).count()
    }
}

type Falsify = Box<dyn FnOnce(Bytes) -> Bytes + Send>;

struct FeedRow {
    seq: Seq,
    name: String,
    data: String,
}

struct FakeFeed {
    head: Position,
    rows: Vec<FeedRow>,
}

struct FakeState {
    feeds: HashMap<UserId, FakeFeed>,
    owners: HashMap<SessionId, UserId>,
    ended: HashSet<SessionId>,
    jwks: JwkSet,
    external: Option<ExternalKeysAnswer>,
    version: KeysVersion,
    subjects: HashMap<String, UserId>,
    page: usize,
    falsified: HashMap<&'static str, VecDeque<Falsify>>,
}

#[derive(Clone)]
struct Shared {
    state: Arc<Mutex<FakeState>>,
    faults: HashMap<&'static str, watch::Sender<Fault>>,
    record: watch::Sender<Record>,
}

pub(crate) struct FakeApi {
    pub(crate) address: SocketAddr,
    shared: Shared,
    _stop: DropGuard,
}

impl FakeApi {
    pub(crate) fn start(jwks: JwkSet) -> Self {
        let state = FakeState {
            feeds: HashMap::new(),
            owners: HashMap::new(),
            ended: HashSet::new(),
            version: configuration(&jwks, 0),
            jwks,
            external: None,
            subjects: HashMap::new(),
            page: 1_000,
            falsified: HashMap::new(),
        };
        let endpoints = [HEADS_PATH, RANGES_PATH, KEYS_PATH, IDENTITY_PATH];
        let shared = Shared {
            state: Arc::new(Mutex::new(state)),
            faults: endpoints.map(|path| (path, watch::Sender::new(Fault::None))).into(),
            record: watch::Sender::default(),
        };
        let answering = shared.clone();
        let routes = warp::path::full()
            .and(warp::header::headers_cloned())
            .and(
                warp::body::content_length_limit(1 << 20)
                    .and(warp::body::bytes())
                    .or(warp::any().map(Bytes::new))
                    .unify(),
            )
            .then(move |path: warp::path::FullPath, headers, body: Bytes| {
                let answering = answering.clone();
                async move { answering.answer(path.as_str(), &headers, &body).await }
            });
        let (address, stop) = serve(routes.boxed());
        Self { address, shared, _stop: stop }
    }

    fn state(&self) -> MutexGuard<'_, FakeState> {
        self.shared.state.lock().unwrap()
    }

    /// A new user whose feed ends at `head`, with no event pruned.
    pub(crate) fn add(&self, user: UserId, epoch: Epoch, head: Seq) {
        let mut feed = FakeFeed { head: Position { epoch, seq: 0 }, rows: vec![] };
        (0..head).for_each(|_| _ = feed.append(None));
        assert!(self.state().feeds.insert(user, feed).is_none(), "a user of this id exists");
    }

    pub(crate) fn remove(&self, user: UserId) {
        self.state().feeds.remove(&user);
    }

    fn change<T>(&self, user: UserId, change: impl FnOnce(&mut FakeFeed) -> T) -> T {
        change(self.state().feeds.get_mut(&user).expect("the test added this user"))
    }

    pub(crate) fn append(&self, user: UserId) -> Envelope {
        self.change(user, |feed| feed.append(None))
    }

    pub(crate) fn append_large(&self, user: UserId, bytes: usize) -> Envelope {
        self.change(user, |feed| feed.append(Some("x".repeat(bytes))))
    }

    pub(crate) fn append_named(&self, user: UserId, name: &str) -> Envelope {
        self.change(user, |feed| {
            feed.append(None);
            let row = feed.rows.last_mut().unwrap();
            row.name = name.into();
            envelope(feed.head.epoch, row)
        })
    }

    /// An event that was never committed.
    #[expect(clippy::unused_self, reason = "events that exist come from this fake, too")]
    pub(crate) fn made_up(&self, seq: Seq) -> Envelope {
        let data = json!({ "n": seq }).to_string();
        envelope(crate::support::EPOCH, &FeedRow { seq, name: event::kind::MESSAGE.into(), data })
    }

    pub(crate) fn head(&self, user: UserId) -> Position {
        self.change(user, |feed| feed.head)
    }

    pub(crate) fn cursor(&self, user: UserId, seq: Seq) -> String {
        Position { epoch: self.head(user).epoch, seq }.to_string()
    }

    pub(crate) fn prune(&self, user: UserId, to: Seq) {
        self.change(user, |feed| feed.rows.retain(|row| row.seq > to));
    }

    pub(crate) fn restore(&self, user: UserId, epoch: Epoch, head: Seq) {
        self.change(user, |feed| {
            feed.rows.retain(|row| row.seq <= head);
            feed.head = Position { epoch, seq: head };
        });
    }

    pub(crate) fn add_session(&self, user: UserId, session: SessionId) {
        self.state().owners.insert(session, user);
    }

    pub(crate) fn end_session(&self, session: SessionId) {
        self.state().ended.insert(session);
    }

    pub(crate) fn publish_keys(&self, jwks: JwkSet) {
        let mut state = self.state();
        state.jwks = jwks;
        state.reconfigure();
    }

    /// Keys of a replica that was configured at this time.
    pub(crate) fn publish_keys_since(&self, jwks: JwkSet, since: i64) -> KeysVersion {
        let mut state = self.state();
        state.version = configuration(&jwks, since);
        state.jwks = jwks;
        state.version.clone()
    }

    /// The issuer's keys as fetched at this time; `None` if this replica has none yet.
    pub(crate) fn fetched_since(&self, jwks: Option<JwkSet>, since: i64) -> KeysVersion {
        let mut state = self.state();
        state.version.external = jwks.as_ref().map(|jwks| Version { since, ..Version::of(jwks) });
        state.external = Some(ExternalKeysAnswer { jwks, ..published(&IssuerKey::number(0)) });
        state.version.clone()
    }

    pub(crate) fn trust(&self, external: ExternalKeysAnswer) {
        let mut state = self.state();
        state.external = Some(external);
        state.reconfigure();
    }

    pub(crate) fn identify(&self, subject: &str, user: UserId) {
        self.state().subjects.insert(subject.into(), user);
    }

    pub(crate) fn page(&self, events: usize) {
        self.state().page = events;
    }

    pub(crate) fn fault(&self, path: &'static str, fault: Fault) {
        self.shared.faults[path].send_replace(fault);
    }

    pub(crate) fn fault_feed_requests(&self, fault: Fault) {
        self.fault(HEADS_PATH, fault);
        self.fault(RANGES_PATH, fault);
    }

    pub(crate) fn next_answer(&self, path: &'static str, body: impl Into<Bytes>) {
        let body = body.into();
        self.falsify(path, Box::new(|_| body));
    }

    pub(crate) fn falsify_ranges(&self, change: impl FnOnce(&mut RangesAnswer) + Send + 'static) {
        let changed = |answer: Bytes| {
            let mut answer = serde_json::from_slice(&answer).unwrap();
            change(&mut answer);
            to_json(&answer)
        };
        self.falsify(RANGES_PATH, Box::new(changed));
    }

    /// Changes the next answer.
    fn falsify(&self, path: &'static str, falsify: Falsify) {
        self.state().falsified.entry(path).or_default().push_back(falsify);
    }

    pub(crate) fn record(&self) -> Record {
        self.shared.record.borrow().clone()
    }

    pub(crate) fn forget_requests(&self) {
        self.shared.record.send_replace(Record::default());
    }

    pub(crate) async fn until_requested(&self, what: &str, shown: impl FnMut(&Record) -> bool) {
        let mut record = self.shared.record.subscribe();
        soon(what, record.wait_for(shown)).await.expect("the sender lives here");
    }
}

impl FakeFeed {
    fn append(&mut self, padding: Option<String>) -> Envelope {
        self.head.seq += 1;
        let data = json!({ "n": self.head.seq, "padding": padding }).to_string();
        let row = FeedRow { seq: self.head.seq, name: event::kind::MESSAGE.into(), data };
        let envelope = envelope(self.head.epoch, &row);
        self.rows.push(row);
        envelope
    }
}

fn envelope(epoch: Epoch, row: &FeedRow) -> Envelope {
    Envelope {
        v: event::VERSION,
        epoch,
        seq: row.seq,
        event: row.name.clone(),
        data: RawValue::from_string(row.data.clone()).unwrap(),
        created_at: Utc::now(),
        request_id: Some("r1".into()),
        traceparent: None,
    }
}

impl Shared {
    async fn answer(&self, path: &str, headers: &HeaderMap, body: &[u8]) -> Response<Bytes> {
        let Some((path, fault)) = self.faults.get_key_value(path) else {
            return respond(StatusCode::NOT_FOUND, Bytes::new());
        };
        let authorized =
            headers.get(header::AUTHORIZATION).is_some_and(|a| *a == feed::authorization(SECRET));
        if !authorized {
            return respond(StatusCode::UNAUTHORIZED, Bytes::new());
        }
        // The answer is made now, whenever it is sent.
        let (request, answer) = self.make(path, body);
        self.record.send_modify(|record| record.0.push(request));
        let mut fault = fault.subscribe();
        let fault =
            *fault.wait_for(|fault| *fault != Fault::Holding).await.expect("the sender lives as long");
        match fault {
            Fault::None => respond(StatusCode::OK, answer),
            Fault::FailingAfter(wait) => {
                sleep(wait).await;
                respond(StatusCode::SERVICE_UNAVAILABLE, Bytes::new())
            }
            Fault::Failing | Fault::Holding => respond(StatusCode::SERVICE_UNAVAILABLE, Bytes::new()),
        }
    }

    fn make(&self, path: &'static str, body: &[u8]) -> (ApiRequest, Bytes) {
        let mut state = self.state.lock().unwrap();
        let falsify = state.falsified.get_mut(path).and_then(VecDeque::pop_front);
        let (made, answer) = match path {
            HEADS_PATH => {
                let request: HeadsRequest = serde_json::from_slice(body).unwrap();
                let answer = to_json(&state.heads(&request));
                let users = request.users.iter().map(|known| (known.user, known.head)).collect();
                (ApiRequest::Heads { users, logins: request.logins }, answer)
            }
            RANGES_PATH => {
                let request: RangesRequest = serde_json::from_slice(body).unwrap();
                let answer = to_json(&state.ranges(&request));
                (ApiRequest::Ranges(request.ranges), answer)
            }
            IDENTITY_PATH => {
                let request: IdentityRequest = serde_json::from_slice(body).unwrap();
                let subjects: Vec<_> = request.identities.into_iter().map(|it| it.subject).collect();
                let users = subjects.iter().map(|subject| state.subjects[subject]).collect();
                (ApiRequest::Identities(subjects), to_json(&IdentityAnswer { users }))
            }
            _ => {
                let (version, own, external) =
                    (state.version.clone(), state.jwks.clone(), state.external.clone());
                (ApiRequest::Keys, to_json(&KeysAnswer { version, own, external }))
            }
        };
        (made, falsify.map_or(answer.clone(), |falsify| falsify(answer)))
    }
}

impl FakeState {
    fn heads(&self, request: &HeadsRequest) -> HeadsAnswer {
        let differing = request.users.iter().filter_map(|known| {
            let head = self.feeds.get(&known.user).map(|feed| feed.head);
            (head.is_none() || head != known.head).then_some(UserHead { user: known.user, head })
        });
        let ended = |login: &Login| {
            self.ended.contains(&login.session) || self.owners.get(&login.session) != Some(&login.user)
        };
        HeadsAnswer {
            heads: differing.collect(),
            ended_logins: request.logins.iter().copied().filter(ended).collect(),
            keys: self.version.clone(),
        }
    }

    /// Replaces the configuration by a newer one, whatever its keys.
    fn reconfigure(&mut self) {
        let since = self.version.configured.since + 1;
        self.version = configuration(&since, since);
    }

    fn ranges(&self, request: &RangesRequest) -> RangesAnswer {
        let ranges = request.ranges.iter().map(|pair| {
            let feed = self.feeds.get(&pair.user);
            let mut rows: Vec<_> =
                feed.iter().flat_map(|feed| &feed.rows).filter(|row| row.seq > pair.after).collect();
            let more = rows.len() > self.page;
            rows.truncate(self.page);
            Range {
                user: pair.user,
                after: pair.after,
                head: feed.map(|feed| feed.head),
                events: feed
                    .iter()
                    .flat_map(|feed| rows.iter().map(|row| envelope(feed.head.epoch, row)))
                    .collect(),
                more,
            }
        });
        RangesAnswer { ranges: ranges.collect() }
    }
}

fn configuration(content: &impl Serialize, since: i64) -> KeysVersion {
    KeysVersion { configured: Version { since, ..Version::of(content) }, external: None }
}

fn to_json(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value).unwrap().into()
}

fn respond(status: StatusCode, body: Bytes) -> Response<Bytes> {
    Response::builder().status(status).header(header::CONTENT_TYPE, "application/json").body(body).unwrap()
}
