//! One stream: a position in its user's feed, and the bytes that its socket did not take.
//!
//! It has no queue: it takes the events after its position from its user's replay buffer, or a page at a time from the feed.
//!
//! ```text
//!            session confirmed, then
//!  open ──▶ Joining ──── head ────▶ Live ◀──────────────────────┐
//!              │ │                   │ lags beyond the buffer   │ written
//!              │ └───── range ───┐   ▼                          │
//!              │                 └▶ CatchingUp: requested ──▶ page
//!              │ cursor invalid      │ position invalid, as of Live
//!              ▼                     ▼
//!           Resyncing ── `resync` written ──▶ Live, at the head
//!
//!  any state ── goodbye ──▶ Closing ──▶ closed by the client, or cut
//! ```

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use protocol::{
    claims::KeyName,
    ids::{SessionId, UserId},
    position::{Epoch, Position, Seq},
};
use rand::RngExt;

use super::{
    Millis,
    effect::{
        ConnectionKey, Effect, HeadReason, Observation, RangeAnswer, RequestId, Requester, WrittenEvent,
    },
    explain::ClosedStream,
    replay::ReplayBuffer,
    rule::{Rule, kept},
    sequencer::{Verdict, judge},
    user::Context,
    wheel::{Due, due_at, slot_of},
};
use crate::{
    event::EncodedEvent,
    frame::{self, Chunk, Framing, Goodbye, Heartbeat, ResyncReason},
};

/// A socket takes a block within this time, however slowly, or is cut: the rest of a block must be written, and may be a text that was
/// deleted meanwhile.
pub const BLOCK_WITHIN: Millis = 54_000;
/// A closing stream is cut after this long.
pub const GOODBYE_WITHIN: Millis = 3_000;
/// The same when the token or the session has ended: a lagging client must not gain time.
const EXPIRED_WITHIN: Millis = 500;
const REVOKED_WITHIN: Millis = 1_000;

/// What a client says about its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// It sent no cursor: start at the head.
    Head,
    After(Position),
    /// It sent something that is not a cursor.
    Invalid,
}

/// A stream that was admitted.
pub struct NewConnection {
    pub user: UserId,
    /// None: a token of the external issuer, which has no session.
    pub session: Option<SessionId>,
    /// The key that signed the token.
    pub signed_by: KeyName,
    pub resume: Resume,
    pub heartbeat: Heartbeat,
    pub framing: Framing,
    /// The head of the HTTP response and the first `retry`; empty if they are written already.
    pub head: Bytes,
    /// When the stream ends at the latest, and why.
    pub ends_at: Millis,
    pub ends_why: Goodbye,
}

pub struct Connection {
    pub key: ConnectionKey,
    pub session: Option<SessionId>,
    pub signed_by: KeyName,
    state: State,
    /// The last event written. While joining: the client's cursor.
    position: Position,
    /// The events after this one are sent; moved by a resync.
    started_after: Seq,
    unwritten: Option<Box<Unwritten>>,
    /// An [`Effect::Write`] is not reported yet.
    writing: bool,
    heartbeat: Heartbeat,
    framing: Framing,
    ends_why: Goodbye,
    heartbeat_at: Due,
    ends_at: Due,
    /// The connection's valid entry in the wheel.
    due: Due,
}

#[derive(Debug)]
enum State {
    /// Its position is not known, or not confirmed yet. It receives no event.
    Joining(Joining),
    /// Its next event is written when it comes. With unwritten bytes, it is taken from the replay buffer afterwards.
    Live,
    /// Its next events are read from the feed.
    CatchingUp(Missed),
    /// The `resync` is written as soon as the socket takes it.
    Resyncing(ResyncReason),
    /// The goodbye is written, or is the last of the unwritten bytes.
    Closing { why: Goodbye, until: Due },
}

#[derive(Debug)]
struct Joining {
    resume: Start,
    /// The head of the feed, and the session, were requested.
    head_requested: bool,
    /// True without a session.
    session_confirmed: bool,
    /// The events after the cursor were requested.
    range: Option<RequestId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    Head,
    Cursor,
    Invalid,
}

#[derive(Debug)]
enum Missed {
    Requested(RequestId),
    Page(Box<Page>),
}

/// A part of the feed, the oldest event first.
#[derive(Debug)]
struct Page(VecDeque<EncodedEvent>);

