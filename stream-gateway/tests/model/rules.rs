//! The rules that keep the promise.

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProtocolRule {
    /// api: a number is assigned under the lock of the head row, so commit order is number order.
    NumberUnderLock,
    /// api: an event is published after its commit.
    CommitBeforePublish,
    /// api: head and rows of an answer come from one snapshot.
    OneSnapshot,
    /// What a join needs is requested after Redis has confirmed the subscription, or has been lost.
    SubscribeBeforeRequest,
    /// After Redis was lost, the head is requested again when it confirms the subscription.
    RequestAfterReconnect,
    /// No event is written before the session is confirmed.
    ConfirmSessionFirst,
    /// Only an answer requested after the stream opened confirms its session.
    ConfirmByLaterAnswer,
    /// Only an answer requested after a cursor came judges that cursor, as it was at the request.
    JudgeByLaterAnswer,
    /// An event at or below the position is dropped.
    DropOldEvents,
    /// An event beyond a gap is buffered.
    BufferBeyondGap,
    /// The events up to a buffered event or a known head are requested.
    RequestGap,
    /// An event of another epoch makes the position uncertain.
    CheckOtherEpoch,
    /// An answer's head is compared with the position at the time of its request.
    CompareHeadAtRequest,
    /// An answer of another epoch counts only if its request was made in the position's epoch.
    CompareEpochAtRequest,
    /// A range whose first event does not follow the cursor means that the cursor has expired.
    RangeFollowsCursor,
    /// A resync moves the stream's cursor to the new position.
    ResyncMovesCursor,
    /// A stream that is ahead of the sequencer's lost position keeps its cursor.
    ResyncOnlyLostStreams,
    /// A stream whose cursor is in another epoch than the sequencer's position is judged again.
    JudgeOtherEpochAgain,
    /// A request without an answer is repeated.
    RepeatRequests,
    /// The heads of all connected users are requested at every tick.
    Reconcile,
    /// The reconcile also checks the sessions of all streams.
    ReconcileSessions,
    /// The client reconnects with its cursor.
    ReconnectWithCursor,
}

/// All rules, or all but one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ProtocolRules {
    pub removed: Option<ProtocolRule>,
}

impl ProtocolRules {
    pub const ALL: Self = Self { removed: None };

    pub fn keep(self, rule: ProtocolRule) -> bool {
        self.removed != Some(rule)
    }
}
