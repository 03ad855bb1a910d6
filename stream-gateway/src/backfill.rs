//! Reads feeds and heads from Postgres through `api`'s internal listener.
//!
//! Requests of many users share one HTTP request, a batch: fifty thousand reconnects make a hundred. Every request is answered
//! in the end: while `api` is unreachable it waits here and is retried. The requesters bound what may wait, with a few per
//! connection and user; [`Backfill::retain_ranges`] and [`Backfill::retain_heads`] drop those whose requester is gone.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    future::pending,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use protocol::{
    event::Envelope,
    feed::{
        self, HeadsAnswer, HeadsRequest, KnownHead, Login, MAX_PAIRS, Range, RangeAfter, RangesAnswer,
        RangesRequest,
    },
    ids::UserId,
    keys_version::KeysVersion,
    position::{Position, Seq},
};
use service_kit::{backoff::Backoff, traces::Tracer};
use tokio::{
    runtime::Handle,
    task::JoinHandle,
    time::{Instant, sleep_until},
};

use crate::{
    api_client::ApiClient,
    core::{HeadRequest, RangeAnswer, RangeRequest},
    event::EncodedEvent,
    metrics::{DeliveryPath, Kind, Metrics},
};

/// Wait of a batch's first request for others.
const GATHER: Duration = Duration::from_millis(2);
/// Batches of one kind in flight. Each kind has its own, so that sessions are checked while many feeds are read.
const MAX_BATCHES: usize = 3;
/// The first pause after a failure, and the longest.
const BACKOFF: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(2)];

#[derive(Debug)]
pub struct HeadsAnswered {
    pub requests: Vec<HeadRequest>,
    /// Heads that differ from `requested_at`.
    pub heads: HashMap<UserId, Option<Position>>,
    pub ended: HashSet<Login>,
    /// Key version of the replica that answered.
    pub keys: KeysVersion,
}

pub enum Answers {
    Ranges(Vec<(RangeRequest, RangeAnswer)>),
    Heads(HeadsAnswered),
}

/// A batch failed. Its requests wait for another attempt; those that nobody wants any more may be dropped.
pub struct BatchFailed;

type Finished = (Result<Answers, Failed>, Instant);

/// The requests are put back and retried.
enum Failed {
    Ranges(Vec<RangeRequest>),
    Heads(Vec<HeadRequest>),
}

pub struct Backfill {
    api: ApiClient,
    /// Sends and parses on tokio's worker threads, not on the delivery thread.
    workers: Handle,
    tracer: Tracer,
    metrics: Arc<Metrics>,
    ranges: VecDeque<RangeRequest>,
    heads: VecDeque<HeadRequest>,
    in_flight: FuturesUnordered<JoinHandle<Finished>>,
    range_batches_in_flight: usize,
    head_batches_in_flight: usize,
    gather_until: Instant,
    paused_until: Instant,
    /// Zero while `api` answers.
    pause: Duration,
    backoff: Backoff,
}

impl Backfill {
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
            gather_until: Instant::now(),
            paused_until: Instant::now(),
            pause: Duration::ZERO,
            backoff: Backoff::new(BACKOFF[0], BACKOFF[1]),
        }
    }

    pub fn request_range(&mut self, request: RangeRequest) {
        self.gather();
        self.ranges.push_back(request);
    }

    pub fn request_head(&mut self, request: HeadRequest) {
        self.gather();
        self.heads.push_back(request);
    }

    pub fn failing(&self) -> bool {
        self.pause > Duration::ZERO
    }

    /// Keeps the waiting requests that `wanted` accepts.
    pub fn retain_ranges(&mut self, wanted: impl FnMut(&RangeRequest) -> bool) {
        self.ranges.retain(wanted);
    }

    /// Keeps the waiting requests that `wanted` accepts.
    pub fn retain_heads(&mut self, wanted: impl FnMut(&HeadRequest) -> bool) {
        self.heads.retain(wanted);
    }

    /// The next answers; pending while nothing is requested. Cancel safe.
    pub async fn next(&mut self) -> Result<Answers, BatchFailed> {
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
                            return Ok(answers);
                        }
                        Err(failed) => {
                            if self.put_back(failed, started) {
                                return Err(BatchFailed);
                            }
                        }
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
            let batch: Vec<_> = self.heads.drain(..self.heads.len().min(MAX_PAIRS)).collect();
            self.count("heads", batch.len());
            let api = self.api.clone();
            self.in_flight
                .push(self.workers.spawn(async move { (request_heads(&api, batch).await, started) }));
        }
        release(&mut self.ranges);
        release(&mut self.heads);
    }

    fn count(&self, kind: &'static str, users: usize) {
        self.metrics.backfill_requests.get_or_create(&Kind { kind }).inc_by(users as u64);
    }

    /// Batches that fail together count as one failure: those sent before the pause prove nothing new. Returns whether this is
    /// the first of them.
    fn put_back(&mut self, failed: Failed, started: Instant) -> bool {
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
        let is_first = started >= self.paused_until;
        if is_first {
            self.pause = self.backoff.next_delay();
        }
        self.paused_until = Instant::now() + self.pause;
        is_first
    }
}