struct Unwritten {
    /// The rest of a block that the socket did not take, then whole control blocks. Nothing is written before them.
    bytes: Bytes,
    /// How many of them the last attempt offered; a shorter rest is progress.
    attempted: usize,
    /// When the socket last took bytes; `None` while it may still take all.
    blocked_since: Option<Millis>,
    /// When it must have taken all.
    until: Due,
}

/// What a connection sees of its user.
#[derive(Clone, Copy)]
pub struct FeedView<'a> {
    pub user: UserId,
    /// The user's streams.
    pub streams: usize,
    pub position: Option<Position>,
    pub replay: &'a ReplayBuffer,
    /// Redis delivers this user's events.
    pub subscribed: bool,
}

impl FeedView<'_> {
    fn is_beyond(&self, position: Position) -> bool {
        self.position.is_some_and(|head| head.epoch == position.epoch && head.seq > position.seq)
    }
}

impl Connection {
    pub fn open(key: ConnectionKey, new: NewConnection, cx: &mut Context<'_>) -> Self {
        let (resume, position) = match new.resume {
            Resume::Head => (Start::Head, None),
            Resume::After(cursor) => (Start::Cursor, Some(cursor)),
            Resume::Invalid => (Start::Invalid, None),
        };
        let mut connection = Self {
            key,
            session: new.session,
            signed_by: new.signed_by,
            state: State::Joining(Joining {
                resume,
                head_requested: false,
                session_confirmed: new.session.is_none(),
                range: None,
            }),
            position: position.unwrap_or(Position { epoch: Epoch(0), seq: 0 }),
            started_after: position.map_or(0, |cursor| cursor.seq),
            unwritten: None,
            writing: false,
            heartbeat: new.heartbeat,
            framing: new.framing,
            ends_why: new.ends_why,
            heartbeat_at: 0,
            ends_at: due_at(new.ends_at),
            due: 0,
        };
        connection.heartbeat_at = connection.next_heartbeat(cx);
        connection.schedule(cx);
        if !new.head.is_empty() {
            connection.write(new.head, None, cx);
        }
        connection
    }

    pub fn position(&self) -> Position {
        self.position
    }

    pub fn started_after(&self) -> Seq {
        self.started_after
    }

    /// Whether `position` is one that this process has confirmed.
    pub fn is_joined(&self) -> bool {
        matches!(self.state, State::Live | State::CatchingUp(_) | State::Resyncing(_))
    }

    pub fn is_closing(&self) -> bool {
        matches!(self.state, State::Closing { .. })
    }

    pub fn session_confirmed(&self) -> bool {
        !matches!(self.state, State::Joining(Joining { session_confirmed: false, .. }))
    }

    pub fn is_head_requested(&self) -> bool {
        matches!(self.state, State::Joining(Joining { head_requested: true, .. }))
    }

    /// Requests what a joining stream needs, not before the subscription is confirmed: an earlier answer could miss events
    /// between the two. The session comes first: until it is confirmed, no event is read or written.
    pub fn join(&mut self, feed: FeedView<'_>, cx: &mut Context<'_>) {
        let may_request = feed.subscribed || cx.redis_degraded;
        let State::Joining(joining) = &mut self.state else { return };
        if !joining.head_requested && (may_request || feed.position.is_some()) {
            joining.head_requested = true;
            cx.request_head(feed, HeadReason::Join(self.key), self.session);
        }
        if kept(Rule::SessionFirst) && !joining.session_confirmed {
            return;
        }
        match (joining.resume, feed.position) {
            (Start::Cursor, _) if may_request && joining.range.is_none() => {
                let request = cx.next_request();
                joining.range = Some(request);
                cx.request_range(feed, self.position.seq, Requester::Connection(self.key, request));
            }
            (Start::Head, Some(head)) => self.join_at(head, None, feed, cx),
            (Start::Invalid, Some(head)) => self.join_at(head, Some(ResyncReason::Unknown), feed, cx),
            // The requested head brings the position.
            (Start::Head | Start::Invalid, None) | (Start::Cursor, _) => {}
        }
    }

    /// An answer has confirmed the session.
    pub fn confirm_session(&mut self) {
        if let State::Joining(joining) = &mut self.state {
            joining.session_confirmed = true;
        }
    }

