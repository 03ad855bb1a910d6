//! The order of one user's feed, as this process knows it: pure, no I/O and no clock of its own.
//!
//! It promises that what it delivers is contiguous: each event once, in order, from its place on, or else it says that the
//! place is lost. Only answers from Postgres, and what follows them without a hole, move the place. Whatever is in doubt (a
//! hole, an event of a foreign epoch, a head beyond ours) waits a moment for reordering and is then asked about; while
//! nothing is in doubt a sequencer costs the size of its place.
//!
//! An answer is judged by what was known when its question was asked: it may be older than live events that came since, so
//! only a head below the place *at the time of asking* means that the feed went back.

use std::collections::BTreeMap;

use protocol::position::{Epoch, Position, Seq};

/// Milliseconds on the caller's monotonic clock.
pub type Millis = u64;

/// How long a hole may be a mere reordering before it is asked about.
pub const REORDER_WAIT: Millis = 30;
/// Questions that brought nothing are repeated with doubling waits up to `REORDER_WAIT << MAX_PATIENCE`, about 4 s.
const MAX_PATIENCE: u32 = 7;
/// Live events kept beyond a hole. More are dropped: the answer brings them.
pub const MAX_HELD: usize = 64;

/// Why a place is lost, in the contract's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lost {
    /// The feed is another one: a foreign or redrawn epoch.
    Unknown,
    /// Events after the place are no longer kept.
    Expired,
    /// The place is beyond the head: the database went back.
    Future,
}

impl Lost {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Expired => "expired",
            Self::Future => "future",
        }
    }
}

/// What the caller must do.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<E> {
    /// The next event of the feed.
    Deliver(Seq, E),
    /// Ask Postgres where the feed ends (`None`) or what follows `after`, and bring the answer to [`Sequencer::answer`].
    Ask { after: Option<Seq> },
    /// The place is lost and is now the head. Everybody who was at the old one must reload.
    Lost(Lost, Position),
    /// There is no such user any more.
    Gone,
}

/// Postgres's answer to one question.
#[derive(Debug)]
pub struct Answer<E> {
    /// The place that was known when the question was asked.
    pub asked_at: Option<Position>,
    /// `None`: there is no such user.
    pub head: Option<Position>,
    /// What follows, ascending; empty when only the head was asked for.
    pub events: Vec<(Seq, E)>,
    /// The events follow this place. `None`: only the head was asked for.
    pub after: Option<Seq>,
    /// The range was cut short.
    pub more: bool,
}

#[derive(Debug)]
pub struct Sequencer<E> {
    place: Option<Position>,
    doubt: Option<Box<Doubt<E>>>,
}

/// What is known beyond the place. Exists only while something is open.
#[derive(Debug)]
struct Doubt<E> {
    /// Live events of `epoch` beyond the place.
    epoch: Option<Epoch>,
    held: BTreeMap<Seq, E>,
    /// The feed is said to reach this far, by Redis or by Postgres.
    target: Seq,
    /// The furthest head that Postgres told: no older answer takes it back.
    told: Seq,
    /// Something is wrong that a hole does not show: ask in any case.
    suspicion: bool,
    since: Millis,
    patience: u32,
    /// A question is on its way, asked when the held events reached this far.
    asked: Option<Asked>,
}

#[derive(Debug)]
struct Asked {
    held_to: Seq,
}

impl<E> Doubt<E> {
    /// Nothing that was said of the feed holds any more.
    fn forget(&mut self) {
        self.held.clear();
        self.target = 0;
        self.told = 0;
    }
}

impl<E> Default for Sequencer<E> {
    fn default() -> Self {
        Self { place: None, doubt: None }
    }
}

impl<E> Sequencer<E> {
    /// The place: everything up to it was delivered. `None` until Postgres first answered.
    pub fn place(&self) -> Option<Position> {
        self.place
    }

    /// Whether something is open: held beyond a hole, said to exist, or asked about.
    pub fn in_doubt(&self) -> bool {
        self.doubt.is_some()
    }