/// After a storm, an emptied queue keeps memory for a batch only.
fn release<T>(queue: &mut VecDeque<T>) {
    if queue.is_empty() {
        queue.shrink_to(MAX_PAIRS);
    }
}

async fn request_ranges(
    api: &ApiClient,
    batch: Vec<RangeRequest>,
    tracer: &Tracer,
    metrics: &Metrics,
) -> Result<Answers, Failed> {
    let pairs = batch.iter().map(|request| RangeAfter { user: request.user, after: request.after }).collect();
    let answer = api.post::<RangesAnswer>(feed::RANGES_PATH, &RangesRequest { ranges: pairs }).await;
    let answer = answer.and_then(|answer| {
        let matches = answer.ranges.len() == batch.len()
            && batch.iter().zip(&answer.ranges).all(|(q, a)| (q.user, q.after) == (a.user, a.after));
        anyhow::ensure!(matches, "api answered other ranges than requested");
        Ok(answer)
    });
    match answer {
        Ok(answer) => {
            let answers = batch.into_iter().zip(answer.ranges).map(|(request, mut range)| {
                let consistent = consistent(&range);
                if consistent < range.events.len() {
                    tracing::error!(user.id = %range.user, after = range.after, "api returned an inconsistent range; using its consistent part");
                    range.events.truncate(consistent);
                    range.more = true;
                }
                let (events, whole) = encode(range.user, range.events, request.path(), tracer, metrics);
                (request, RangeAnswer { head: range.head, events, more: range.more || !whole })
            });
            Ok(Answers::Ranges(answers.collect()))
        }
        Err(error) => {
            tracing::warn!(error = format!("{error:#}"), users = batch.len(), "backfill failed; retrying");
            Err(Failed::Ranges(batch))
        }
    }
}

/// Number of leading consistent events: of the head's epoch, after `after`, without gaps, up to the head. The first may be
/// any, because older ones may be pruned. The rest is cut off, so that one damaged feed does not delay its whole batch.
fn consistent(range: &Range) -> usize {
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

/// Encodes up to the first event that this build cannot send; a stream that needs it must resync.
fn encode(
    user: UserId,
    envelopes: Vec<Envelope>,
    path: DeliveryPath,
    tracer: &Tracer,
    metrics: &Metrics,
) -> (Vec<EncodedEvent>, bool) {
    let mut events = Vec::with_capacity(envelopes.len());
    for envelope in envelopes {
        match EncodedEvent::receive(tracer, user, &envelope.borrowed(), path) {
            Ok(event) => events.push(event),
            Err(error) => {
                metrics.backfill_requests_failed.get_or_create(&Kind { kind: "encode" }).inc();
                tracing::error!(%error, user.id = %user, event.seq = envelope.seq, "feed event could not be encoded; streams that need it must resync");
                return (events, false);
            }
        }
    }
    (events, true)
}

async fn request_heads(api: &ApiClient, batch: Vec<HeadRequest>) -> Result<Answers, Failed> {
    let request = HeadsRequest {
        users: batch.iter().map(|q| KnownHead { user: q.user, head: q.requested_at }).collect(),
        logins: batch.iter().filter_map(HeadRequest::login).collect(),
    };
    let answer = api.post::<HeadsAnswer>(feed::HEADS_PATH, &request).await.and_then(|answer| {
        let heads: HashMap<_, _> = answer.heads.into_iter().map(|head| (head.user, head.head)).collect();
        let whole = batch.iter().all(|q| q.requested_at.is_some() || heads.contains_key(&q.user));
        anyhow::ensure!(whole, "api left out requested heads");
        Ok((heads, answer.ended_logins.into_iter().collect(), answer.keys))
    });
    match answer {
        Ok((heads, ended, keys)) => Ok(Answers::Heads(HeadsAnswered { requests: batch, heads, ended, keys })),
        Err(error) => {
            tracing::warn!(
                error = format!("{error:#}"),
                users = batch.len(),
                "reading heads failed; retrying"
            );
            Err(Failed::Heads(batch))
        }
    }
}

#[cfg(test)]
mod tests {
    use service_kit::secrets::Secrets;

    use super::*;
    use crate::core::HeadReason;

    #[tokio::test]
    async fn an_emptied_queue_keeps_memory_for_a_batch_only() {
        let metrics = Arc::new(Metrics::default());
        let api = ApiClient::new("http://127.0.0.1:9", Secrets::random(), metrics.clone());
        let mut backfill = Backfill::new(api, Handle::current(), Tracer::default(), metrics);
        for id in 0..(MAX_BATCHES * MAX_PAIRS) as i64 {
            let (user, why) = (UserId(id), HeadReason::Subscribed);
            backfill.request_head(HeadRequest { user, requested_at: None, why, session: None });
        }
        backfill.gather_until = Instant::now();
        backfill.launch();
        assert!(backfill.heads.is_empty());
        assert!(backfill.heads.capacity() < 2 * MAX_PAIRS);
    }
}