    /// Joins at the head, after a resync if the client's cursor is invalid.
    fn join_at(
        &mut self,
        head: Position,
        invalid: Option<ResyncReason>,
        feed: FeedView<'_>,
        cx: &mut Context<'_>,
    ) {
        self.position = head;
        self.started_after = head.seq;
        // Without an id when a resync follows, so that only the resync moves the client's cursor.
        let with_id = invalid.is_none() || !kept(Rule::OnlyResyncMoves);
        self.write_control(&self.ready(head, false, with_id, cx), cx);
        self.enter(invalid.map_or(State::Live, State::Resyncing), cx);
        self.advance(feed, cx);
    }

    fn ready(&self, cursor: Position, resumed: bool, with_id: bool, cx: &Context<'_>) -> Chunk {
        let heartbeat = self.heartbeat.interval(cx.settings.heartbeat);
        frame::ready(cursor, resumed, with_id, heartbeat, cx.wall)
    }

    /// An event has come from Redis, perhaps beyond the user's position. If it follows this stream's, nothing is missing between.
    pub fn offer(&mut self, event: &EncodedEvent, feed: FeedView<'_>, cx: &mut Context<'_>) {
        let follows = self.position.is_followed_by(event.position) || !kept(Rule::NextEvent);
        if !follows || !self.is_free() {
            return;
        }
        match &self.state {
            State::Live => self.write_event(event, feed, cx),
            // The cursor needs no answer if the user's position proves its history.
            State::Joining(Joining { resume: Start::Cursor, session_confirmed: true, .. })
                if feed.position.is_some_and(|here| here.epoch == event.position.epoch) =>
            {
                let ready = self.framing.bytes(&self.ready(self.position, true, true, cx));
                self.enter(State::Live, cx);
                self.write_event_after(ready, event, feed, cx);
            }
            _ => {}
        }
    }

    /// The next event of the feed. Returns whether the stream needs it later.
    pub fn deliver(&mut self, event: &EncodedEvent, feed: FeedView<'_>, cx: &mut Context<'_>) -> bool {
        if !self.is_joined()
            || self.position.epoch != event.position.epoch
            || self.position.seq >= event.position.seq
        {
            return false;
        }
        let is_next = matches!(self.state, State::Live)
            && self.is_free()
            && self.position.is_followed_by(event.position);
        if is_next {
            self.write_event(event, feed, cx);
        }
        !is_next
    }

    /// An event that is in no feed. Returns whether it was written: only to a stream that waits for nothing else, so that it delays no
    /// event, comes between no events, and says nothing to a stream without a confirmed session.
    pub fn ephemeral(&mut self, event: &Chunk, cx: &mut Context<'_>) -> bool {
        let live = matches!(self.state, State::Live) || !kept(Rule::EphemeralLive);
        let written = live && (self.is_free() || !kept(Rule::EphemeralUnblocked));
        if written {
            self.write_control(event, cx);
        }
        written
    }

    /// The answer to this stream's own request for the events after `after`.
    pub fn page(
        &mut self,
        request: RequestId,
        after: Seq,
        answer: RangeAnswer,
        feed: FeedView<'_>,
        cx: &mut Context<'_>,
    ) {
        let (joining, requested) = match &mut self.state {
            State::Joining(Joining { range: Some(requested), .. }) => (true, requested),
            State::CatchingUp(Missed::Requested(requested)) => (false, requested),
            _ => return,
        };
        if *requested != request {
            return; // A live event or a resync came in between.
        }
        let of_another_history =
            answer.head.zip(feed.position).is_some_and(|(head, here)| head.epoch != here.epoch);
        if of_another_history && kept(Rule::OneHistory) {
            // The user's position or the answer is outdated; a new request shows which.
            *requested = cx.next_request();
            let requester = Requester::Connection(self.key, *requested);
            return cx.request_range(feed, after, requester);
        }
        let cursor = Position { epoch: self.position.epoch, seq: after };
        match judge(cursor, answer.head, answer.events.first().map(|event| event.position.seq)) {
            Verdict::Gone => self.close(Goodbye::Revoked, cx),
            Verdict::Resync(why) if kept(Rule::JudgedCursor) => match feed.position {
                Some(head) if joining => self.join_at(head, Some(why), feed, cx),
                _ => self.resync(why, feed, cx),
            },
            Verdict::Follows | Verdict::Resync(_) => {
                if joining {
                    self.write_control(&self.ready(self.position, true, true, cx), cx);
                }
                self.enter(State::CatchingUp(Missed::Page(Box::new(Page(cx.take_page(answer.events))))), cx);
                self.advance(feed, cx);
                cx.has_left_events |= matches!(self.state, State::CatchingUp(Missed::Page(_)));
            }
        }
    }