    /// When [`Self::tick`] wants to be called.
    pub fn due(&self) -> Option<Millis> {
        let doubt = self.doubt.as_ref()?;
        doubt.asked.is_none().then(|| doubt.since + (REORDER_WAIT << doubt.patience))
    }

    /// An event came from Redis.
    pub fn live(&mut self, at: Position, event: E, now: Millis, steps: &mut Vec<Step<E>>) {
        match self.place {
            Some(place) if place.epoch != at.epoch => self.suspect(now),
            Some(place) if at.seq <= place.seq => {}
            Some(place) if at.seq == place.seq + 1 => {
                self.deliver(at, event, steps);
                self.deliver_held(steps);
            }
            _ => self.hold(at, event, now),
        }
    }

    /// Something may be wrong: ask Postgres after the usual wait.
    pub fn suspect(&mut self, now: Millis) {
        self.open(now).suspicion = true;
    }

    /// Time has passed: asks if a doubt is due.
    pub fn tick(&mut self, now: Millis, steps: &mut Vec<Step<E>>) {
        if self.due().is_some_and(|due| due <= now) {
            self.ask(steps);
        }
    }

    /// The answer to a question of [`Step::Ask`].
    pub fn answer(&mut self, answer: Answer<E>, now: Millis, steps: &mut Vec<Step<E>>) {
        let before = self.place;
        let asked = self.open(now).asked.take();
        let (head, more) = (answer.head, answer.more);
        self.observe(answer, now, steps);
        let moved = before != self.place;
        let Some(doubt) = self.doubt.as_deref_mut() else { return };
        doubt.since = now;
        doubt.patience = if moved { 0 } else { (doubt.patience + 1).min(MAX_PATIENCE) };
        if let (Some(head), Some(asked)) = (head, asked)
            && self.place.is_some_and(|place| place.epoch == head.epoch)
        {
            // Commit comes before publishing, so what we held when we asked exists up to the head, or was never true.
            doubt.held.retain(|seq, _| *seq <= head.seq || *seq > asked.held_to);
            doubt.target = doubt.held.keys().next_back().copied().unwrap_or(0).max(doubt.told);
        }
        self.settle();
        if more && moved && self.due().is_some() {
            self.ask(steps);
        }
    }

    /// An answer to somebody else's question about this feed: a connection's, or the reconcile's.
    pub fn observe(&mut self, answer: Answer<E>, now: Millis, steps: &mut Vec<Step<E>>) {
        let Some(head) = answer.head else {
            steps.push(Step::Gone);
            return;
        };
        let Some(place) = self.place else {
            return self.adopt(head, steps);
        };
        if head.epoch != place.epoch {
            if answer.asked_at.is_some_and(|asked_at| asked_at.epoch == place.epoch) {
                self.lose(Lost::Unknown, head, steps);
            } else {
                self.suspect(now); // One of the two is old news: a question asked now tells which.
            }
            return;
        }
        let went_back =
            answer.asked_at.is_some_and(|asked_at| asked_at.epoch == head.epoch && head.seq < asked_at.seq);
        if went_back {
            return self.lose(Lost::Future, head, steps);
        }
        let no_longer_kept = answer.after.is_some_and(|after| {
            let first = answer.events.first().map_or(head.seq + 1, |(seq, _)| *seq);
            after == place.seq && first > after + 1
        });
        if no_longer_kept {
            return self.lose(Lost::Expired, head, steps);
        }
        for (seq, event) in answer.events {
            if self.place.is_some_and(|place| seq == place.seq + 1) {
                self.deliver(Position { epoch: head.epoch, seq }, event, steps);
            }
        }
        self.deliver_held(steps);
        if self.place.is_some_and(|place| head.seq > place.seq) {
            let doubt = self.open(now);
            doubt.told = doubt.told.max(head.seq);
            doubt.target = doubt.target.max(head.seq);
        }
    }

