//! The gateway of the model: one user's sequencer and at most one stream.

use std::{cmp::Ordering, collections::BTreeSet, mem};

use crate::rules::{ProtocolRule, ProtocolRules};

/// A point in the feed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelPosition {
    pub epoch: u8,
    pub seq: u8,
}

/// What the gateway writes to the client, at the moment at which the client reads it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ModelBlock {
    Event { at: ModelPosition, session_confirmed: bool },
    Resync(ModelPosition),
    Goodbye,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Subscription {
    #[default]
    None,
    Requested,
    Confirmed,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ModelStream {
    pub cursor: ModelPosition,
    /// Events are written from the cursor on.
    joined: bool,
    session: ModelSession,
    range_requested: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum ModelSession {
    Unknown,
    Requested,
    Confirmed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Purpose {
    /// The head, for a join, a confirmed subscription or a reconcile.
    Head,
    Reconcile,
    /// The sequencer's own request: what follows its position.
    Gap,
    /// A stream's own request: what follows its cursor.
    Replay,
}

/// Which stream a request is for: to check its session, or to continue from its cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ForStream {
    None,
    /// A stream that has closed, or whose cursor has moved by a resync.
    Earlier,
    Current,
}

/// A request to api's internal listener, and its answer once api has read the feed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Request {
    pub purpose: Purpose,
    /// `None`: only the head is requested.
    pub after: Option<u8>,
    for_stream: ForStream,
    /// The sequencer's position at the time of the request.
    requested_at: Option<ModelPosition>,
    pub answer: Option<ModelAnswer>,
}

/// One snapshot of Postgres.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelAnswer {
    pub head: ModelPosition,
    /// The events after [`Request::after`] that the feed still has.
    pub rows: Vec<u8>,
    pub session_ended: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Gateway {
    pub rules: ProtocolRules,
    pub subscription: Subscription,
    pub degraded: bool,
    pub stream: Option<ModelStream>,
    /// Everything up to here was delivered. `None` until Postgres first answered.
    position: Option<ModelPosition>,
    /// Events beyond a gap, in the position's epoch.
    buffered: BTreeSet<u8>,
    /// The feed is said to reach this far.
    target: u8,
    must_check: bool,
    gap_requested: bool,
    /// Sorted, because their order means nothing: any of them may be answered next.
    pub requests: Vec<Request>,
    /// Written in this step.
    pub written: Vec<ModelBlock>,
}

impl Gateway {
    pub fn new(rules: ProtocolRules) -> Self {
        Self { rules, ..Self::default() }
    }

    pub fn open_stream(&mut self, cursor: ModelPosition) {
        self.stream = Some(ModelStream {
            cursor,
            joined: false,
            session: ModelSession::Unknown,
            range_requested: false,
        });
        if !self.has_user() {
            self.subscription = Subscription::Requested;
        }
        self.send_requests();
    }

    pub fn close_stream(&mut self) {
        self.stream = None;
        self.disown(|_| true);
    }

    /// The user has had no stream for a moment. Requests in flight are still answered.
    pub fn forget_user(&mut self) {
        let requests = mem::take(&mut self.requests);
        *self = Self { requests, degraded: self.degraded, ..Self::new(self.rules) };
    }

    pub fn has_user(&self) -> bool {
        self.subscription != Subscription::None
    }

    pub fn is_reconciling(&self) -> bool {
        self.requests.iter().any(|request| request.purpose == Purpose::Reconcile)
    }

    pub fn on_session_ended(&mut self) {
        if self.stream.is_some() {
            self.close_stream();
            self.written.push(ModelBlock::Goodbye);
        }
    }

    /// The subscriber found that Redis is gone. Streams join without a subscription now.
    pub fn on_redis_lost(&mut self) {
        self.degraded = true;
        if self.subscription == Subscription::Confirmed {
            self.subscription = Subscription::Requested;
        }
        self.send_requests();
    }

    /// Redis delivers events from here on; earlier ones are requested.
    pub fn on_subscribed(&mut self) {
        self.subscription = Subscription::Confirmed;
        let reconnected = mem::take(&mut self.degraded);
        let request = if reconnected {
            ProtocolRule::RequestAfterReconnect
        } else {
            ProtocolRule::SubscribeBeforeRequest
        };
        if self.rules.keep(request) {
            if self.position.is_some() {
                self.request(Purpose::Head, None, ForStream::None);
            } else if self.stream.as_ref().is_some_and(|stream| stream.session != ModelSession::Unknown) {
                self.must_check = true;
            }
        }
        self.send_requests();
    }

    /// An event came from Redis.
    pub fn on_event(&mut self, at: ModelPosition) {
        if let Some(stream) = &mut self.stream
            && stream.may_join(self.rules)
            && follows(stream.cursor, at, self.rules)
        // Nothing is missing, so it needs no answer.
        {
            stream.joined = true;
            self.write(at);
        }
        match self.position {
            None => self.must_check = true,
            Some(position) if at.epoch != position.epoch => {
                self.must_check |= self.rules.keep(ProtocolRule::CheckOtherEpoch);
            }
            Some(position) if follows(position, at, self.rules) => {
                self.deliver(at);
                self.deliver_buffered();
            }
            Some(position) if at.seq > position.seq => {
                self.buffered.insert(at.seq);
                self.target = self.target.max(at.seq);
            }
            Some(_) => {}
        }
        self.send_requests();
    }

    pub fn reconcile(&mut self) {
        let with_session = self.stream.is_some() && self.rules.keep(ProtocolRule::ReconcileSessions);
        let for_stream = if with_session { ForStream::Current } else { ForStream::None };
        self.request(Purpose::Reconcile, None, for_stream);
    }

    pub fn on_answer(&mut self, request: &Request, answer: &ModelAnswer) {
        match request.purpose {
            Purpose::Head | Purpose::Reconcile => {
                if request.for_stream != ForStream::None {
                    let is_later = request.for_stream == ForStream::Current
                        || !self.rules.keep(ProtocolRule::ConfirmByLaterAnswer);
                    match &mut self.stream {
                        Some(_) if answer.session_ended => self.on_session_ended(),
                        Some(stream) if is_later => stream.session = ModelSession::Confirmed,
                        _ => {}
                    }
                }
                self.observe(request.requested_at, None, answer);
            }
            Purpose::Gap => {
                self.gap_requested = false;
                self.observe(request.requested_at, request.after, answer);
            }
            Purpose::Replay => {
                self.observe(request.requested_at, None, answer);
                self.replay(request, answer);
            }
        }
        self.send_requests();
    }

    /// The sequencer learns from any answer. `after`: of its own request.
    fn observe(&mut self, requested_at: Option<ModelPosition>, after: Option<u8>, answer: &ModelAnswer) {
        let head = answer.head;
        let Some(position) = self.position else {
            self.position = Some(head);
            return;
        };
        if head.epoch != position.epoch {
            let is_newer = requested_at.is_some_and(|at| at.epoch == position.epoch);
            if is_newer || !self.rules.keep(ProtocolRule::CompareEpochAtRequest) {
                return self.resync(head);
            }
            self.must_check = true; // One of the two is outdated; a new request shows which.
            return;
        }
        let compared =
            if self.rules.keep(ProtocolRule::CompareHeadAtRequest) { requested_at } else { self.position };
        if compared.is_some_and(|at| at.epoch == head.epoch && head.seq < at.seq) {
            return self.resync(head);
        }
        let first = answer.rows.first().map_or(head.seq + 1, |seq| *seq);
        if after == Some(position.seq) && first > position.seq + 1 {
            if self.rules.keep(ProtocolRule::RangeFollowsCursor) {
                return self.resync(head);
            }
            self.position = Some(ModelPosition { seq: first - 1, ..position });
        }
        for &seq in &answer.rows {
            if self.position.is_some_and(|position| position.seq + 1 == seq) {
                self.deliver(ModelPosition { epoch: head.epoch, seq });
            }
        }
        self.deliver_buffered();
        self.target = self.target.max(head.seq);
    }

    /// The answer to a stream's own request.
    fn replay(&mut self, request: &Request, answer: &ModelAnswer) {
        let is_later = request.for_stream == ForStream::Current;
        let Some(stream) = &mut self.stream else { return };
        if is_later {
            stream.range_requested = false;
        } else if self.rules.keep(ProtocolRule::JudgeByLaterAnswer) {
            return;
        }
        let judged = match request.after {
            Some(after) if self.rules.keep(ProtocolRule::JudgeByLaterAnswer) => {
                ModelPosition { seq: after, ..stream.cursor }
            }
            _ => stream.cursor,
        };
        let head = answer.head;
        stream.joined = true;
        if head.epoch != judged.epoch || head.seq < judged.seq {
            return self.resync_stream();
        }
        let first = answer.rows.first().map_or(head.seq + 1, |seq| *seq);
        if first > stream.cursor.seq + 1 {
            if self.rules.keep(ProtocolRule::RangeFollowsCursor) {
                return self.resync_stream();
            }
            stream.cursor.seq = first - 1;
        }
        for &seq in &answer.rows {
            if self.stream.as_ref().is_some_and(|stream| stream.cursor.seq + 1 == seq) {
                self.write(ModelPosition { epoch: head.epoch, seq });
            }
        }
    }

    /// The position jumps to this head. Streams that cannot follow from their cursor either must reload.
    fn resync(&mut self, head: ModelPosition) {
        let before = self.position.replace(head);
        if before.is_some_and(|before| before.epoch != head.epoch) {
            self.buffered.clear();
            self.target = 0;
        }
        let is_lost = self.stream.as_ref().is_some_and(|stream| {
            let is_ahead = stream.cursor.epoch == head.epoch && Some(stream.cursor) > before;
            stream.joined && !(is_ahead && self.rules.keep(ProtocolRule::ResyncOnlyLostStreams))
        });
        if is_lost {
            self.resync_stream();
        }
        self.deliver_buffered();
    }

    fn resync_stream(&mut self) {
        let (Some(stream), Some(head)) = (&mut self.stream, self.position) else { return };
        if self.rules.keep(ProtocolRule::ResyncMovesCursor) {
            stream.cursor = head;
        }
        stream.range_requested = false;
        self.written.push(ModelBlock::Resync(head));
        self.disown(|request| request.purpose == Purpose::Replay);
    }

    fn deliver(&mut self, at: ModelPosition) {
        self.position = Some(at);
        if self.stream.as_ref().is_some_and(|stream| stream.joined && follows(stream.cursor, at, self.rules))
        {
            self.write(at);
        }
    }

    fn deliver_buffered(&mut self) {
        while let (Some(position), Some(&seq)) = (self.position, self.buffered.first())
            && seq <= position.seq + 1
        {
            self.buffered.pop_first();
            if seq == position.seq + 1 {
                self.deliver(ModelPosition { seq, ..position });
            }
        }
    }

    fn write(&mut self, at: ModelPosition) {
        let Some(stream) = &mut self.stream else { return };
        stream.cursor = at;
        self.written
            .push(ModelBlock::Event { at, session_confirmed: stream.session == ModelSession::Confirmed });
    }

    /// Requests what is needed, without a wait: other steps may come before the answer anyway.
    fn send_requests(&mut self) {
        let may_request = self.subscription == Subscription::Confirmed
            || self.degraded
            || !self.rules.keep(ProtocolRule::SubscribeBeforeRequest);
        let position = self.position;
        if let Some(stream) = &mut self.stream
            && stream.session == ModelSession::Unknown
            && (may_request || position.is_some())
        {
            stream.session = ModelSession::Requested;
            self.request(Purpose::Head, None, ForStream::Current);
        }
        if let Some(stream) = &mut self.stream {
            let cursor = stream.cursor;
            let joins = !stream.joined && stream.may_join(self.rules) && may_request;
            let is_certain = !self.must_check && !self.gap_requested;
            let is_behind = position.is_some_and(|position| {
                if position.epoch == cursor.epoch {
                    position.seq > cursor.seq
                } else {
                    is_certain && self.rules.keep(ProtocolRule::JudgeOtherEpochAgain)
                }
            });
            if !stream.range_requested && (joins || stream.joined && is_behind) {
                stream.range_requested = true;
                self.request(Purpose::Replay, Some(cursor.seq), ForStream::Current);
            }
        }
        let gap = position.is_some_and(|position| self.target > position.seq);
        if !self.gap_requested && (self.must_check || gap && self.rules.keep(ProtocolRule::RequestGap)) {
            self.gap_requested = true;
            self.must_check = false;
            self.request(Purpose::Gap, position.map(|position| position.seq), ForStream::None);
        }
    }

    fn request(&mut self, purpose: Purpose, after: Option<u8>, for_stream: ForStream) {
        self.requests.push(Request { purpose, after, for_stream, requested_at: self.position, answer: None });
        self.requests.sort();
    }

    /// These requests no longer concern the stream.
    fn disown(&mut self, which: impl Fn(&Request) -> bool) {
        for request in &mut self.requests {
            if request.for_stream == ForStream::Current && which(request) {
                request.for_stream = ForStream::Earlier;
            }
        }
        self.requests.sort();
    }
}

impl ModelStream {
    fn may_join(&self, rules: ProtocolRules) -> bool {
        self.session == ModelSession::Confirmed || !rules.keep(ProtocolRule::ConfirmSessionFirst)
    }
}

/// Whether the event is the next one after the position.
fn follows(position: ModelPosition, at: ModelPosition, rules: ProtocolRules) -> bool {
    at.epoch == position.epoch
        && match at.seq.cmp(&(position.seq + 1)) {
            Ordering::Less => !rules.keep(ProtocolRule::DropOldEvents),
            Ordering::Equal => true,
            Ordering::Greater => !rules.keep(ProtocolRule::BufferBeyondGap),
        }
}
