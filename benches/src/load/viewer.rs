//! What one stream says, read block by block, and its ledger: after `ready`, every event follows the one before it. Pure.

use shared::cursor::Cursor;

/// A head or block longer than this is a fault of the server.
const LONGEST: usize = 64 * 1024;
/// Before the server has said how long to wait.
const DEFAULT_RETRY_MILLIS: u32 = 3_000;

/// What the bytes of one connection said, for the process to count.
#[derive(Debug, PartialEq)]
pub enum Said {
    Ready,
    /// A durable event; the number that its text begins with, if it is a message to this user that has one.
    Event(Option<u64>),
    Heartbeat,
    Resync,
    Goodbye(String),
    Fault(String),
}

/// One viewer's memory, over all its connections.
#[derive(Debug, Default)]
pub struct Ledger {
    pub place: Option<Cursor>,
    pub retry_millis: Option<u32>,
}

/// What was read of the present connection and is not whole yet.
#[derive(Debug, Default)]
pub struct Reader {
    rest: Vec<u8>,
    headers_read: bool,
}

impl Ledger {
    pub fn retry_millis(&self) -> u32 {
        self.retry_millis.unwrap_or(DEFAULT_RETRY_MILLIS)
    }
}

impl Reader {
    pub fn read(&mut self, bytes: &[u8], ledger: &mut Ledger, mut say: impl FnMut(Said)) {
        // Almost always a read holds whole blocks, so almost always nothing is copied.
        if self.rest.is_empty() {
            let used = self.take_whole(bytes, ledger, &mut say);
            self.rest.extend_from_slice(&bytes[used..]);
        } else {
            let mut all = std::mem::take(&mut self.rest);
            all.extend_from_slice(bytes);
            let used = self.take_whole(&all, ledger, &mut say);
            all.drain(..used);
            self.rest = all;
        }
        if self.rest.is_empty() {
            self.rest = Vec::new();
        } else if self.rest.len() > LONGEST {
            say(Said::Fault("a block without an end".into()));
        }
    }

    /// How many bytes were whole.
    fn take_whole(&mut self, bytes: &[u8], ledger: &mut Ledger, say: &mut impl FnMut(Said)) -> usize {
        let mut used = 0;
        if !self.headers_read {
            let Some(end) = find(bytes, b"\r\n\r\n") else { return 0 };
            if !bytes.starts_with(b"HTTP/1.1 200 ") {
                let line = bytes.split(|byte| *byte == b'\r').next().unwrap_or_default();
                say(Said::Fault(format!("answered {}", String::from_utf8_lossy(line))));
            }
            self.headers_read = true;
            used = end + 4;
        }
        while let Some(length) = find(&bytes[used..], b"\n\n") {
            match std::str::from_utf8(&bytes[used..used + length]) {
                Ok(block) => {
                    if let Some(said) = ledger.enter(block) {
                        say(said);
                    }
                }
                Err(_) => say(Said::Fault("a block that is not UTF-8".into())),
            }
            used += length + 2;
        }
        used
    }
}

impl Ledger {
    fn enter(&mut self, block: &str) -> Option<Said> {
        let (mut id, mut name, mut data) = (None, None, "");
        let mut comment = false;
        for line in block.split('\n') {
            match line.split_once(": ") {
                Some(("id", value)) => id = Some(value),
                Some(("event", value)) => name = Some(value),
                Some(("data", value)) => data = value,
                Some(("retry", value)) => self.retry_millis = value.parse().ok(),
                _ if line.starts_with(':') => comment = true,
                _ => return Some(Said::Fault(format!("a line of no known form: {line:?}"))),
            }
        }
        let cursor = match id.map(str::parse::<Cursor>) {
            Some(Err(_)) => return Some(Said::Fault(format!("an id that is no cursor: {id:?}"))),
            Some(Ok(cursor)) => Some(cursor),
            None => None,
        };
        match (name, cursor) {
            (Some("ready"), None) => Some(Said::Ready), // A resync follows.
            (Some("ready"), Some(cursor)) => {
                let came_back_elsewhere = self.place.is_some_and(|place| place != cursor);
                let fault = || Said::Fault(format!("was at {:?}, and is ready at {cursor}", self.place));
                let said = if came_back_elsewhere { fault() } else { Said::Ready };
                self.place = Some(cursor);
                Some(said)
            }
            (Some("resync"), Some(cursor)) => {
                self.place = Some(cursor);
                Some(Said::Resync)
            }
            (Some("goodbye"), None) => {
                let reason = text_member(data, "reason").unwrap_or("goodbye");
                Some(Said::Goodbye(reason.to_owned()))
            }
            (name, Some(cursor)) => {
                let follows = self
                    .place
                    .is_some_and(|place| place.epoch == cursor.epoch && place.seq + 1 == cursor.seq);
                let fault = || Said::Fault(format!("{cursor} came after {:?}", self.place));
                let said = if follows {
                    Said::Event(if name.is_none() { number_in_text(data) } else { None })
                } else {
                    fault()
                };
                self.place = Some(cursor);
                Some(said)
            }
            (Some(name), None) => Some(Said::Fault(format!("{name} without an id"))),
            (None, None) => comment.then_some(Said::Heartbeat),
        }
    }
}

