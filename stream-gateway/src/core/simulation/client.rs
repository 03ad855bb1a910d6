//! A client as strict as a browser: it reads chunks and blocks, and knows which event must come next.

use std::collections::BTreeSet;

use protocol::{
    ids::{SessionId, UserId},
    position::Position,
};

use crate::core::{ConnectionKey, Millis, effect::RequestId};

/// One tab: it has one connection at a time.
pub struct SimulatedClient {
    pub user: UserId,
    pub session: Option<SessionId>,
    pub key: u8,
    /// The last id that it read.
    pub cursor: Option<Position>,
    pub connection: Option<ClientStream>,
    /// It must not reconnect with this token.
    pub revoked: bool,
}

pub struct ClientStream {
    pub key: ConnectionKey,
    /// Bytes that the socket takes before it blocks.
    pub room: usize,
    pub broken: bool,
    /// An answer has confirmed its session.
    pub confirmed: bool,
    /// When the socket last took bytes.
    pub heard_at: Millis,
    /// When the gateway must have ended it.
    pub ends_at: Millis,
    /// It started at the head, took every byte, and needed no resync.
    pub flawless: bool,
    /// Bytes of the last write that its socket did not take.
    pub untaken: usize,
    /// Its request for events that it missed.
    pub reading: Option<RequestId>,
    /// Ephemeral events that it may read, each once: those that came while it was live.
    pub ephemeral: BTreeSet<u32>,
    unread: Vec<u8>,
    stage: ReadingStage,
    /// The cursor that it was opened with.
    resumed_from: Option<Position>,
}

#[derive(Debug, PartialEq, Eq)]
enum ReadingStage {
    /// The head of the response and the first `retry` come first.
    Head,
    /// Then `ready`, after heartbeats.
    Opening,
    /// `ready` had no id: a `resync` follows.
    MustResync,
    Ready,
    /// After a goodbye, the body ends.
    Ended,
}

/// The head of every simulated response.
pub const HEAD: &str = "HTTP/1.1 200 OK\r\n\r\n";

impl ClientStream {
    pub fn new(
        key: ConnectionKey,
        resumed_from: Option<Position>,
        confirmed: bool,
        now: Millis,
        ends_at: Millis,
    ) -> Self {
        Self {
            key,
            room: usize::MAX,
            broken: false,
            confirmed,
            heard_at: now,
            ends_at,
            flawless: resumed_from.is_none(),
            untaken: 0,
            reading: None,
            ephemeral: BTreeSet::new(),
            unread: Vec::new(),
            stage: ReadingStage::Head,
            resumed_from,
        }
    }
}

impl SimulatedClient {
    /// Reads what the socket took. Returns the position of each new event.
    pub fn read(&mut self, bytes: &[u8]) -> Result<Vec<Position>, String> {
        let mut events = Vec::new();
        let Some(open) = self.connection.as_mut() else { return Err("bytes on a closed connection".into()) };
        open.unread.extend(bytes);
        if open.stage == ReadingStage::Head && open.unread.starts_with(HEAD.as_bytes()) {
            open.unread.drain(..HEAD.len());
            open.stage = ReadingStage::Opening;
        }
        if open.stage == ReadingStage::Head {
            return Ok(events);
        }
        while let Some((block, length)) = chunk(&open.unread)? {
            open.unread.drain(..length);
            events.extend(block_read(open, &mut self.cursor, &mut self.revoked, &block)?);
        }
        Ok(events)
    }

    /// It has the goodbye and the end of the body.
    pub fn has_ended(&self) -> bool {
        self.connection
            .as_ref()
            .is_some_and(|open| open.stage == ReadingStage::Ended && open.unread.is_empty())
    }

    pub fn is_flawless(&self) -> bool {
        self.is_ready() && self.connection.as_ref().is_some_and(|open| open.flawless)
    }

    pub fn is_ready(&self) -> bool {
        self.connection.as_ref().is_some_and(|open| open.stage == ReadingStage::Ready)
    }
}

/// The first whole chunk, and its length with its frame.
fn chunk(bytes: &[u8]) -> Result<Option<(String, usize)>, String> {
    let Some(line) = bytes.windows(2).position(|two| two == b"\r\n") else { return Ok(None) };
    let length =
        std::str::from_utf8(&bytes[..line]).ok().and_then(|text| usize::from_str_radix(text, 16).ok());
    let length = length.ok_or("a chunk without its length")?;
    let whole = line + 2 + length + 2;
    if bytes.len() < whole {
        return Ok(None);
    }
    if &bytes[whole - 2..whole] != b"\r\n" {
        return Err("a chunk that does not end".into());
    }
    let block = String::from_utf8(bytes[line + 2..whole - 2].to_vec()).map_err(|_| "no UTF-8")?;
    Ok(Some((block, whole)))
}

fn block_read(
    open: &mut ClientStream,
    cursor: &mut Option<Position>,
    revoked: &mut bool,
    block: &str,
) -> Result<Option<Position>, String> {
    if block.is_empty() {
        return match open.stage {
            ReadingStage::Ended => Ok(None),
            _ => Err("the body ended without a goodbye".into()),
        };
    }
    if block == ":\n" || block.starts_with("retry: ") && block.lines().count() == 1 {
        return Ok(None);
    }
    let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    if !block.ends_with("\n\n") || open.stage == ReadingStage::Ended {
        return Err(format!("unexpected block {block:?}"));
    }
    let id =
        field("id").map(|id| id.parse::<Position>().map_err(|_| format!("no cursor: {id}"))).transpose()?;
    match (field("event"), id) {
        (Some("goodbye"), None) => {
            *revoked |= block.contains("revoked");
            open.stage = ReadingStage::Ended;
            return Ok(None);
        }
        _ if !open.confirmed => return Err(format!("{block:?} before the session was confirmed")),
        (Some("ready"), id) if open.stage == ReadingStage::Opening => {
            let resumed = block.contains("\"resumed\":true");
            if resumed && (id.is_none() || id != open.resumed_from) {
                return Err(format!("resumed from {:?} at {id:?}", open.resumed_from));
            }
            if !resumed && id.is_some() && open.resumed_from.is_some() {
                return Err(format!("did not resume from {:?}", open.resumed_from));
            }
            open.stage = if id.is_some() { ReadingStage::Ready } else { ReadingStage::MustResync };
            *cursor = id.or(*cursor);
        }
        (Some("resync"), Some(id))
            if matches!(open.stage, ReadingStage::MustResync | ReadingStage::Ready) =>
        {
            open.stage = ReadingStage::Ready;
            open.flawless = false;
            open.reading = None;
            *cursor = Some(id);
        }
        (Some("typing"), None) if open.stage == ReadingStage::Ready => {
            let number = field("data").and_then(|data| data.parse().ok());
            if !number.is_some_and(|number| open.ephemeral.remove(&number)) {
                return Err(format!("{block:?} for a stream that could not take it when it came"));
            }
        }
        (None, Some(id)) if open.stage == ReadingStage::Ready => {
            if !cursor.is_some_and(|cursor| cursor.is_followed_by(id)) {
                return Err(format!("event {id} after {cursor:?}"));
            }
            *cursor = Some(id);
            return Ok(Some(id));
        }
        _ => return Err(format!("unexpected block {block:?}")),
    }
    Ok(None)
}