    fn adopt(&mut self, head: Position, steps: &mut Vec<Step<E>>) {
        self.place = Some(head);
        if let Some(doubt) = self.doubt.as_deref_mut().filter(|doubt| doubt.epoch != Some(head.epoch)) {
            doubt.epoch = Some(head.epoch);
            doubt.forget();
        }
        self.deliver_held(steps);
    }

    fn lose(&mut self, why: Lost, head: Position, steps: &mut Vec<Step<E>>) {
        steps.push(Step::Lost(why, head));
        if let Some(doubt) = self.doubt.as_deref_mut().filter(|_| why != Lost::Expired) {
            doubt.forget(); // What was held belongs to the history that we lost. An expired feed goes on where it was.
        }
        self.adopt(head, steps);
    }

    fn deliver(&mut self, at: Position, event: E, steps: &mut Vec<Step<E>>) {
        self.place = Some(at);
        steps.push(Step::Deliver(at.seq, event));
    }

    /// What was held and now follows.
    fn deliver_held(&mut self, steps: &mut Vec<Step<E>>) {
        let Some(doubt) = self.doubt.as_deref_mut() else { return };
        while let (Some(place), Some(first)) = (self.place.as_mut(), doubt.held.first_entry()) {
            if *first.key() > place.seq + 1 {
                break;
            }
            let (seq, event) = first.remove_entry();
            if seq == place.seq + 1 {
                place.seq = seq;
                steps.push(Step::Deliver(seq, event));
            }
        }
        self.settle();
    }

    fn hold(&mut self, at: Position, event: E, now: Millis) {
        let doubt = self.open(now);
        if doubt.epoch != Some(at.epoch) {
            doubt.forget();
            doubt.epoch = Some(at.epoch);
        }
        doubt.target = doubt.target.max(at.seq);
        doubt.held.insert(at.seq, event);
        if doubt.held.len() > MAX_HELD {
            doubt.held.pop_last(); // The nearest ones are of use first.
        }
    }

    fn open(&mut self, now: Millis) -> &mut Doubt<E> {
        let place = self.place;
        self.doubt.get_or_insert_with(|| {
            Box::new(Doubt {
                epoch: place.map(|place| place.epoch),
                held: BTreeMap::new(),
                target: 0,
                told: 0,
                suspicion: false,
                since: now,
                patience: 0,
                asked: None,
            })
        })
    }

    fn ask(&mut self, steps: &mut Vec<Step<E>>) {
        if let Some(doubt) = self.doubt.as_deref_mut() {
            let held_to = doubt.held.keys().next_back().copied().unwrap_or(0);
            doubt.asked = Some(Asked { held_to });
            doubt.suspicion = false; // One that arises from here on needs another question.
            steps.push(Step::Ask { after: self.place.map(|place| place.seq) });
        }
    }

    /// Forgets a doubt that nothing is left of.
    fn settle(&mut self) {
        let closed = self.doubt.as_ref().is_some_and(|doubt| {
            let reached = self.place.is_some_and(|place| doubt.target <= place.seq);
            reached && doubt.held.is_empty() && !doubt.suspicion && doubt.asked.is_none()
        });
        if closed {
            self.doubt = None;
        }
    }
}

/// What an answer says about a client's own cursor.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The events follow the cursor.
    Follows,
    Lost(Lost),
    /// There is no such user.
    Gone,
}

/// Judges a cursor by the answer to "what follows it?", asked after the cursor came. `first`: the first event of the answer.
pub fn judge(cursor: Position, head: Option<Position>, first: Option<Seq>) -> Verdict {
    let Some(head) = head else { return Verdict::Gone };
    if head.epoch != cursor.epoch {
        return Verdict::Lost(Lost::Unknown);
    }
    match head.seq.cmp(&cursor.seq) {
        std::cmp::Ordering::Less => Verdict::Lost(Lost::Future),
        std::cmp::Ordering::Equal => Verdict::Follows,
        std::cmp::Ordering::Greater if first == Some(cursor.seq + 1) => Verdict::Follows,
        std::cmp::Ordering::Greater => Verdict::Lost(Lost::Expired),
    }
}

#[cfg(test)]
mod tests;
