//! api with its feed in Postgres, Redis, and the client: what happens around the gateway, and what may fail.

use std::{collections::BTreeSet, mem};

use crate::{
    gateway::{Answer, Block, Gateway, Position, Purpose, Subscription},
    rules::{Rule, Rules},
};

/// One user's feed and session in Postgres.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Feed {
    pub head: Position,
    /// The head that a restore took away.
    lost_head: Option<Position>,
    /// Events that are no longer kept, always the oldest.
    pruned: u8,
    /// Numbered but not committed; only without one of api's rules.
    uncommitted: Option<Position>,
    pub session_ended: bool,
    commits: u8,
}

/// A message from api to Redis. Until it reaches the gateway or is lost, others may overtake it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Message {
    Event(Position),
    SessionEnded,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Redis {
    /// A message reaches the gateway if the gateway is subscribed at that moment.
    Up {
        subscribed: bool,
    },
    Down,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Connection {
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
struct Client {
    cursor: Position,
    connection: Connection,
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
pub enum Fault {
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

impl Fault {
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
pub enum Action {
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
    Fault(Fault, usize),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    pub feed: Feed,
    messages: Vec<Message>,
    redis: Redis,
    pub gateway: Gateway,
    client: Client,
    faults: BTreeSet<Fault>,
    /// The newest event was published, or will be.
    pub head_published: bool,
    /// A reconcile began and nothing else has happened since: another one would bring the same.
    reconciled: bool,
    pub violation: Option<Violation>,
}

impl Feed {
    pub fn read(&self, after: Option<u8>) -> Answer {
        let rows = after.into_iter().flat_map(|after| after.max(self.pruned) + 1..=self.head.seq);
        let rows = rows.filter(|seq| self.contains(Position { seq: *seq, ..self.head }));
        Answer { head: self.head, rows: rows.collect(), session_ended: self.session_ended }
    }

    /// Whether this event is, or was before a restore, in the feed.
    fn contains(&self, at: Position) -> bool {
        let mut heads = self.lost_head.into_iter().chain([self.head]);
        heads.any(|head| at.epoch == head.epoch && at.seq <= head.seq) && self.uncommitted != Some(at)
    }

    /// Whether the feed still has all events after this cursor.
    fn can_follow(&self, cursor: Position) -> bool {
        cursor.epoch == self.head.epoch && (self.pruned..=self.head.seq).contains(&cursor.seq)
    }
}

impl State {
    pub fn new(rules: Rules) -> Self {
        let start = Position { epoch: 1, seq: 0 };
        let feed = Feed {
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
            redis: Redis::Up { subscribed: false },
            gateway: Gateway::new(rules),
            client: Client { cursor: start, connection: Connection::Closed },
            faults: BTreeSet::new(),
            head_published: true,
            reconciled: false,
            violation: None,
        }
    }

    /// What the parts do by themselves, but for the reconcile.
    pub fn steps(&self, actions: &mut Vec<Action>) {
        if self.feed.uncommitted.is_some() {
            actions.push(Action::Commit);
        }
        actions.extend((0..self.messages.len()).map(Action::Publish));
        match (self.redis, self.gateway.subscription) {
            (Redis::Up { subscribed: false }, Subscription::Requested) => actions.push(Action::Subscribe),
            (Redis::Up { subscribed: true }, Subscription::Requested) => {
                actions.push(Action::ConfirmSubscription);
            }
            (Redis::Up { subscribed: false }, Subscription::Confirmed) => {
                actions.push(Action::DetectRedisLoss);
            }
            (Redis::Down, _) if self.gateway.has_user() && !self.gateway.degraded => {
                actions.push(Action::DetectRedisLoss);
            }
            _ => {}
        }
        let requests = self.gateway.requests.iter().enumerate();
        actions.extend(requests.map(|(index, request)| match request.answer {
            None => Action::ReadFeed(index),
            Some(_) => Action::DeliverAnswer(index),
        }));
        if self.client.connection == Connection::Closed {
            actions.push(Action::OpenStream);
        }
    }

    pub fn is_reconcile_due(&self) -> bool {
        let gateway = &self.gateway;
        gateway.rules.keep(Rule::Reconcile)
            && gateway.has_user()
            && !gateway.is_reconciling()
            && !self.reconciled
    }

    /// What users, operators and misfortune may do next.
    pub fn choices(&self, commits: u8, faults: usize, actions: &mut Vec<Action>) {
        let rules = self.gateway.rules;
        let Self { feed, gateway, .. } = self;
        if feed.commits < commits {
            if feed.uncommitted.is_none() || rules.keep(Rule::CommitBeforePublish) {
                actions.push(Action::Post);
            }
            if feed.uncommitted.is_none() && !rules.keep(Rule::NumberUnderLock) {
                actions.push(Action::PostWithoutLock);
            }
        }
        if self.redis == Redis::Down {
            actions.push(Action::StartRedis);
        }
        if gateway.has_user() && gateway.stream.is_none() {
            actions.push(Action::ForgetUser);
        }
        let faults = if self.faults.len() < faults { &Fault::ALL[..] } else { &[] };
        for &fault in faults.iter().filter(|fault| !self.faults.contains(fault)) {
            actions.extend((0..self.ways(fault)).map(|way| Action::Fault(fault, way)));
        }
    }

    /// In how many ways this fault can happen now.
    fn ways(&self, fault: Fault) -> usize {
        let is_open = matches!(self.client.connection, Connection::Open { .. });
        match fault {
            Fault::LosePublish | Fault::RepeatPublish => self.messages.len(),
            Fault::LoseAnswer => self.gateway.requests.len(),
            Fault::StopRedis => usize::from(self.redis != Redis::Down),
            Fault::RestartGateway => usize::from(self.gateway.has_user()),
            Fault::Disconnect if is_open => 1 + usize::from(self.client.cursor.seq > 0),
            Fault::Disconnect => 0,
            Fault::Reload => usize::from(is_open),
            Fault::Prune => usize::from(self.feed.pruned < self.feed.head.seq),
            Fault::Restore => usize::from(self.feed.head.seq > 0),
            Fault::EndSession => usize::from(!self.feed.session_ended),
        }
    }

    pub fn apply(&mut self, action: Action) {
        let continues_reconcile = match action {
            Action::Reconcile => true,
            Action::ReadFeed(index) | Action::DeliverAnswer(index) => {
                self.gateway.requests[index].purpose == Purpose::Reconcile
            }
            _ => false,
        };
        self.reconciled = continues_reconcile && (self.reconciled || action == Action::Reconcile);

        let Self { feed, messages, redis, gateway, client, .. } = self;
        let rules = gateway.rules;
        match action {
            Action::Commit => {
                if let Some(at) = feed.uncommitted.take() {
                    feed.head = feed.head.max(at);
                    if rules.keep(Rule::CommitBeforePublish) {
                        messages.push(Message::Event(at));
                    }
                }
            }
            Action::Publish(index) => {
                let message = messages.remove(index);
                self.publish(message);
            }
            Action::Subscribe => *redis = Redis::Up { subscribed: true },
            Action::ConfirmSubscription => gateway.on_subscribed(),
            Action::DetectRedisLoss => gateway.on_redis_lost(),
            Action::ReadFeed(index) => {
                let request = &mut gateway.requests[index];
                request.answer = Some(feed.read(request.after));
                gateway.requests.sort();
            }
            Action::DeliverAnswer(index) => {
                let mut request = gateway.requests.remove(index);
                if let Some(mut answer) = request.answer.take() {
                    if !rules.keep(Rule::OneSnapshot) {
                        answer.head = feed.head;
                    }
                    gateway.on_answer(&request, &answer);
                }
            }
            Action::OpenStream => {
                client.connection = Connection::Open { after_session_end: feed.session_ended };
                let cursor = if rules.keep(Rule::ReconnectWithCursor) { client.cursor } else { feed.head };
                gateway.open_stream(cursor);
            }
            Action::Reconcile => gateway.reconcile(),
            Action::Post => {
                feed.commits += 1;
                let last = feed.uncommitted.unwrap_or(feed.head);
                let at = Position { seq: last.seq + 1, ..last };
                if rules.keep(Rule::CommitBeforePublish) {
                    feed.head = at;
                } else {
                    feed.uncommitted = Some(at);
                }
                messages.push(Message::Event(at));
                self.head_published = true;
            }
            Action::PostWithoutLock => {
                feed.commits += 1;
                feed.uncommitted = Some(Position { seq: feed.head.seq + 1, ..feed.head });
            }
            Action::StartRedis => *redis = Redis::Up { subscribed: false },
            Action::ForgetUser => {
                gateway.forget_user();
                self.unsubscribe();
            }
            Action::Fault(fault, way) => {
                self.faults.insert(fault);
                self.fail(fault, way);
            }
        }
        self.messages.sort_unstable();
        for block in mem::take(&mut self.gateway.written) {
            self.receive(block);
        }
    }

    fn fail(&mut self, fault: Fault, way: usize) {
        let Self { feed, messages, gateway, client, .. } = self;
        match fault {
            Fault::LosePublish => {
                let lost = messages.remove(way);
                self.head_published &= lost != Message::Event(feed.head);
            }
            Fault::RepeatPublish => {
                let message = messages[way];
                self.publish(message);
            }
            Fault::LoseAnswer if gateway.rules.keep(Rule::RepeatRequests) => {
                gateway.requests[way].answer = None;
                gateway.requests.sort();
            }
            Fault::LoseAnswer => drop(gateway.requests.remove(way)),
            Fault::StopRedis => self.redis = Redis::Down,
            Fault::RestartGateway => {
                *gateway = Gateway::new(gateway.rules);
                if client.connection != Connection::SessionEnded {
                    client.connection = Connection::Closed;
                }
                self.unsubscribe();
            }
            Fault::Disconnect => {
                gateway.close_stream();
                client.connection = Connection::Closed;
                client.cursor.seq -= way as u8; // So many events were written, but not read.
            }
            Fault::Reload => {
                gateway.close_stream();
                *client = Client { cursor: feed.head, connection: Connection::Closed };
            }
            Fault::Prune => feed.pruned += 1,
            Fault::Restore => {
                let Position { epoch, seq } = feed.head;
                feed.lost_head = Some(feed.head);
                feed.head = Position { epoch: epoch + 1, seq: seq - 1 };
                feed.pruned = feed.pruned.min(feed.head.seq);
                self.head_published = false;
            }
            Fault::EndSession => {
                feed.session_ended = true;
                messages.push(Message::SessionEnded);
            }
        }
    }

    fn publish(&mut self, message: Message) {
        if self.redis == (Redis::Up { subscribed: true }) {
            match message {
                Message::Event(at) => self.gateway.on_event(at),
                Message::SessionEnded => self.gateway.on_session_ended(),
            }
        }
    }

    fn unsubscribe(&mut self) {
        if self.redis != Redis::Down {
            self.redis = Redis::Up { subscribed: false };
        }
    }

    /// The client reads a block.
    fn receive(&mut self, block: Block) {
        let client = &mut self.client;
        let Connection::Open { after_session_end } = client.connection else { return };
        let violation = match block {
            Block::Event { at, session_confirmed } => {
                let next = Position { seq: client.cursor.seq + 1, ..client.cursor };
                client.cursor = at;
                if at != next || !self.feed.contains(at) {
                    Some(Violation::Order)
                } else if !session_confirmed || after_session_end {
                    Some(Violation::Session)
                } else {
                    None
                }
            }
            Block::Resync(head) => {
                // It loads everything up to the head by REST.
                let cursor = mem::replace(&mut client.cursor, head);
                self.feed.can_follow(cursor).then_some(Violation::NeedlessResync)
            }
            Block::Goodbye => {
                client.connection = Connection::SessionEnded;
                None
            }
        };
        self.violation = self.violation.or(violation);
    }

    /// The client has every event, or knows that its session has ended.
    pub fn is_whole(&self) -> bool {
        match self.client.connection {
            Connection::Closed => false,
            Connection::Open { .. } => !self.feed.session_ended && self.client.cursor == self.feed.head,
            Connection::SessionEnded => self.feed.session_ended,
        }
    }
}
