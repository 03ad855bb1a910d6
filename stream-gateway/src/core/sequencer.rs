//! The order of one user's feed, as this process knows it: pure, no I/O and no clock of its own.
//!
//! It delivers each event once, in order, without gaps, from its position on; or it reports that the feed must resync. Only
//! answers from Postgres, and events that follow them without a gap, move the position. A gap, an event of another epoch or a
//! head beyond the position makes the feed uncertain: it waits a moment for reordered events and then requests what is missing.
//! A sequencer that is certain costs the size of its position.
//!
//! An answer may be older than live events that came after its request. So only a head below the position *at the time of
//! the request* means that the feed went back.

use std::collections::BTreeMap;

use protocol::position::{Epoch, Position, Seq};

use super::{
    Millis,
    rule::{Rule, kept},
};
use crate::frame::ResyncReason;

/// How long a gap may be a mere reordering before a request.
pub const REORDER_WAIT: Millis = 30;
/// Requests that brought nothing are repeated with doubling waits up to `REORDER_WAIT << MAX_BACKOFF`, about 4 s.
const MAX_BACKOFF: u32 = 7;
/// Live events buffered beyond a gap. More are dropped: the answer brings them.
pub const MAX_BUFFERED: usize = 64;

/// What the caller must do.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<E> {
    /// The next event of the feed.
    Deliver(Seq, E),
    /// Request the head of the feed (`None`) or the events after `after`, and bring the answer to [`Sequencer::answer`].
    Request { after: Option<Seq> },
    /// The position jumped to this head. Every stream that was at the old one must reload.
    Resync(ResyncReason, Position),
    /// There is no such user any more.
    Gone,
}

/// Postgres's answer to one request.
#[derive(Debug)]
pub struct FeedAnswer<E> {
    /// The position at the time of the request.
    pub requested_at: Option<Position>,
    /// `None`: there is no such user.
    pub head: Option<Position>,
    /// Ascending; empty when only the head was requested.
    pub events: Vec<(Seq, E)>,
    /// The events follow this one. `None`: only the head was requested.
    pub after: Option<Seq>,
    /// The range was cut short.
    pub more: bool,
}

impl<E> FeedAnswer<E> {
    pub fn head_only(requested_at: Option<Position>, head: Option<Position>) -> Self {
        Self { requested_at, head, events: vec![], after: None, more: false }
    }
}

#[derive(Debug)]
pub struct Sequencer<E> {
    position: Option<Position>,
    pending: Option<Box<Pending<E>>>,
}

/// What is known beyond the position, while the feed is uncertain.
#[derive(Debug)]
struct Pending<E> {
    /// Of the buffered events.
    epoch: Option<Epoch>,
    buffered: BTreeMap<Seq, E>,
    /// The feed is said to reach this far, by Redis or by Postgres.
    target: Seq,
    /// The furthest head in an answer: no older answer takes it back.
    known_head: Seq,
    /// Request even without a gap.
    must_check: bool,
    since: Millis,
    attempts: u32,
    /// A request is in flight; when it was made, the buffered events reached this far.
    requested: Option<Seq>,
}

impl<E> Pending<E> {
    /// Everything known belongs to another history.
    fn forget(&mut self) {
        self.buffered.clear();
        self.target = 0;
        self.known_head = 0;
    }
}

impl<E> Default for Sequencer<E> {
    fn default() -> Self {
        Self { position: None, pending: None }
    }
}

impl<E> Sequencer<E> {
    /// Everything up to here was delivered. `None` until Postgres first answered.
    pub fn position(&self) -> Option<Position> {
        self.position
    }

    /// Whether this feed may be behind and waits for a check.
    pub fn is_uncertain(&self) -> bool {
        self.pending.is_some()
    }

    /// Whether events wait for a gap before them.
    pub fn buffers_events(&self) -> bool {
        self.pending.as_ref().is_some_and(|pending| !pending.buffered.is_empty())
    }

    #[cfg(test)]
    pub fn buffered(&self) -> impl Iterator<Item = &E> {
        self.pending.iter().flat_map(|pending| pending.buffered.values())
    }

    /// Drops the events that wait for a gap: the feed has them.
    pub fn drop_buffered(&mut self) {
        if let Some(pending) = self.pending.as_deref_mut().filter(|pending| !pending.buffered.is_empty()) {
            pending.buffered.clear();
            // An answer under way may be older than they are.
            pending.must_check = true;
        }
    }