    /// The stream reads its next events again when its socket takes bytes.
    pub fn drop_page(&mut self, cx: &mut Context<'_>) {
        if matches!(self.state, State::CatchingUp(Missed::Page(_))) {
            self.enter(State::Live, cx);
        }
    }

    /// The user's position, and so this stream's, is invalid.
    pub fn resync(&mut self, why: ResyncReason, feed: FeedView<'_>, cx: &mut Context<'_>) {
        if self.is_joined() {
            self.enter(State::Resyncing(why), cx);
            self.advance(feed, cx);
        }
    }

    /// Writes the stream's next block, if the socket takes one: a resync or the event after its position, which is requested if it
    /// is not in memory.
    pub fn advance(&mut self, feed: FeedView<'_>, cx: &mut Context<'_>) {
        while self.is_free() {
            match &mut self.state {
                State::Joining(_) | State::CatchingUp(Missed::Requested(_)) | State::Closing { .. } => return,
                State::Resyncing(why) => {
                    let (why, Some(head)) = (*why, feed.position) else { return };
                    self.position = head;
                    self.started_after = head.seq;
                    cx.observed(Observation::Resync { user: feed.user, head, why });
                    self.enter(State::Live, cx);
                    self.write_control(&frame::resync(head, why), cx);
                }
                State::CatchingUp(Missed::Page(page)) => match page.0.pop_front() {
                    None => self.enter(State::Live, cx),
                    Some(event) => {
                        cx.release(event.frame.len());
                        self.write_event(&event, feed, cx);
                    }
                },
                State::Live => {
                    if let Some(event) = feed.replay.after(self.position) {
                        self.write_event(event, feed, cx);
                    } else if feed.is_beyond(self.position) && kept(Rule::LaggingReads) {
                        let request = cx.next_request();
                        self.state = State::CatchingUp(Missed::Requested(request));
                        cx.request_range(feed, self.position.seq, Requester::Connection(self.key, request));
                    } else {
                        return;
                    }
                }
            }
        }
    }

    /// Says goodbye after the block that is being written. The client closes the connection, or it is cut.
    pub fn close(&mut self, why: Goodbye, cx: &mut Context<'_>) {
        if self.is_closing() {
            return;
        }
        let within = match why {
            Goodbye::Expired => EXPIRED_WITHIN,
            Goodbye::Revoked => REVOKED_WITHIN,
            Goodbye::Busy | Goodbye::Drain | Goodbye::Replaced | Goodbye::Rotate => GOODBYE_WITHIN,
        };
        self.enter(State::Closing { why, until: due_at(cx.now + within) }, cx);
        let goodbye = frame::goodbye(why, cx.rng.random_range(why.retry()));
        self.write(self.framing.last(&goodbye), None, cx);
        self.schedule(cx);
    }

    /// Ends the body without a goodbye, unless that would cut a block.
    pub fn end_body(&mut self, cx: &mut Context<'_>) {
        if self.is_free() && !self.is_closing() {
            self.write(Bytes::from_static(self.framing.end()), None, cx);
        }
        cx.effects.push(Effect::FinishWriting(self.key));
    }

