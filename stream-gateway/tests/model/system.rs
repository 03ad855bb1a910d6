//! api with its feed in Postgres, Redis, and the client: what happens around the gateway, and what may fail.

use std::{collections::BTreeSet, mem};

use crate::{
    gateway::{Gateway, ModelAnswer, ModelBlock, ModelPosition, Purpose, Subscription},
    rules::{ProtocolRule, ProtocolRules},
};

/// One user's feed and session in Postgres.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ModelFeed {
    pub head: ModelPosition,
    /// The head that a restore took away.
    lost_head: Option<ModelPosition>,
    /// Events that are no longer kept, always the oldest.
    pruned: u8,
    /// Numbered but not committed; only without one of api's rules.
    uncommitted: Option<ModelPosition>,
    pub session_ended: bool,
    commits: u8,
}

/// A message from api to Redis. Until it reaches the gateway or is lost, others may overtake it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum ModelMessage {
    Event(ModelPosition),
    SessionEnded,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum ModelRedis {
    /// A message reaches the gateway if the gateway is subscribed at that moment.
    Up {
        subscribed: bool,
    },
    Down,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum ModelConnection {
    Closed,
    /// A token outlives its session for a few minutes: it still opens a stream.
    Open {
        after_session_end: bool,
    },
    /// The client knows that its session has ended.
    SessionEnded,
}

/// It loaded everything up to a position by REST and reads events from there on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ModelClient {
    cursor: ModelPosition,
    connection: ModelConnection,
}

/// How a promise was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Violation {
    Order,
    Session,
    NeedlessResync,
}

/// Each happens at most once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ModelFault {
    /// api dies after the commit, its queue is full, or Redis drops the message.
    LosePublish,
    RepeatPublish,
    /// api does not answer, or its answer is lost.
    LoseAnswer,
    StopRedis,
    /// The client's next gateway knows nothing.
    RestartGateway,
    Disconnect,
    /// The client loads the page again, and so has a newer cursor than the gateway.
    Reload,
    Prune,
    /// The database returns to an earlier point, and the operator runs `new-epoch`.
    Restore,
    EndSession,
}

