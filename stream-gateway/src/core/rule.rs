//! The rules that keep the promise, each at one place of the core. The simulation removes them one by one, and must find a
//! schedule that breaks a promise without each.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// A stream receives nothing before its session is confirmed.
    SessionFirst,
    /// Only the answer to a stream's own request confirms its session.
    OwnAnswer,
    /// A stream whose session has ended is closed.
    EndedSession,
    /// A block is written whole before the next one begins.
    WholeBlocks,
    /// A stream receives only the event that follows its last one.
    NextEvent,
    /// A cursor is judged by an answer before any event follows it.
    JudgedCursor,
    /// A cursor is not judged by another history than the user's position.
    OneHistory,
    /// When a resync follows, only that moves the client's cursor.
    OnlyResyncMoves,
    /// An invalid position of the feed is one of its streams, too.
    ResyncReachesStreams,
    /// Replay buffers stay within the bound of the process.
    Bounded,
    /// A stream whose socket takes every byte loses nothing to that bound.
    LiveFirst,
    /// A stream whose socket takes nothing is cut.
    WriteDeadline,
    /// An event does not wait in memory for long, because its text may be deleted meanwhile.
    Aged,
    /// A stream that drops its page no longer counts against that bound.
    Released,
    /// A replay buffer keeps nothing that every stream has.
    Trimmed,
    /// A lagging stream reads from the feed what is not buffered.
    LaggingReads,
    /// A gap is requested.
    GapRequested,
    /// A feed that no longer has the missing events must resync.
    Expired,
    /// A head is compared with the position at the time of its request.
    AnswersAge,
    /// Every feed is reconciled, because any event may be lost.
    Reconciled,
    /// Only a live stream receives an ephemeral event.
    EphemeralLive,
    /// A stream whose socket is blocked keeps no ephemeral event.
    EphemeralUnblocked,
}

/// Always, unless a test has removed the rule.
#[cfg(not(test))]
pub const fn kept(_: Rule) -> bool {
    true
}

#[cfg(test)]
thread_local! {
    static REMOVED: std::cell::Cell<Option<Rule>> = const { std::cell::Cell::new(None) };
}

#[cfg(test)]
pub fn kept(rule: Rule) -> bool {
    REMOVED.get() != Some(rule)
}

#[cfg(test)]
impl Rule {
    pub const ALL: [Self; 22] = [
        Self::SessionFirst,
        Self::OwnAnswer,
        Self::EndedSession,
        Self::WholeBlocks,
        Self::NextEvent,
        Self::JudgedCursor,
        Self::OneHistory,
        Self::OnlyResyncMoves,
        Self::ResyncReachesStreams,
        Self::Bounded,
        Self::LiveFirst,
        Self::WriteDeadline,
        Self::Aged,
        Self::Released,
        Self::Trimmed,
        Self::LaggingReads,
        Self::GapRequested,
        Self::Expired,
        Self::AnswersAge,
        Self::Reconciled,
        Self::EphemeralLive,
        Self::EphemeralUnblocked,
    ];
}

/// Runs `test` without this rule.
#[cfg(test)]
pub fn without<T>(rule: Rule, test: impl FnOnce() -> T) -> T {
    REMOVED.set(Some(rule));
    let result = test();
    REMOVED.set(None);
    result
}