    /// Why the stream is closed when its client has gone.
    pub fn reason_to_go(&self) -> &'static str {
        match self.state {
            State::Closing { why, .. } => why.as_str(),
            _ => "client",
        }
    }

    /// The record of a connection that is removed; releases what it holds.
    pub fn closed(self, user: UserId, reason: &'static str, cx: &mut Context<'_>) -> ClosedStream {
        if kept(Rule::Released) {
            cx.release(self.page_bytes());
        }
        if self.is_blocked() {
            cx.observed(Observation::Unblocked);
        }
        ClosedStream {
            user,
            connection: self.key.generation,
            session: self.session,
            epoch: self.position.epoch,
            after: self.started_after,
            upto: self.position.seq,
            reason,
            at: cx.wall.into(),
        }
    }

    #[cfg(test)]
    pub fn page_events(&self) -> impl Iterator<Item = &EncodedEvent> {
        let page = if let State::CatchingUp(Missed::Page(page)) = &self.state { Some(&page.0) } else { None };
        page.into_iter().flatten()
    }

    /// Bytes of the page that is not written yet.
    pub fn page_bytes(&self) -> usize {
        match &self.state {
            State::CatchingUp(Missed::Page(page)) => page.0.iter().map(|event| event.frame.len()).sum(),
            _ => 0,
        }
    }

    fn enter(&mut self, state: State, cx: &mut Context<'_>) {
        if kept(Rule::Released) {
            cx.release(self.page_bytes());
        }
        let was_joined = self.is_joined();
        self.state = state;
        cx.joined |= self.is_joined() && !was_joined;
    }
}

/// Writing.
impl Connection {
    pub fn is_writing(&self) -> bool {
        self.writing
    }

    fn is_free(&self) -> bool {
        !self.writing && self.unwritten.is_none()
    }

    fn is_blocked(&self) -> bool {
        self.unwritten.as_ref().is_some_and(|unwritten| unwritten.blocked_since.is_some())
    }

    fn write_event(&mut self, event: &EncodedEvent, feed: FeedView<'_>, cx: &mut Context<'_>) {
        self.write_event_after(Bytes::new(), event, feed, cx);
    }

    fn write_event_after(
        &mut self,
        ready: Bytes,
        event: &EncodedEvent,
        feed: FeedView<'_>,
        cx: &mut Context<'_>,
    ) {
        self.position = event.position;
        let trace = event.trace.as_ref().map(|trace| (trace.clone(), feed.streams));
        let written = WrittenEvent { path: event.path, created_at: event.created_at, trace };
        self.write(concat(&ready, &self.framing.bytes(&event.frame)), Some(written), cx);
    }

    fn write_control(&mut self, block: &Chunk, cx: &mut Context<'_>) {
        self.write(self.framing.bytes(block), None, cx);
    }

    /// Writes whole blocks, after the unwritten ones.
    fn write(&mut self, bytes: Bytes, event: Option<WrittenEvent>, cx: &mut Context<'_>) {
        if self.is_free() || !kept(Rule::WholeBlocks) {
            self.begin_write(bytes, event, cx);
        } else {
            let unwritten = self.unwritten.get_or_insert_with(|| Box::new(Unwritten::none()));
            unwritten.bytes = concat(&unwritten.bytes, &bytes);
        }
    }

    fn begin_write(&mut self, bytes: Bytes, event: Option<WrittenEvent>, cx: &mut Context<'_>) {
        self.writing = true;
        cx.writes += 1;
        cx.effects.push(Effect::Write { to: self.key, bytes, event });
    }

    /// Of the last [`Effect::Write`], the socket did not take this rest.
    pub fn wrote(&mut self, rest: Bytes, feed: FeedView<'_>, cx: &mut Context<'_>) {
        self.writing = false;
        if rest.is_empty() && self.unwritten.is_none() {
            return self.all_written(feed, cx);
        }
        let now = cx.now;
        let unwritten = self.unwritten.get_or_insert_with(|| Box::new(Unwritten::none()));
        let took_some = rest.len() < unwritten.attempted;
        let blocks = !rest.is_empty();
        unwritten.bytes = concat(&rest, &unwritten.bytes);
        match &mut unwritten.blocked_since {
            Some(since) if took_some => *since = now,
            Some(_) => {}
            none if blocks => {
                *none = Some(now);
                unwritten.until = due_at(now + BLOCK_WITHIN);
                cx.observed(Observation::Blocked);
            }
            None => {}
        }
        if blocks {
            self.schedule(cx);
        } else if unwritten.bytes.is_empty() {
            self.unblock(cx);
            self.all_written(feed, cx);
        } else {
            self.writable(feed, cx); // Control blocks came during the write.
        }
    }

    fn unblock(&mut self, cx: &mut Context<'_>) {
        if self.is_blocked() {
            cx.observed(Observation::Unblocked);
        }
        self.unwritten = None;
    }

    fn all_written(&mut self, feed: FeedView<'_>, cx: &mut Context<'_>) {
        if self.is_closing() {
            cx.effects.push(Effect::FinishWriting(self.key));
        } else {
            self.advance(feed, cx);
        }
    }