    /// When [`Self::tick`] wants to be called.
    pub fn due(&self) -> Option<Millis> {
        let pending = self.pending.as_ref()?;
        pending.requested.is_none().then(|| pending.since + (REORDER_WAIT << pending.attempts))
    }

    /// Moves the position to this event, if that is all there is to do: nothing is uncertain, and it is the next one.
    pub fn follow(&mut self, at: Position) -> bool {
        let follows =
            self.pending.is_none() && self.position.is_some_and(|position| position.is_followed_by(at));
        if follows {
            self.position = Some(at);
        }
        follows
    }

    /// An event came from Redis.
    pub fn live(&mut self, at: Position, event: E, now: Millis, steps: &mut Vec<Step<E>>) {
        if self.follow(at) {
            return steps.push(Step::Deliver(at.seq, event));
        }
        match self.position {
            Some(position) if position.epoch != at.epoch => self.mark_uncertain(now),
            Some(position) if at.seq <= position.seq => {}
            Some(position) if at.seq == position.seq + 1 => {
                self.deliver(at, event, steps);
                self.deliver_buffered(steps);
            }
            _ => self.buffer(at, event, now),
        }
    }

    /// The feed may be behind: request its head or range after the usual wait.
    pub fn mark_uncertain(&mut self, now: Millis) {
        self.pending(now).must_check = true;
    }

    /// Time has passed: requests what is due.
    pub fn tick(&mut self, now: Millis, steps: &mut Vec<Step<E>>) {
        if self.due().is_some_and(|due| due <= now) {
            self.request(steps);
        }
    }

    /// The answer to a [`Step::Request`].
    pub fn answer(&mut self, answer: FeedAnswer<E>, now: Millis, steps: &mut Vec<Step<E>>) {
        let before = self.position;
        let requested = self.pending(now).requested.take();
        let (head, more) = (answer.head, answer.more);
        self.observe(answer, now, steps);
        let moved = before != self.position;
        let Some(pending) = self.pending.as_deref_mut() else { return };
        pending.since = now;
        pending.attempts = if moved { 0 } else { (pending.attempts + 1).min(MAX_BACKOFF) };
        if let (Some(head), Some(buffered_to)) = (head, requested)
            && self.position.is_some_and(|position| position.epoch == head.epoch)
        {
            // Commit comes before publishing: an event buffered before the request is at or below the head, or never existed.
            pending.buffered.retain(|seq, _| *seq <= head.seq || *seq > buffered_to);
            pending.target =
                pending.buffered.keys().next_back().copied().unwrap_or(0).max(pending.known_head);
        }
        self.clear_if_resolved();
        if more && moved && self.due().is_some() {
            self.request(steps);
        }
    }

    /// An answer to another request about this feed: a connection's, or the reconcile's.
    pub fn observe(&mut self, answer: FeedAnswer<E>, now: Millis, steps: &mut Vec<Step<E>>) {
        let Some(head) = answer.head else {
            steps.push(Step::Gone);
            return;
        };
        let Some(position) = self.position else {
            return self.adopt(head, steps);
        };
        if head.epoch != position.epoch {
            if answer.requested_at.is_some_and(|requested_at| requested_at.epoch == position.epoch) {
                self.resync(ResyncReason::Unknown, head, steps);
            } else {
                self.mark_uncertain(now); // One of the two is outdated; a new request shows which.
            }
            return;
        }
        let then = if kept(Rule::AnswersAge) { answer.requested_at } else { self.position };
        let went_back =
            then.is_some_and(|requested_at| requested_at.epoch == head.epoch && head.seq < requested_at.seq);
        if went_back {
            return self.resync(ResyncReason::Future, head, steps);
        }
        let no_longer_kept = answer.after.is_some_and(|after| {
            let first = answer.events.first().map_or(head.seq + 1, |(seq, _)| *seq);
            after == position.seq && first > after + 1
        });
        if kept(Rule::Expired) && no_longer_kept {
            return self.resync(ResyncReason::Expired, head, steps);
        }
        for (seq, event) in answer.events {
            if self.position.is_some_and(|position| seq == position.seq + 1) {
                self.deliver(Position { epoch: head.epoch, seq }, event, steps);
            }
        }
        self.deliver_buffered(steps);
        if self.position.is_some_and(|position| head.seq > position.seq) {
            let pending = self.pending(now);
            pending.known_head = pending.known_head.max(head.seq);
            pending.target = pending.target.max(head.seq);
        }
    }