/// The digits that a message's text begins with.
fn number_in_text(data: &str) -> Option<u64> {
    let text = text_member(data, "content")?;
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text[..end].parse().ok()
}

/// A member of flat JSON whose value has no escapes: reading it as JSON would cost more than all the rest.
fn text_member<'a>(json: &'a str, name: &str) -> Option<&'a str> {
    let at = json
        .match_indices(name)
        .map(|(at, _)| at + name.len())
        .find(|at| json[*at..].starts_with("\":\""))?;
    json[at + 3..].split('"').next()
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";

    fn id(seq: u64) -> String {
        format!("00000000000000ff-{seq}")
    }

    fn message(seq: u64, text: &str) -> String {
        format!("id: {}\ndata: {{\"id\":\"1\",\"content\":\"{text}\",\"mine\":false}}\n\n", id(seq))
    }

    fn ready(seq: u64) -> String {
        format!("id: {}\nevent: ready\ndata: {{}}\n\n", id(seq))
    }

    /// Whole, and byte by byte: the same must come of it.
    fn read(ledger: &mut Ledger, text: &str) -> Vec<Said> {
        let (mut whole, mut pieces) = (Vec::new(), Vec::new());
        let mut copy = Ledger { place: ledger.place, retry_millis: ledger.retry_millis };
        let mut reader = Reader::default();
        for byte in text.bytes() {
            reader.read(&[byte], &mut copy, |said| pieces.push(said));
        }
        Reader::default().read(text.as_bytes(), ledger, |said| whole.push(said));
        assert_eq!(whole, pieces);
        assert_eq!(ledger.place, copy.place);
        whole
    }

    #[test]
    fn a_stream_without_faults() {
        let mut ledger = Ledger::default();
        let sent = "event: message.sent\ndata: {\"content\":\"12\"}";
        let text = format!(
            "{HEAD}retry: 2500\n\n{}{}:\n\nid: {}\n{sent}\n\n{}",
            ready(3),
            message(4, "0017 x"),
            id(5),
            message(6, "hello"),
        );
        let said = read(&mut ledger, &text);
        let event = Said::Event;
        assert_eq!(said, [Said::Ready, event(Some(17)), Said::Heartbeat, event(None), event(None)]);
        assert_eq!((ledger.retry_millis(), ledger.place.map(|place| place.seq)), (2_500, Some(6)));
    }

    #[test]
    fn a_hole_a_repeat_and_another_feed_are_faults() {
        for next in [message(5, "1"), message(3, "1"), message(4, "1").replace("ff-", "fe-")] {
            let said = read(&mut Ledger::default(), &format!("{HEAD}{}{next}", ready(3)));
            assert!(matches!(&said[..], [Said::Ready, Said::Fault(_)]), "{said:?}");
        }
        let said = read(&mut Ledger::default(), &format!("{HEAD}{}", message(1, "1")));
        assert!(matches!(&said[..], [Said::Fault(_)]), "an event before ready: {said:?}");
    }

    #[test]
    fn who_comes_back_must_be_where_they_were() {
        let place: Cursor = id(7).parse().unwrap();
        let back_at = |seq| {
            let mut ledger = Ledger { place: Some(place), retry_millis: None };
            read(&mut ledger, &format!("{HEAD}{}", ready(seq)))
        };
        assert_eq!(back_at(7), [Said::Ready]);
        assert!(matches!(&back_at(8)[..], [Said::Fault(_)]));
    }

    #[test]
    fn ends_and_refusals_are_told_apart() {
        let goodbye = "retry: 90000\nevent: goodbye\ndata: {\"reason\":\"busy\",\"reconnect\":true}\n\n";
        let mut ledger = Ledger::default();
        assert_eq!(read(&mut ledger, &format!("{HEAD}{goodbye}")), [Said::Goodbye("busy".into())]);
        assert_eq!(ledger.retry_millis(), 90_000);
        let refused = read(&mut ledger, "HTTP/1.1 401 Unauthorized\r\n\r\n");
        assert!(matches!(&refused[..], [Said::Fault(why)] if why.contains("401")));
        let resync =
            format!("{HEAD}event: ready\ndata: {{}}\n\nid: {}\nevent: resync\ndata: {{}}\n\n", id(9));
        assert_eq!(read(&mut ledger, &resync), [Said::Ready, Said::Resync]);
    }
}
