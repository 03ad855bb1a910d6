//! What the core asks its caller to do, and the names that both use.

use std::{num::NonZeroU32, sync::Arc};

use bytes::Bytes;
use protocol::{
    feed::Login,
    ids::{SessionId, UserId},
    position::{Position, Seq},
};

use super::explain::ClosedStream;
use crate::{event::EncodedEvent, frame::ResyncReason, metrics::DeliveryPath, trace::DeliveryTrace};

/// Names one connection, for as long as the process runs: indexes are reused, generations are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionKey {
    /// The slot of its socket.
    pub index: u32,
    pub generation: u32,
}

/// The slot of a user in the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UserSlot(pub u32);

/// Names one connection to Redis, for as long as the process runs. Never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RedisConnectionId(pub u32);

/// Distinguishes the requests of one connection.
pub type RequestId = NonZeroU32;

#[derive(Debug)]
pub enum Effect {
    /// Write these bytes, and report what the socket did not take by [`super::Hub::wrote`].
    Write {
        to: ConnectionKey,
        bytes: Bytes,
        event: Option<WrittenEvent>,
    },
    /// All is written: end our side of the connection, and wait for the client to close its side.
    FinishWriting(ConnectionKey),
    /// Release the socket. The hub has forgotten the connection.
    Close(ConnectionKey, Box<ClosedStream>),
    RequestRange(RangeRequest),
    RequestHead(HeadRequest),
    Subscribe(UserId),
    Unsubscribe(UserId),
    /// A stream of the user is live, or the last one has ended.
    Presence(UserId, bool),
    /// Remember that this session has ended.
    SessionEnded(UserId, SessionId),
    Observed(Observation),
}

/// The event among the bytes of a [`Effect::Write`].
#[derive(Debug)]
pub struct WrittenEvent {
    pub path: DeliveryPath,
    /// Milliseconds since 1970.
    pub created_at: i64,
    /// Only if the event is traced; and among how many streams of the user.
    pub trace: Option<(Arc<DeliveryTrace>, usize)>,
}

/// For metrics and the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observation {
    /// A socket takes no more bytes.
    Blocked,
    /// It has taken all of them, or is closed.
    Unblocked,
    /// A gap or an uncertain position is checked at `api`.
    PendingGap,
    /// A reconcile found events that Redis had not delivered.
    RecoveredFeed,
    /// The feed's position here is invalid, and its streams must resync.
    InvalidPosition { user: UserId, head: Position, why: ResyncReason },
    /// So many streams received an ephemeral event, and it was dropped for so many.
    Ephemeral { delivered: u32, dropped: u32 },
    /// A stream was told to resync.
    Resync { user: UserId, head: Position, why: ResyncReason },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requester {
    /// The sequencer of the user.
    User,
    Connection(ConnectionKey, RequestId),
}

/// Asks for the events after `after`.
#[derive(Debug, Clone, Copy)]
pub struct RangeRequest {
    pub user: UserId,
    pub after: Seq,
    pub requester: Requester,
    /// The user's position here at the time of the request.
    pub requested_at: Option<Position>,
}

impl RangeRequest {
    /// How its events reach the gateway.
    pub fn path(&self) -> DeliveryPath {
        match self.requester {
            Requester::User => DeliveryPath::Repair,
            Requester::Connection(..) => DeliveryPath::Replay,
        }
    }
}

#[derive(Debug, Clone)]
pub struct RangeAnswer {
    /// `None`: there is no such user.
    pub head: Option<Position>,
    /// Ascending, without gaps, up to the head; the first may be later than requested, because older ones may be pruned.
    pub events: Vec<EncodedEvent>,
    /// The range was cut short.
    pub more: bool,
}

/// Asks for the head of a feed and, with a session, whether that is this user's and has not ended.
#[derive(Debug, Clone, Copy)]
pub struct HeadRequest {
    pub user: UserId,
    /// The user's position here at the time of the request.
    pub requested_at: Option<Position>,
    pub why: HeadReason,
    pub session: Option<SessionId>,
}

impl HeadRequest {
    pub fn login(&self) -> Option<Login> {
        self.session.map(|session| Login { user: self.user, session })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadReason {
    /// The sequencer has no position yet, or lost it.
    Position,
    /// This connection joins; its session must be confirmed.
    Join(ConnectionKey),
    /// Redis has confirmed the subscription; events may have been committed before.
    Subscribed,
    /// The regular check of everybody, or the one after an uncertainty.
    Reconcile,
}