impl ModelFault {
    const ALL: [Self; 10] = [
        Self::LosePublish,
        Self::RepeatPublish,
        Self::LoseAnswer,
        Self::StopRedis,
        Self::RestartGateway,
        Self::Disconnect,
        Self::Reload,
        Self::Prune,
        Self::Restore,
        Self::EndSession,
    ];
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelAction {
    // Steps: sooner or later they happen. Numbers are indexes of messages and requests in flight.
    Commit,
    Publish(usize),
    Subscribe,
    ConfirmSubscription,
    DetectRedisLoss,
    ReadFeed(usize),
    DeliverAnswer(usize),
    OpenStream,
    Reconcile,
    // Choices: they may happen.
    Post,
    PostWithoutLock,
    StartRedis,
    ForgetUser,
    /// With the index of its message or request; for `Disconnect`, the number of events that the client had not read.
    Fault(ModelFault, usize),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ModelState {
    pub feed: ModelFeed,
    messages: Vec<ModelMessage>,
    redis: ModelRedis,
    pub gateway: Gateway,
    client: ModelClient,
    faults: BTreeSet<ModelFault>,
    /// The newest event was published, or will be.
    pub head_published: bool,
    /// A reconcile began and nothing else has happened since: another one would bring the same.
    reconciled: bool,
    pub violation: Option<Violation>,
}

impl ModelFeed {
    pub fn read(&self, after: Option<u8>) -> ModelAnswer {
        let rows = after.into_iter().flat_map(|after| after.max(self.pruned) + 1..=self.head.seq);
        let rows = rows.filter(|seq| self.contains(ModelPosition { seq: *seq, ..self.head }));
        ModelAnswer { head: self.head, rows: rows.collect(), session_ended: self.session_ended }
    }

    /// Whether this event is, or was before a restore, in the feed.
    fn contains(&self, at: ModelPosition) -> bool {
        let mut heads = self.lost_head.into_iter().chain([self.head]);
        heads.any(|head| at.epoch == head.epoch && at.seq <= head.seq) && self.uncommitted != Some(at)
    }

    /// Whether the feed still has all events after this cursor.
    fn can_follow(&self, cursor: ModelPosition) -> bool {
        cursor.epoch == self.head.epoch && (self.pruned..=self.head.seq).contains(&cursor.seq)
    }
}

impl ModelState {
    pub fn new(rules: ProtocolRules) -> Self {
        let start = ModelPosition { epoch: 1, seq: 0 };
        let feed = ModelFeed {
            head: start,
            lost_head: None,
            pruned: 0,
            uncommitted: None,
            session_ended: false,
            commits: 0,
        };
        Self {
            feed,
            messages: vec![],
            redis: ModelRedis::Up { subscribed: false },
            gateway: Gateway::new(rules),
            client: ModelClient { cursor: start, connection: ModelConnection::Closed },
            faults: BTreeSet::new(),
            head_published: true,
            reconciled: false,
            violation: None,
        }
    }

    /// What the parts do by themselves, but for the reconcile.
    pub fn steps(&self, actions: &mut Vec<ModelAction>) {
        if self.feed.uncommitted.is_some() {
            actions.push(ModelAction::Commit);
        }
        actions.extend((0..self.messages.len()).map(ModelAction::Publish));
        match (self.redis, self.gateway.subscription) {
            (ModelRedis::Up { subscribed: false }, Subscription::Requested) => {
                actions.push(ModelAction::Subscribe);
            }
            (ModelRedis::Up { subscribed: true }, Subscription::Requested) => {
                actions.push(ModelAction::ConfirmSubscription);
            }
            (ModelRedis::Up { subscribed: false }, Subscription::Confirmed) => {
                actions.push(ModelAction::DetectRedisLoss);
            }
            (ModelRedis::Down, _) if self.gateway.has_user() && !self.gateway.degraded => {
                actions.push(ModelAction::DetectRedisLoss);
            }
            _ => {}
        }
        let requests = self.gateway.requests.iter().enumerate();
        actions.extend(requests.map(|(index, request)| match request.answer {
            None => ModelAction::ReadFeed(index),
            Some(_) => ModelAction::DeliverAnswer(index),
        }));
        if self.client.connection == ModelConnection::Closed {
            actions.push(ModelAction::OpenStream);
        }
    }

    pub fn is_reconcile_due(&self) -> bool {
        let gateway = &self.gateway;
        gateway.rules.keep(ProtocolRule::Reconcile)
            && gateway.has_user()
            && !gateway.is_reconciling()
            && !self.reconciled
    }

    /// What users, operators and misfortune may do next.
    pub fn choices(&self, commits: u8, faults: usize, actions: &mut Vec<ModelAction>) {
        let rules = self.gateway.rules;
        let Self { feed, gateway, .. } = self;
        if feed.commits < commits {
            if feed.uncommitted.is_none() || rules.keep(ProtocolRule::CommitBeforePublish) {
                actions.push(ModelAction::Post);
            }
            if feed.uncommitted.is_none() && !rules.keep(ProtocolRule::NumberUnderLock) {
                actions.push(ModelAction::PostWithoutLock);
            }
        }
        if self.redis == ModelRedis::Down {
            actions.push(ModelAction::StartRedis);
        }
        if gateway.has_user() && gateway.stream.is_none() {
            actions.push(ModelAction::ForgetUser);
        }
        let faults = if self.faults.len() < faults { &ModelFault::ALL[..] } else { &[] };
        for &fault in faults.iter().filter(|fault| !self.faults.contains(fault)) {
            actions.extend((0..self.ways(fault)).map(|way| ModelAction::Fault(fault, way)));
        }
    }

    /// In how many ways this fault can happen now.
    fn ways(&self, fault: ModelFault) -> usize {
        let is_open = matches!(self.client.connection, ModelConnection::Open { .. });
        match fault {
            ModelFault::LosePublish | ModelFault::RepeatPublish => self.messages.len(),
            ModelFault::LoseAnswer => self.gateway.requests.len(),
            ModelFault::StopRedis => usize::from(self.redis != ModelRedis::Down),
            ModelFault::RestartGateway => usize::from(self.gateway.has_user()),
            ModelFault::Disconnect if is_open => 1 + usize::from(self.client.cursor.seq > 0),
            ModelFault::Disconnect => 0,
            ModelFault::Reload => usize::from(is_open),
            ModelFault::Prune => usize::from(self.feed.pruned < self.feed.head.seq),
            ModelFault::Restore => usize::from(self.feed.head.seq > 0),
            ModelFault::EndSession => usize::from(!self.feed.session_ended),
        }
    }

    pub fn apply(&mut self, action: ModelAction) {
        let continues_reconcile = match action {
            ModelAction::Reconcile => true,
            ModelAction::ReadFeed(index) | ModelAction::DeliverAnswer(index) => {
                self.gateway.requests[index].purpose == Purpose::Reconcile
            }
            _ => false,
        };
        self.reconciled = continues_reconcile && (self.reconciled || action == ModelAction::Reconcile);

        let Self { feed, messages, redis, gateway, client, .. } = self;
        let rules = gateway.rules;
        match action {
            ModelAction::Commit => {
                if let Some(at) = feed.uncommitted.take() {
                    feed.head = feed.head.max(at);
                    if rules.keep(ProtocolRule::CommitBeforePublish) {
                        messages.push(ModelMessage::Event(at));
                    }
                }
            }
            ModelAction::Publish(index) => {
                let message = messages.remove(index);
                self.publish(message);
            }
            ModelAction::Subscribe => *redis = ModelRedis::Up { subscribed: true },
            ModelAction::ConfirmSubscription => gateway.on_subscribed(),
            ModelAction::DetectRedisLoss => gateway.on_redis_lost(),
            ModelAction::ReadFeed(index) => {
                let request = &mut gateway.requests[index];
                request.answer = Some(feed.read(request.after));
                gateway.requests.sort();
            }
            ModelAction::DeliverAnswer(index) => {
                let mut request = gateway.requests.remove(index);
                if let Some(mut answer) = request.answer.take() {
                    if !rules.keep(ProtocolRule::OneSnapshot) {
                        answer.head = feed.head;
                    }
                    gateway.on_answer(&request, &answer);
                }
            }
            ModelAction::OpenStream => {
                client.connection = ModelConnection::Open { after_session_end: feed.session_ended };
                let cursor =
                    if rules.keep(ProtocolRule::ReconnectWithCursor) { client.cursor } else { feed.head };
                gateway.open_stream(cursor);
            }
            ModelAction::Reconcile => gateway.reconcile(),
            ModelAction::Post => {
                feed.commits += 1;
                let last = feed.uncommitted.unwrap_or(feed.head);
                let at = ModelPosition { seq: last.seq + 1, ..last };
                if rules.keep(ProtocolRule::CommitBeforePublish) {
                    feed.head = at;
                } else {
                    feed.uncommitted = Some(at);
                }
                messages.push(ModelMessage::Event(at));
                self.head_published = true;
            }
            ModelAction::PostWithoutLock => {
                feed.commits += 1;
                feed.uncommitted = Some(ModelPosition { seq: feed.head.seq + 1, ..feed.head });
            }
            ModelAction::StartRedis => *redis = ModelRedis::Up { subscribed: false },
            ModelAction::ForgetUser => {
                gateway.forget_user();
                self.unsubscribe();
            }
            ModelAction::Fault(fault, way) => {
                self.faults.insert(fault);
                self.fail(fault, way);
            }
        }
        self.messages.sort_unstable();
        for block in mem::take(&mut self.gateway.written) {
            self.receive(block);
        }
    }

    fn fail(&mut self, fault: ModelFault, way: usize) {
        let Self { feed, messages, gateway, client, .. } = self;
        match fault {
            ModelFault::LosePublish => {
                let lost = messages.remove(way);
                self.head_published &= lost != ModelMessage::Event(feed.head);
            }
            ModelFault::RepeatPublish => {
                let message = messages[way];
                self.publish(message);
            }
            ModelFault::LoseAnswer if gateway.rules.keep(ProtocolRule::RepeatRequests) => {
                gateway.requests[way].answer = None;
                gateway.requests.sort();
            }
            ModelFault::LoseAnswer => drop(gateway.requests.remove(way)),
            ModelFault::StopRedis => self.redis = ModelRedis::Down,
            ModelFault::RestartGateway => {
                *gateway = Gateway::new(gateway.rules);
                if client.connection != ModelConnection::SessionEnded {
                    client.connection = ModelConnection::Closed;
                }
                self.unsubscribe();
            }
            ModelFault::Disconnect => {
                gateway.close_stream();
                client.connection = ModelConnection::Closed;
                client.cursor.seq -= way as u8; // So many events were written, but not read.
            }
            ModelFault::Reload => {
                gateway.close_stream();
                *client = ModelClient { cursor: feed.head, connection: ModelConnection::Closed };
            }
            ModelFault::Prune => feed.pruned += 1,
            ModelFault::Restore => {
                let ModelPosition { epoch, seq } = feed.head;
                feed.lost_head = Some(feed.head);
                feed.head = ModelPosition { epoch: epoch + 1, seq: seq - 1 };
                feed.pruned = feed.pruned.min(feed.head.seq);
                self.head_published = false;
            }
            ModelFault::EndSession => {
                feed.session_ended = true;
                messages.push(ModelMessage::SessionEnded);
            }
        }
    }

    fn publish(&mut self, message: ModelMessage) {
        if self.redis == (ModelRedis::Up { subscribed: true }) {
            match message {
                ModelMessage::Event(at) => self.gateway.on_event(at),
                ModelMessage::SessionEnded => self.gateway.on_session_ended(),
            }
        }
    }

    fn unsubscribe(&mut self) {
        if self.redis != ModelRedis::Down {
            self.redis = ModelRedis::Up { subscribed: false };
        }
    }

    /// The client reads a block.
    fn receive(&mut self, block: ModelBlock) {
        let client = &mut self.client;
        let ModelConnection::Open { after_session_end } = client.connection else { return };
        let violation = match block {
            ModelBlock::Event { at, session_confirmed } => {
                let next = ModelPosition { seq: client.cursor.seq + 1, ..client.cursor };
                client.cursor = at;
                if at != next || !self.feed.contains(at) {
                    Some(Violation::Order)
                } else if !session_confirmed || after_session_end {
                    Some(Violation::Session)
                } else {
                    None
                }
            }
            ModelBlock::Resync(head) => {
                // It loads everything up to the head by REST.
                let cursor = mem::replace(&mut client.cursor, head);
                self.feed.can_follow(cursor).then_some(Violation::NeedlessResync)
            }
            ModelBlock::Goodbye => {
                client.connection = ModelConnection::SessionEnded;
                None
            }
        };
        self.violation = self.violation.or(violation);
    }

    /// The client has every event, or knows that its session has ended.
    pub fn is_whole(&self) -> bool {
        match self.client.connection {
            ModelConnection::Closed => false,
            ModelConnection::Open { .. } => !self.feed.session_ended && self.client.cursor == self.feed.head,
            ModelConnection::SessionEnded => self.feed.session_ended,
        }
    }
}