    /// The socket may take bytes.
    pub fn writable(&mut self, feed: FeedView<'_>, cx: &mut Context<'_>) {
        if self.writing {
            return;
        }
        match self.unwritten.as_mut() {
            None => self.advance(feed, cx),
            Some(unwritten) => {
                let bytes = std::mem::take(&mut unwritten.bytes);
                unwritten.attempted = bytes.len();
                self.begin_write(bytes, None, cx);
            }
        }
    }
}

/// For an operator.
impl Connection {
    /// What became of this event.
    pub fn says(&self, seq: Seq) -> &'static str {
        match &self.state {
            State::Joining(Joining { session_confirmed: false, .. }) => {
                "Joining: its session is not confirmed yet, and until then it receives nothing"
            }
            State::Joining(Joining { resume: Start::Cursor, .. }) => {
                "Joining: it waits for the events after its cursor, or for its subscription"
            }
            State::Joining(_) => "Joining: it waits for the head of the feed, or for its subscription",
            State::Resyncing(_) => "It must resync: the event is sent soon",
            _ if seq <= self.started_after => {
                "The event is before its start: the client had it, or reads it by REST"
            }
            _ if seq < self.position.seq || seq == self.position.seq && !self.is_blocked() => {
                "The event was written to it"
            }
            _ if seq == self.position.seq => {
                "Written in part: its socket cannot take bytes now (a slow consumer)"
            }
            _ if self.is_blocked() => "Not written yet: its socket cannot take bytes now (a slow consumer)",
            State::Closing { .. } => {
                "Not written: the stream is closing, and its client resumes from its cursor"
            }
            State::CatchingUp(_) => "Not written yet: it is catching up from the feed",
            State::Live => "Not written yet: it waits for the event",
        }
    }
}

/// Time.
impl Connection {
    /// Whether this entry of the wheel is the connection's valid one.
    pub fn is_due(&self, at: Due) -> bool {
        self.due == at
    }

    /// The timer is due: sends the heartbeat, or says goodbye. Returns why the connection must be removed.
    pub fn on_due(&mut self, cx: &mut Context<'_>) -> Option<&'static str> {
        let now = slot_of(cx.now);
        if let State::Closing { why, .. } = self.state {
            return Some(why.as_str());
        }
        if kept(Rule::WriteDeadline) && self.write_deadline(cx).is_some_and(|deadline| deadline <= now) {
            return Some("slow_consumer");
        }
        if self.ends_at <= now {
            self.close(self.ends_why, cx);
            return None;
        }
        if self.heartbeat_at <= now {
            self.heartbeat_at = self.next_heartbeat(cx);
            if self.is_free() {
                self.write_control(&self.heartbeat.chunk(), cx);
            }
        }
        self.schedule(cx);
        None
    }

    fn schedule(&mut self, cx: &mut Context<'_>) {
        let due = if let State::Closing { until, .. } = self.state {
            until
        } else {
            let due = self.heartbeat_at.min(self.ends_at);
            self.write_deadline(cx).map_or(due, |deadline| deadline.min(due))
        };
        if due != self.due {
            self.due = due; // Otherwise the wheel has the entry already.
            cx.wheel.insert(self.key.index, due);
        }
    }

    fn write_deadline(&self, cx: &Context<'_>) -> Option<Due> {
        let unwritten = self.unwritten.as_ref()?;
        let since = unwritten.blocked_since?;
        Some(due_at(since + cx.settings.write_deadline.as_millis() as Millis).min(unwritten.until))
    }

    fn next_heartbeat(&self, cx: &mut Context<'_>) -> Due {
        let every: Duration = self.heartbeat.interval(cx.settings.heartbeat);
        due_at(cx.now + cx.jittered(every))
    }
}

impl Unwritten {
    fn none() -> Self {
        Self { bytes: Bytes::new(), attempted: 0, blocked_since: None, until: Due::MAX }
    }
}

/// Shares the bytes if one side is empty.
fn concat(first: &Bytes, then: &Bytes) -> Bytes {
    match (first.is_empty(), then.is_empty()) {
        (true, _) => then.clone(),
        (_, true) => first.clone(),
        _ => [&first[..], then].concat().into(),
    }
}