    fn adopt(&mut self, head: Position, steps: &mut Vec<Step<E>>) {
        self.position = Some(head);
        if let Some(pending) = self.pending.as_deref_mut().filter(|pending| pending.epoch != Some(head.epoch))
        {
            pending.epoch = Some(head.epoch);
            pending.forget();
        }
        self.deliver_buffered(steps);
    }

    fn resync(&mut self, why: ResyncReason, head: Position, steps: &mut Vec<Step<E>>) {
        steps.push(Step::Resync(why, head));
        if let Some(pending) = self.pending.as_deref_mut().filter(|_| why != ResyncReason::Expired) {
            pending.forget(); // The buffered events are from another history. An expired feed continues.
        }
        self.adopt(head, steps);
    }

    fn deliver(&mut self, at: Position, event: E, steps: &mut Vec<Step<E>>) {
        self.position = Some(at);
        steps.push(Step::Deliver(at.seq, event));
    }

    fn deliver_buffered(&mut self, steps: &mut Vec<Step<E>>) {
        let Some(pending) = self.pending.as_deref_mut() else { return };
        while let (Some(position), Some(first)) = (self.position.as_mut(), pending.buffered.first_entry()) {
            if *first.key() > position.seq + 1 {
                break;
            }
            let (seq, event) = first.remove_entry();
            if seq == position.seq + 1 {
                position.seq = seq;
                steps.push(Step::Deliver(seq, event));
            }
        }
        self.clear_if_resolved();
    }

    fn buffer(&mut self, at: Position, event: E, now: Millis) {
        let pending = self.pending(now);
        if pending.epoch != Some(at.epoch) {
            pending.forget();
            pending.epoch = Some(at.epoch);
        }
        pending.target = pending.target.max(at.seq);
        pending.buffered.insert(at.seq, event);
        if pending.buffered.len() > MAX_BUFFERED {
            pending.buffered.pop_last(); // The nearest ones become deliverable first.
        }
    }

    fn pending(&mut self, now: Millis) -> &mut Pending<E> {
        let position = self.position;
        self.pending.get_or_insert_with(|| {
            Box::new(Pending {
                epoch: position.map(|position| position.epoch),
                buffered: BTreeMap::new(),
                target: 0,
                known_head: 0,
                must_check: false,
                since: now,
                attempts: 0,
                requested: None,
            })
        })
    }

    fn request(&mut self, steps: &mut Vec<Step<E>>) {
        if let Some(pending) = self.pending.as_deref_mut() {
            let buffered_to = pending.buffered.keys().next_back().copied().unwrap_or(0);
            pending.requested = Some(buffered_to);
            pending.must_check = false; // If it is set again from here on, this answer is too old.
            steps.push(Step::Request { after: self.position.map(|position| position.seq) });
        }
    }

    fn clear_if_resolved(&mut self) {
        let resolved = self.pending.as_ref().is_some_and(|pending| {
            let reached = self.position.is_some_and(|position| pending.target <= position.seq);
            reached && pending.buffered.is_empty() && !pending.must_check && pending.requested.is_none()
        });
        if resolved {
            self.pending = None;
        }
    }
}

/// What an answer says about a client's own cursor.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The events follow the cursor.
    Follows,
    Resync(ResyncReason),
    /// There is no such user.
    Gone,
}

/// Judges a cursor by an answer to a request made after the cursor came. `first`: the first event of the answer.
pub fn judge(cursor: Position, head: Option<Position>, first: Option<Seq>) -> Verdict {
    let Some(head) = head else { return Verdict::Gone };
    if head.epoch != cursor.epoch {
        return Verdict::Resync(ResyncReason::Unknown);
    }
    match head.seq.cmp(&cursor.seq) {
        std::cmp::Ordering::Less => Verdict::Resync(ResyncReason::Future),
        std::cmp::Ordering::Equal => Verdict::Follows,
        std::cmp::Ordering::Greater if first == Some(cursor.seq + 1) => Verdict::Follows,
        std::cmp::Ordering::Greater => Verdict::Resync(ResyncReason::Expired),
    }
}

#[cfg(test)]
mod tests;
